"""The study of targets and orders, of benchmarks/worth.py and benchmarks/recipe.py.

A row is compared with that of the same seeds which differs in one respect: targets with plain
order one, orders with order one under the same targets, second stages with order one continued.
A table of the pages names a row, as in `Problem | orders > * > two, averaged | KL = kl | score
error = score | seeds that lost a mode = lost`.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.page.numbers import Found
from benchmarks.recipe import SETTINGS
from benchmarks.worth import SEARCHED
from benchmarks.worth_problems import CELLS
from benchmarks.worth_quantities import compare, lost

# The rows that are drawn, by name.
SHOWN = {
    "one, averaged": "averaged targets, over plain",
    "one, scores": "target scores, over plain",
    "one, scores, averaged": "both, over plain",
    "two, averaged": "order two, over order one (both averaged)",
    "three, averaged": "order three, over order one (both averaged)",
}
MARKERS = "os^DP"
LEAST, MOST = 0.01, 5  # a ratio outside is a triangle at the edge


def base(name: str) -> str:
    """The row that a row is compared with."""
    if name.startswith("after"):
        return "after: one, averaged"
    if name.startswith("one"):
        return "one"
    return "one, scores, averaged" if "scores" in name else "one, averaged"


def ratios(report: Found) -> Found:
    """Of each row of a cell: nats, the ratios to its base, and how many seeds lost a mode.

    A ratio is None where fewer than two seeds kept all modes, or where a KL divergence, a mean
    over points, is not above 0: then "below" is 1.
    """
    rows = {name: row for name, row in report["rows"].items() if "lost" in row}
    found: Found = {}
    for name, row in rows.items():
        found[name] = {"nats": float(np.mean(row["kl"])), "lost": int(lost(row).sum())}
        other = rows.get(base(name), row)
        if other is row:
            continue
        for key, estimate in compare(row, other).items():
            found[name][key] = None if np.isnan(estimate.value) else [*estimate]
        if found[name]["kl"] is None and np.sum(~lost(row) & ~lost(other)) > 1:
            found[name]["below"] = 1
    return found


def cells(reports: list[Found]) -> Found:
    """Every cell with a row that is compared, in the order of the study."""
    found = {report["name"]: ratios(report) for report in reports}
    done = {name for name, rows in found.items() if any("kl" in row for row in rows.values())}
    return {name: found[name] for name in CELLS if name in done}


def settings(reports: list[Found]) -> Found:
    """Every cell of the recipe by its settings, in the order of that measurement."""
    by_title = {report["name"]: report for report in reports}
    return {
        name: {
            setting: ratios(by_title[title])
            for setting in SETTINGS
            if (title := f"{name}, {setting}") in by_title
        }
        for name in SEARCHED
    }


def picture(found: Found) -> Figure:
    """KL divergence and score error of each row over its base, a line for each problem."""
    figure = Figure((9.3, 0.45 * len(found) + 2.2), layout="constrained")
    titles = {"kl": "KL divergence", "score": "error of the ODE's score"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.axvline(1, color="C5", linewidth=1)
        for i, (name, marker) in enumerate(zip(SHOWN, MARKERS, strict=True)):
            look: dict[str, Any] = {"color": f"C{i}", "ls": "none"}
            axes.plot([], [], marker, label=SHOWN[name], **look)
            for line, rows in enumerate(found.values()):
                place, row = line + 0.14 * (i - 2), rows.get(name, {})
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
