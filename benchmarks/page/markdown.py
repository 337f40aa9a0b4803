"""Pieces of the pages in Markdown."""

import textwrap
from collections.abc import Sequence

NOTHING = "–"
WIDTH = 99
Interval = Sequence[float]  # value, low, high: an Estimate as JSON has it


def filled(text: str) -> str:
    """A paragraph with its lines broken anew."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, never in powers of ten below 100,000."""
    if value is None:
        return NOTHING
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < 1e5 else text


def spread(estimate: Interval | None, digits: int = 3) -> str:
    """A number with its interval in parentheses."""
    if estimate is None:
        return NOTHING
    value, low, high = (number(each, digits) for each in estimate)
    return value if low == high else f"{value} ({low} to {high})"
