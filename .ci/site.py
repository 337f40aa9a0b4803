"""Check a built site: it loads nothing from other hosts, and every formula is one.

python .ci/site.py DIRECTORY
"""

import re
import sys
from pathlib import Path

LOADS = re.compile(r"<(?:link|script|img|iframe)[^>]+(?:href|src)=\"(?:https?:)?//")
IMPORTS = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//")
# A line that opens with a plus or a minus inside $...$ becomes a list, and the dollar is shown.
CODE = re.compile(r"(?s)<(code|pre|script|style|dt)\b.*?</\1>")


def main() -> None:
    """Name the first page at fault."""
    (directory,) = sys.argv[1:]
    pages = sorted(Path(directory).rglob("*.html"))
    if not pages:
        raise SystemExit(f"expected a site in {directory}; got no page.")
    for page in pages:
        html = page.read_text(encoding="utf-8")
        if LOADS.search(html):
            raise SystemExit(f"{page}: expected nothing from another host.")
        if "$" in CODE.sub("", html):
            raise SystemExit(f"{page}: expected every formula to be one; got a dollar.")
    for style in Path(directory).rglob("*.css"):
        if IMPORTS.search(style.read_text(encoding="utf-8")):
            raise SystemExit(f"{style}: expected nothing from another host.")


if __name__ == "__main__":
    main()
