"""Every figure, in one look: told apart by marker and dash as well as by colour.

A page shows them about 930 pixels wide, where their text is as large as that of the page.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatter, NullLocator

from benchmarks.page import study
from benchmarks.page.numbers import Found, label, walk

DPI, WIDTH, TEXT = 150, 9.3, {"font.size": 11.5, "axes.titlesize": "medium"}
PROBES = ("rademacher", "gaussian", "sphere", "dct", "unit vectors")
TERMS = ("first", "second", "trace", "third", "third laplacian")
# In the likelihood ours are in colour and others grey, by a part of their names.
OURS = ("fresh signs", "fresh dct", "one probe kept", "grid, exact", "adaptive")
PEERS = ("score_sde", "torchdiffeq", "k-diffusion", "flow_matching")
Points = Mapping[float, Sequence[float]]  # x → value, low, high

# Colours of Okabe and Ito, which the colour-blind can tell apart; from dark to light in grey.
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS, DASHES = "os^DvP", ("-", "--", "-.", ":", "-", "--")


def style(order: Sequence[str], name: str) -> dict[str, str]:
    """A line that is readable in grey, by the place of its name."""
    index = order.index(name)
    return {"color": COLORS[index], "marker": MARKERS[index], "linestyle": DASHES[index]}


def draw(found: Found, images: Path) -> Iterator[Path]:
    """Draw the figures whose questions were measured."""
    for name, (question, figure) in FIGURES.items():
        if question in found:
            path = images / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without the version of matplotlib the file is the same for the same numbers.
            with rc_context(TEXT):
                figure(found[question]).savefig(path, dpi=DPI, metadata={"Software": None})
            yield path


class Plain(LogFormatter):
    """Labels the ticks that LogFormatter labels, as 0.6 where that writes 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick, empty for one that has none."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def panels(
    problems: Found,
    rows: Mapping[str, Callable[[Found], Mapping[str, Points]]],
    xlabel: str,
    *,
    least: int = 1,
    styles: Callable[[str], dict[str, str]],
    ticks: Sequence[float] | None = None,
) -> Figure:
    """A panel for each problem and quantity, a row for each of several quantities."""
    problems = {name: each for name, each in problems.items() if each["elements"] >= least}
    columns, sharey = (len(problems), "row") if len(rows) > 1 else (2, "none")
    lines = math.ceil(len(rows) * len(problems) / columns)
    figure, shown = Figure((WIDTH, 3.1 * lines + 1), layout="constrained"), {}
    grid = figure.subplots(lines, columns, sharey=sharey, squeeze=False)
    for i, ((ylabel, curves), (name, found)) in enumerate(product(rows.items(), problems.items())):
        axes = grid.flat[i]
        if i % columns == 0:
            axes.set_ylabel(ylabel)
        if i < columns or len(rows) == 1:
            title = label(problems, name)
            wrapped = title.replace(" on ", "\non ").replace(", ", "\n")
            axes.set_title(wrapped if columns > 2 else title)
        if i >= columns * (lines - 1):
            axes.set_xlabel(xlabel)
        for curve, points in curves(found).items():
            look = styles(curve)
            value, low, high = zip(*points.values(), strict=True)
            axes.fill_between([*points], low, high, color=look["color"], alpha=0.18, lw=0)
            shown[curve] = axes.plot([*points], value, ms=5, **look)[0]
        axes.set(xscale="log", yscale="log")
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter(Plain())
        if ticks:
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="0.9")
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3)
    return figure


def below(path: str) -> Callable[[Found], dict[str, Points]]:
    """The curves of a path whose two wild parts are a name and x, as in `0.1 std`."""

    def curves(found: Found) -> dict[str, Points]:
        points: dict[str, dict[float, Sequence[float]]] = {}
        for (name, x), interval in walk(found, path):
            points.setdefault(name, {})[float(x.split()[0])] = interval
        return points

    return curves


def against(field: str, unit: float = 1) -> Callable[[Found], dict[str, Points]]:
    """The curves of the error of a likelihood, against a field of its rows."""

    def curves(found: Found) -> dict[str, Points]:
        points: dict[str, dict[float, Sequence[float]]] = {}
        for (name, _), row in walk(found, "rows > * > *"):
            points.setdefault(name, {})[unit * np.ravel(row[field])[0]] = row["error"]
        return points

    return curves


def method_style(name: str) -> dict[str, str]:
    """Ours in colour, others grey; hollow where the divergence is exact."""
    ours = name.startswith(("fixed", "adaptive"))
    order = OURS if ours else PEERS
    look = style(order, next(part for part in order if part in name))
    fill = {"fillstyle": "none" if name.endswith("exact") else "full"}
    return look | fill | ({} if ours else {"color": "#7f7f7f", "linestyle": "--"})


def worth(found: Found) -> Figure:
    """KL divergence and score error over those of order one, a line for each problem."""
    cells = study.densities(found)
    figure = Figure((WIDTH, 0.55 * len(cells) + 2), layout="constrained")
    titles = {"kl": "KL divergence", "score": "error of the ODE's score"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for i, loss in enumerate(study.SHOWN):
            rows = {
                place: study.ratio(report, loss)[key]
                for place, report in enumerate(cells.values())
                if loss in study.judged(report)
            }
            if rows:
                value, low, high = np.transpose([*rows.values()])
                reach = np.abs([value - low, high - value])
                look = {**style([*study.SHOWN], loss), "linestyle": "none", "capsize": 2}
                places = np.array([*rows]) + (i - 1) / 5
                axes.errorbar(value, places, xerr=reach, label=study.SHOWN[loss], **look)
        axes.set(title=title, xscale="log", xlabel="over that of order one, at equal cost")
        low, _ = axes.get_xlim()
        axes.axvspan(low, 1, color="0.93", zorder=0)
        axes.axvline(1, color="0.4", linewidth=1)
        axes.set_xlim(low)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(Plain())
    names = [f"{name}{'' if cells[name]['converged'] else '*'}" for name in cells]
    figure.axes[0].set_yticks(range(len(cells)), names)
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


SIGNS = f"over signs > {' or '.join(PROBES)}"
OVER_SIGNS = {
    f"{title}: variance\n[that of signs]": below(f"{SIGNS} > {term} > * std")
    for title, term in (("trace", "trace"), ("order two", "Frobenius"), ("order three", "third"))
}
NOISE = {
    "noise of the gradient of a sample\n[first order's, r.m.s. over σ̂]": below(
        f"noise > {' or '.join(TERMS)} > *"
    )
}
LEVEL = {"xlabel": "σ̂ [std of the data]", "ticks": (0.1, 0.3, 1, 3, 10)}
CALLS = {"rows": {"error [nats]": against("evaluations")}, "xlabel": "network evaluations"}
TIMES = {"rows": {"error [nats]": against("seconds", 1e3)}, "xlabel": "processor time [ms]"}
# The question, and what draws it; `least` is a number of dimensions.
FIGURES: dict[str, tuple[str, Callable[[Found], Figure]]] = {
    "estimator_variance": (
        "estimator_variance",
        partial(panels, rows=OVER_SIGNS, least=64, styles=partial(style, PROBES), **LEVEL),
    ),
    "gradient_variance": (
        "gradient_variance",
        partial(panels, rows=NOISE, styles=partial(style, TERMS), **LEVEL),
    ),
    "likelihood_calls": ("likelihood", partial(panels, **CALLS, styles=method_style)),
    "likelihood_time": ("likelihood", partial(panels, **TIMES, styles=method_style)),
    "worth": ("study", worth),
}
