"""Check a built site in headless Chromium: widths, contrast, mathematics and search.

python .ci/look.py DIRECTORY

Every page is looked at 1400 and 390 pixels wide, in light and in dark. No page may be wider than
the window; at 1400 no table may be wider than its column. Text has the contrast of WCAG AA, 4.5,
and light and dark show as many pictures. At the start the sidebar shows the entry of the page.
Every formula has to be rendered, and the search has to find the word "likelihood".
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Without the last five it asks its maker's hosts for updates.
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HARNESS = """<!doctype html><pre id="found"></pre><script>
const found = [];
async function open(page) {
  const frame = document.createElement("iframe");
  frame.style = "width:1400px;height:900px;border:0";
  frame.src = page;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const inside = frame.contentWindow;
  for (let i = 0; i < 100 && inside.MathJax && !inside.MathJax.startup?.promise; i++)
    await new Promise(done => setTimeout(done, 50));
  await inside.MathJax?.startup?.promise;
  return frame;
}
const rgba = color => {
  const [red, green, blue, alpha = 1] = color.match(/[\\d.]+/g).map(Number);
  return {red, green, blue, alpha};
};
const luminance = color => ["red", "green", "blue"].reduce((sum, name, i) => {
  const share = color[name] / 255;
  const linear = share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  return sum + [0.2126, 0.7152, 0.0722][i] * linear;
}, 0);
function contrast(element, view) {
  let ground = element, color;
  do color = rgba(view.getComputedStyle(ground).backgroundColor);
  while (color.alpha < 1 && (ground = ground.parentElement));
  if (color.alpha < 1) color = rgba("rgb(255, 255, 255)");
  const text = rgba(view.getComputedStyle(element).color);
  const [less, more] = [luminance(color), luminance(text)].sort((a, b) => a - b);
  return (more + 0.05) / (less + 0.05);
}
const TEXT = "article :is(p, li, dt, dd, th, td, h1, h2, h3, a:not(.headerlink), pre, pre span), "
  + ".sidebar-tree a";
const isShown = element => element.getClientRects().length > 0;
const hasText = element => [...element.childNodes].some(
  node => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
async function look() {
  for (const page of PAGES) {
    const frame = await open(page), document = frame.contentDocument;
    const entry = document.querySelector(".sidebar-tree .current-page > a");
    const place = entry?.getBoundingClientRect();
    if (place && (place.top < 0 || place.bottom > 900))
      found.push(`${page}: the sidebar does not show the entry of the page`);
    const pictures = new Set();
    for (const theme of ["light", "dark"]) for (const width of [1400, 390]) {
      frame.style.width = `${width}px`;
      document.body.dataset.theme = theme;
      const say = text => found.push(`${page} at ${width}, ${theme}: ${text}`);
      pictures.add([...document.querySelectorAll("article img")].filter(isShown).length);
      if (width > 1000) for (const text of document.querySelectorAll(TEXT))
        if (isShown(text) && hasText(text) && contrast(text, frame.contentWindow) < 4.5) {
          const ratio = contrast(text, frame.contentWindow).toFixed(1);
          say(`a contrast of ${ratio}: ${text.textContent.trim().slice(0, 40)}`);
          break;
        }
      const over = document.documentElement.scrollWidth - width;
      if (over > 1) say(`${over} pixels wider than the window`);
      if (width > 1000) for (const table of document.querySelectorAll("article table")) {
        const column = table.closest("article").getBoundingClientRect().right;
        const wide = table.getBoundingClientRect().right - column;
        if (wide > 4) say(`a table is ${Math.round(wide)} pixels wider than its column: `
                          + table.rows[0].innerText.replace(/\\s+/g, " ").slice(0, 60));
      }
    }
    const say = text => found.push(`${page}: ${text}`);
    if (pictures.size > 1) say("expected as many pictures in light and in dark");
    for (const formula of document.querySelectorAll(".math"))
      if (!formula.querySelector("mjx-container")) say("not rendered: " + formula.textContent);
    for (const error of document.querySelectorAll("mjx-merror"))
      say("a formula at fault: " + error.textContent);
    frame.remove();
  }
  const frame = await open("search.html?q=likelihood");
  const results = () => frame.contentDocument.querySelectorAll("#search-results li").length;
  for (let i = 0; i < 100 && !results(); i++) await new Promise(done => setTimeout(done, 50));
  if (!results()) found.push("search.html: expected results for likelihood; got none");
}
look().catch(error => found.push(String(error))).then(() => {
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, and one page that opens all others."""

    def __init__(self, *args: object, harness: bytes, **options: object) -> None:
        self.harness = harness
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """The harness at its own address, the site elsewhere."""
        if self.path != "/look":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.harness)
        return None

    def log_message(self, *args: object) -> None:
        """Say nothing of each file."""


def main() -> None:
    """Print what is at fault, or say that no browser is there."""
    site = Path(sys.argv[1])
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        print(f"no browser ({', '.join(NAMES)}): the look of the site was not checked")
        return
    paths = (path for path in sorted(site.rglob("*.html")) if path.name != "search.html")
    hidden = {"_static", "_modules"}
    pages = [path.relative_to(site).as_posix() for path in paths if not hidden & {*path.parts}]
    harness = HARNESS.replace("PAGES", json.dumps(pages)).encode()
    handler = partial(Handler, harness=harness, directory=str(site))
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        tempfile.TemporaryDirectory() as profile,
    ):
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/look"
        budget = ["--virtual-time-budget=600000", f"--user-data-dir={profile}", "--dump-dom"]
        command = [browser, *OPTIONS, *budget, address]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        server.shutdown()
    text = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.DOTALL)
    if text is None or not text[1]:
        raise SystemExit("expected what the pages look like; the browser gave nothing.")
    if found := json.loads(html.unescape(text[1])):
        raise SystemExit("\n".join(found))
    print(f"{len(pages)} pages look right")


if __name__ == "__main__":
    main()
