"""The study of the losses, of benchmarks/worth.py, benchmarks/finite.py and benchmarks/recipe.py.

A table of the pages names a row, as in `Problem | orders > * > two, averaged | KL = kl | score
error = score | seeds that lost a mode = lost`.
"""

import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from benchmarks.finite import CHANGES, compared
from benchmarks.page.numbers import Found
from benchmarks.recipe import PROBLEMS, SETTINGS
from benchmarks.worth_problems import CELLS
from benchmarks.worth_quantities import OWN, ratios

QUIET, SCORES = "one, averaged, pairs, times", "one, scores, averaged, pairs, times"
FRESH, SCORED = "fresh samples", "with scores"
# The rows that are drawn, by name.
SHOWN = {
    "one, averaged": "averaged targets",
    QUIET: "quiet batches",
    "one, scores, averaged": "averaged targets with scores",
}
MARKERS, TICKS = "os^", (0.03, 0.1, 0.3, 1)
LEAST, MOST = 0.03, 1.5  # a ratio outside is a triangle at the edge


def cells(reports: list[Found]) -> Found:
    """Every cell with a row that is compared, in the order of the study."""
    found = {report["name"]: ratios(report) for report in reports}
    done = {
        name
        for name, rows in found.items()
        if any(row.keys() & {"kl", "difference"} for row in rows.values())
    }
    return {name: found[name] for name in CELLS if name in done}


def finite(reports: list[Found]) -> Found:
    """Every cell of the study on finite data, in its order."""
    found = {report["name"]: compared(report) for report in reports}
    return {name: found[name] for name in CHANGES if name in found}


def settings(reports: list[Found]) -> Found:
    """Every cell of the recipe by its settings, in the order of that measurement."""
    by_title = {report["name"]: report for report in reports}
    return {
        name: {
            setting: ratios(by_title[title])
            for setting in SETTINGS
            if (title := f"{name}, {setting}") in by_title
        }
        for name in PROBLEMS
    }


def over_plain(report: Found) -> Found:
    """The rows of a cell over plain order one, all at rates of the cell's own where it has one."""
    rows = report["rows"]
    own = OWN if f"one{OWN}" in rows else ""
    best = {name: rows.get(name + own, row) for name, row in rows.items()}
    return ratios({"rows": best}, lambda _: "one")


def gains(study: list[Found], recipe: list[Found], limited: Found) -> Found:
    """What order one gains over the plain one, by problem and by what one has.

    `limited` is of `finite`: validation has chosen the step. Digits, whose density is not known,
    are left out.
    """
    found: Found = {name: {} for name in CELLS if not name.startswith("digits")}
    by_title = {report["name"]: over_plain(report) for report in [*study, *recipe]}
    for title, rows in limited.items():
        by_title[title] = {name.removesuffix(", choice"): row for name, row in rows.items()}
    for name, has in found.items():
        has[FRESH] = by_title.get(name, {})
        if SCORES in has[FRESH]:
            has[SCORED] = {QUIET: has[FRESH][SCORES]}
        for title, rows in by_title.items():
            if match := re.fullmatch(rf"{re.escape(name)}, (equal time.*|[\d,]+ \w+)", title):
                has[match[1]] = rows
    return {name: has for name, has in found.items() if has[FRESH]}


def picture(found: Found) -> Figure:
    """The KL divergence of each row over that of plain order one, a line for each problem."""
    found = {name: has[FRESH] for name, has in found.items() if FRESH in has}
    figure = Figure((4.65, 0.4 * len(found) + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="C5", linewidth=1)
    for i, (name, marker) in enumerate(zip(SHOWN, MARKERS, strict=True)):
        look: dict[str, Any] = {"color": f"C{i}", "ls": "none"}
        axes.plot([], [], marker, label=SHOWN[name], **look)
        for line, rows in enumerate(found.values()):
            place, row = line + 0.22 * (i - 1), rows.get(name, {})
            value, low, high = row.get("kl") or (LEAST * row.get("below", np.nan),) * 3
            if LEAST < value < MOST:
                reach = [[value - low], [high - value]]
                axes.errorbar(value, place, xerr=reach, marker=marker, ms=5, **look)
            elif not np.isnan(value):
                edge, marker_there = (LEAST, "<") if value <= LEAST else (MOST, ">")
                axes.plot(edge, place, marker_there, ms=6, clip_on=False, **look)
    axes.set(xscale="log", xlim=(LEAST, MOST))
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x")
    lines = [re.sub(r", (rotated|no predictor)$", r",\n\1", name) for name in found]
    axes.set_yticks(range(len(found)), lines)
    axes.invert_yaxis()
    figure.suptitle("KL divergence over that of plain order one", size="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    return figure
