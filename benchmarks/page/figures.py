"""The figures of the measurements, each in a version for light pages and one for dark pages.

Lines are labelled where they end and told apart by marker and dash as well as by colour.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from docs import pictures
from docs.examples import mixture_1d
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatter, NullFormatter, NullLocator

from benchmarks.page import orders
from benchmarks.page.numbers import Found, label, walk

WIDTH = 9.3  # inches, as wide as a page
MARKERS, DASHES = "os^DvP", ("-", "--", "-.", ":", "-", "--")
PROBES = ("rademacher", "gaussian", "sphere", "dct", "unit vectors")
TERMS = ("first", "trace", "second", "third")
# Methods of the likelihood, by what the label says of them; others are grey.
METHODS = {
    "fixed grid, exact": "ours, exact",
    "fixed grid, fresh signs": "ours, fresh probes",
    "torchdiffeq": "torchdiffeq, one kept",
    "torchdiffeq, exact": "torchdiffeq, exact",
}
# Solvers with the exact divergence, likewise.
SOLVERS = {
    "ours": "ours",
    "torchdiffeq, dopri5": "dopri5",
    "torchdiffeq, dopri5 in z": "dopri5 in z",
    "torchdiffeq, RK4": "RK4",
    "zuko": "zuko",
}
CALLS = (20, 140)
RATIOS = {"time": "time_ratio", "memory": "memory_ratio"}
CLAIMS = {
    "standard_error": "standard_error, one probe",
    "solver_error": "solver_error",
    "solver_error, companion": "solver_error with a companion",
}
TICKS = (0.1, 0.3, 1, 3, 10)
Points = Mapping[float, Sequence[float]]  # x → value, low, high


def draw(found: Found, images: Path) -> Iterator[Path]:
    """Draw the figures whose questions were measured."""
    for name, (question, figure) in FIGURES.items():
        for _, measured in walk(found, question):
            if measured:
                with style.context(pictures.STYLE):
                    pictures.save(figure(measured), images / f"{name}.svg")
                yield images / f"{name}.svg"


class Plain(LogFormatter):
    """Labels the ticks that LogFormatter labels, as 0.6 where that writes 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick, empty for one that has none."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def lines(axes: Axes, curves: Mapping[str, Points], names: Sequence[str]) -> None:
    """Curves with their intervals on two logarithmic axes, each labelled at its right end."""
    ends = {}
    for name, points in curves.items():
        place = names.index(name)
        look: dict[str, Any] = {"color": f"C{place}", "marker": MARKERS[place]}
        value, low, high = zip(*points.values(), strict=True)
        axes.fill_between([*points], low, high, color=look["color"], alpha=0.18, lw=0)
        axes.plot([*points], value, DASHES[place], ms=5, **look)
        ends[name] = (max(points), math.log(points[max(points)][0]), look["color"])
    axes.set(xscale="log", yscale="log")
    axes.grid()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    apart = 0.07 * float(np.diff(np.log(axes.get_ylim()))[0])
    last = -math.inf
    for name, (x, y, color) in sorted(ends.items(), key=lambda item: item[1][1]):
        last = max(y, last + apart)
        at = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (x, math.exp(last)), color=color, annotation_clip=False, **at)


def panels(
    problems: Found,
    curves: Callable[[Found], Mapping[str, Points]],
    names: Sequence[str],
    shown: Sequence[str],
    texts: Mapping[str, str],
    ticks: Sequence[float] | None = None,
) -> Figure:
    """A panel for each of the problems that are shown."""
    figure = Figure((WIDTH, 3.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown)), shown, strict=True):
        lines(axes, curves(problems[name]), names)
        axes.set(title=label(problems, name), xlabel=texts["x"])
        if ticks:
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(Plain())
    figure.axes[0].set_ylabel(texts["y"])
    figure.suptitle(texts["verdict"])
    return figure


def below(path: str, found: Found) -> dict[str, Points]:
    """The curves of a path whose two wild parts are a name and x, as in `0.1 std`."""
    points: dict[str, dict[float, Sequence[float]]] = {}
    for (name, x), interval in walk(found, path):
        points.setdefault(name, {})[float(x.split()[0])] = interval
    return points


def estimator_variance(problems: Found) -> Figure:
    """The variance of estimates of the trace over that of Rademacher probes."""
    curves = partial(below, f"over signs > {' or '.join(PROBES)} > trace > * std")
    texts = {
        "verdict": "Gaussian probes and unit vectors cost ten to hundreds of Rademacher probes",
        "x": "σ̂ [std of the data]",
        "y": "variance of the trace\n[that of Rademacher probes]",
    }
    return panels(problems, curves, PROBES, ("digits", "images"), texts, TICKS)


def gradient_variance(problems: Found) -> Figure:
    """The noise of the gradient of each term."""
    curves = partial(below, f"noise > {' or '.join(TERMS)} > *")
    texts = {
        "verdict": "Of the higher terms only the trace is as noisy as the first",
        "x": "σ̂ [std of the data]",
        "y": "noise of a sample's gradient\n[the first term's, over all σ̂]",
    }
    return panels(problems, curves, TERMS, ("digits", "images"), texts, TICKS)


def likelihood_calls(problems: Found) -> Figure:
    """The error of a likelihood against evaluations of the network."""

    def curves(found: Found) -> dict[str, Points]:
        points: dict[str, dict[float, Sequence[float]]] = {}
        for (name, _), row in walk(found, f"rows > {' or '.join(METHODS)} > *"):
            key = float(np.ravel(row["evaluations"])[0])
            points.setdefault(METHODS[name], {})[key] = row["error"]
        return points

    texts = {
        "verdict": "Fresh probes at every node err several times less than one that is kept",
        "x": "network evaluations",
        "y": "error [nats]",
    }
    return panels(problems, curves, [*METHODS.values()], ("digits", "images"), texts)


def work_precision(problems: Found) -> Figure:
    """The error of a likelihood with the exact divergence against evaluations of the network.

    Fewer or more than `CALLS`, and errors above a nat, are left out.
    """

    def curves(found: Found) -> dict[str, Points]:
        points: dict[str, dict[float, Sequence[float]]] = {}
        for (name, _), row in walk(found, "curves > * > *"):
            if CALLS[0] <= row["calls"] <= CALLS[1] and row["error"] < 1:
                points.setdefault(SOLVERS[name], {})[row["calls"]] = [row["error"]] * 3
        return points

    texts = {
        "verdict": "At 66 evaluations our error is below a hundredth of theirs, except under flow",
        "x": "network evaluations",
        "y": "error, root mean square [nats]",
    }
    shown = [f"pinwheel, {name}" for name in ("flow", "VP", "EDM")]
    return panels(problems, curves, [*SOLVERS.values()], shown, texts, (20, 50, 100))


COSTS = {
    "order 2": "order 2, taylor",
    "order 3": "order 3, taylor",
    "order 3, fraction=0.25": "order 3, fraction=1/4",
}


def cost(networks: Found) -> Figure:
    """Time and memory of a step of each loss over one of order one: the median, every network."""
    figure = Figure((WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, field) in zip(panels, RATIOS.items(), strict=True):
        for place, key in enumerate(COSTS.values()):
            path = f"* > variants > {key} > {field}"
            ratios = [np.ravel(ratio)[0] for _, ratio in walk(networks, path)]
            axes.barh(place, np.median(ratios), 0.6, color=f"C{place}", alpha=0.35)
            axes.plot(ratios, [place] * len(ratios), "o", ms=4, color=f"C{place}")
        axes.axvline(1, color="C5", linewidth=1)
        axes.set(title=title, xlabel="over that of order one", xlim=0)
    names = [*COSTS]
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return figure


def calibration(problems: Found) -> Figure:
    """How large errors are over what was claimed, and how many lie in an interval of the claim."""
    figure = Figure((WIDTH, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    nominal = np.linspace(0.02, 0.98, 49)
    for place, kind in enumerate(CLAIMS):
        ratios = np.sort(np.concatenate([np.ravel(x) for _, x in walk(problems, f"* > {kind}")]))
        look = {"color": f"C{place}", "ls": DASHES[place], "label": CLAIMS[kind]}
        left.plot(ratios, np.arange(1, len(ratios) + 1) / len(ratios), **look)
        reach = [NormalDist().inv_cdf((1 + level) / 2) for level in nominal]
        right.plot(nominal, np.searchsorted(ratios, reach, "right") / len(ratios), **look)
    left.axvline(1, color="C5", linewidth=1)
    left.set(xscale="log", xlim=(0.003, 10), xlabel="|error| / claim", ylabel="share of samples")
    left.xaxis.set_major_formatter("{x:g}")
    right.plot([0, 1], [0, 1], "C5", linewidth=1)
    right.set(xlabel="nominal coverage", ylabel="coverage")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def pytorch_fault(values: Found) -> Figure:
    """The gradient of one loss by three routes."""
    version, *_, wrong = values["autograd"].values()
    bars = {
        "differences": values["differences"]["1"],
        "hosm_losses": values["hosm_losses"]["1"],
        f"autograd,\nPyTorch {version:g}": wrong,
    }
    figure = Figure((WIDTH / 2, 2.4), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([*bars], [*bars.values()], color=["C5", "C0", "C1"])
    axes.bar_label(drawn, fmt="%.3f", padding=4)
    axes.axvline(0, color="C5", linewidth=1)
    axes.set(xlabel="gradient of the loss")
    axes.margins(x=0.35)
    axes.invert_yaxis()
    return figure


# Where the data of each figure are, and what draws it.
FIGURES: dict[str, tuple[str, Callable[[Found], Figure]]] = {
    "mixture_1d_ve": ("examples > VE, seed 0", mixture_1d.picture),
    "calibration": ("calibration", calibration),
    "cost": ("speed", cost),
    "work_precision": ("ode_accuracy", work_precision),
    "orders": ("gains", orders.picture),
    "pytorch_fault": ("examples > pytorch_fault", pytorch_fault),
    "estimator_variance": ("estimator_variance", estimator_variance),
    "gradient_variance": ("gradient_variance", gradient_variance),
    "likelihood_calls": ("likelihood", likelihood_calls),
}
