"""Check a built site in headless Chromium: widths, pictures, mathematics and search.

python .ci/look.py DIRECTORY

Every page is looked at 1400 and 390 pixels wide. No page may be wider than the window; at 1400 no
table may be wider than its column. On a light ground the light version of a picture is shown, on
a dark one the dark. Every formula has to be rendered, and the search has to find the word
"likelihood".
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
async function look() {
  for (const page of PAGES) {
    const frame = await open(page), document = frame.contentDocument;
    for (const width of [1400, 390]) {
      frame.style.width = `${width}px`;
      const say = text => found.push(`${page} at ${width}: ${text}`);
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
    for (const theme of ["light", "dark"]) {
      document.body.dataset.theme = theme;
      for (const image of document.querySelectorAll("img.only-light, img.only-dark"))
        if (image.classList.contains(`only-${theme}`) !== (image.getClientRects().length > 0))
          say(`the wrong version on a ${theme} ground: ${image.getAttribute("src")}`);
    }
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
    pages = [path.relative_to(site).as_posix() for path in paths if "_static" not in path.parts]
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
