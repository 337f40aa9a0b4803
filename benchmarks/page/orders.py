"""The study of the losses, of benchmarks/worth.py, benchmarks/finite.py and benchmarks/recipe.py.

A table of the pages names a row, as in `Problem | orders > * > two, averaged | KL = kl | score
error = score | seeds that lost a mode = lost`.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.finite import CHANGES, compared
from benchmarks.page.numbers import Found
from benchmarks.recipe import PROBLEMS, SETTINGS
from benchmarks.worth_problems import CELLS
from benchmarks.worth_quantities import ratios

# The rows that are drawn, by name.
SHOWN = {
    "one, averaged": "averaged targets, over plain",
    "one, averaged, pairs, times": "quiet batches, over averaged targets",
    "one, scores": "target scores, over plain",
    "one, scores, averaged": "both, over plain",
    "two, averaged": "order two, over order one (both averaged)",
    "three, averaged": "order three, over order one (both averaged)",
}
MARKERS = "ovs^DP"
LEAST, MOST = 0.01, 5  # a ratio outside is a triangle at the edge


def with_plain(report: Found) -> Found:
    """The ratios of each row, and that of its KL divergence to plain order one as "plain"."""
    plain = ratios(report, lambda _: "one")
    return {name: row | {"plain": plain[name].get("kl")} for name, row in ratios(report).items()}


def cells(reports: list[Found]) -> Found:
    """Every cell with a row that is compared, in the order of the study."""
    found = {report["name"]: with_plain(report) for report in reports}
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
            setting: with_plain(by_title[title])
            for setting in SETTINGS
            if (title := f"{name}, {setting}") in by_title
        }
        for name in PROBLEMS
    }


def picture(found: Found) -> Figure:
    """KL divergence and score error of each row over its base, a line for each problem."""
    found = {
        name: rows for name, rows in found.items() if any("kl" in row for row in rows.values())
    }
    figure = Figure((9.3, 0.45 * len(found) + 2.2), layout="constrained")
    titles = {"kl": "KL divergence", "score": "error of the ODE's score"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.axvline(1, color="C5", linewidth=1)
        for i, (name, marker) in enumerate(zip(SHOWN, MARKERS, strict=True)):
            look: dict[str, Any] = {"color": f"C{i}", "ls": "none"}
            axes.plot([], [], marker, label=SHOWN[name], **look)
            for line, rows in enumerate(found.values()):
                place, row = line + 0.13 * (i - 2.5), rows.get(name, {})
                value, low, high = row.get(key) or (LEAST * row.get("below", np.nan),) * 3
                if LEAST < value < MOST:
                    reach = [[value - low], [high - value]]
                    axes.errorbar(value, place, xerr=reach, marker=marker, ms=4, **look)
                elif not np.isnan(value):
                    edge, marker_there = (LEAST, "<") if value <= LEAST else (MOST, ">")
                    axes.plot(edge, place, marker_there, ms=6, clip_on=False, **look)
        axes.set(title=title, xscale="log", xlim=(LEAST, MOST), xlabel="ratio; below 1 is better")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_yticks(range(len(found)), [*found])
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
