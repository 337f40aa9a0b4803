"""One look for every figure: told apart by marker and dash as well as by colour."""

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110


class Style(NamedTuple):
    """A line that is readable in grey."""

    color: str
    marker: str
    dash: str


# Colours of Okabe and Ito, which the colour-blind can tell apart; from dark to light in grey.
STYLES = (
    Style("#000000", "o", "-"),
    Style("#0072b2", "s", "--"),
    Style("#d55e00", "^", "-."),
    Style("#009e73", "D", ":"),
    Style("#cc79a7", "v", "-"),
    Style("#e69f00", "P", "--"),
    Style("#56b4e9", "X", "-."),
    Style("#7f7f7f", "*", ":"),
)


def new(title: str, width: float = 9.0, height: float = 4.2) -> Figure:
    """An empty figure whose title is its message."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def line(axes: Axes, x: Any, estimates: Any, style: Style, label: str) -> None:
    """A line through estimates (n, 3), its band their intervals."""
    value, low, high = zip(*estimates, strict=True)
    axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
    axes.plot(x, value, style.dash, marker=style.marker, color=style.color, label=label, ms=5)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that is the same for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
