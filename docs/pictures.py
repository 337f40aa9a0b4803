"""The look of every picture: one style, with a version for light and for dark pages."""

import re
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

STYLE = Path(__file__).parent / "examples" / "style.mplstyle"
# The colours of the style, and the colours that replace them on dark pages.
DARK = {
    "#1f2328": "#e6edf3",  # text
    "#656d76": "#9aa4ae",  # C5, and the lines of axes
    "#005a9c": "#6cb6ff",
    "#b44400": "#ff9a5c",
    "#00704e": "#4ccb9a",
    "#9a3676": "#f0a3d0",
    "#7d5700": "#e3b341",
}
COLOUR = re.compile("|".join(DARK))


def dark(path: Path) -> Path:
    """Return the path of the dark version of a picture."""
    return path.with_stem(f"{path.stem}-dark")


def save(figure: Figure, path: Path) -> None:
    """Write both versions of a figure that was drawn in the style."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    text = COLOUR.sub(lambda match: DARK[match[0]], path.read_text("utf-8"))
    dark(path).write_text(text, "utf-8")


def scrape(_: Any, variables: dict[str, Any], gallery: dict[str, Any]) -> str:
    """Save the figures of a part of a tutorial, and return the markup that shows them."""
    shown = ""
    for number in pyplot.get_fignums():
        figure = pyplot.figure(number)
        path = Path(next(variables["image_path_iterator"])).with_suffix(".svg")
        save(figure, path)
        title = figure.get_suptitle() or figure.axes[0].get_title()
        place = path.relative_to(gallery["src_dir"]).as_posix()
        shown += f"\n.. image:: /{place}\n   :alt: {' '.join(title.split())}\n"
    pyplot.close("all")
    return shown
