// The sidebar opens at the entry of the page.
const sidebar = document.querySelector(".sidebar-scroll");
const entry = document.querySelector(".sidebar-tree .current-page");
if (sidebar && entry) {
  const distance = entry.getBoundingClientRect().top - sidebar.getBoundingClientRect().top;
  // Furo scrolls smoothly, which would be seen at every click.
  sidebar.scrollBy({ top: distance - sidebar.clientHeight / 3, behavior: "instant" });
}
