"""Check a built site: nothing from other hosts, formulas are formulas, and methods have entries.

Every picture has a version for light pages and one for dark pages.

python .ci/site.py DIRECTORY
"""

import inspect
import re
import sys
from functools import cached_property
from pathlib import Path

import hosm_losses

LOADS = re.compile(r"<(?:link|script|img|iframe)[^>]+(?:href|src)=\"(?:https?:)?//")
IMPORTS = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//")
# A line that opens with a plus or a minus inside $...$ becomes a list, and the dollar is shown.
CODE = re.compile(r"(?s)<(code|pre|script|style|dt)\b.*?</\1>")
PICTURE = re.compile(r'<img[^>]+src="[^"]*?([\w-]+)(?<!_thumb)\.svg"')
# Methods and properties of public classes that the package calls, and PyTorch, but no user.
INTERNAL = {"affine", "affine_of_data", "noise_without_x", "network_arguments", "predict"}
INTERNAL |= {"draw", "extra_repr", "moments", "posterior", "quantization", "start_coordinates"}
INTERNAL |= {"support", "knows_data", "products", "is_random", "estimate"}
INTERNAL |= {"integrate", "check", "compare", "solve", "get_extra_state", "set_extra_state"}


def lacking(directory: Path) -> list[str]:
    """The public methods and properties of public classes that have no entry on their page."""
    lost = []
    for name, kind in vars(hosm_losses).items():
        if isinstance(kind, type):
            own = [base for base in kind.__mro__ if base.__module__.startswith("hosm_losses")]
            members = {key: value for base in own for key, value in vars(base).items()}
            page = directory / "reference" / f"hosm_losses.{name}.html"
            html = page.read_text(encoding="utf-8")
            for key, value in members.items():
                method = inspect.isroutine(value) or isinstance(value, property | cached_property)
                public = not key.startswith("_") and key not in INTERNAL
                if method and public and f'id="hosm_losses.{name}.{key}"' not in html:
                    lost.append(f"{name}.{key}")
    return lost


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
        pictures = set(PICTURE.findall(html))
        light = {name for name in pictures if not name.endswith("-dark")}
        if pictures != light | {f"{name}-dark" for name in light}:
            raise SystemExit(f"{page}: expected two versions of each picture; got {pictures}.")
    for style in Path(directory).rglob("*.css"):
        if IMPORTS.search(style.read_text(encoding="utf-8")):
            raise SystemExit(f"{style}: expected nothing from another host.")
    if lost := lacking(Path(directory)):
        raise SystemExit(f"{directory}: expected entries for {', '.join(lost)}; got none.")


if __name__ == "__main__":
    main()
