"""The section on the variance of the gradient, and its figures."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.page import figures
from benchmarks.page.markdown import NOTHING, Interval, filled, spread, table
from benchmarks.page.problems import PROBLEMS, Found, problems, title

MENG = "second, Meng et al."
TERMS = ("first", "second", "trace", "third", "third laplacian", "third sliced", MENG)
HIGHER = ("second", "trace", "third")
STYLE = dict(zip(TERMS, figures.STYLES, strict=False))
WORTH = 2 / 3  # from this share on a second probe at order two beats a batch 1.5 times as large


def several(every: dict[str, Found]) -> dict[str, Found]:
    """Those of more than one dimension. In one, signs are exact: all estimators are the same."""
    return {name: found for name, found in every.items() if found["elements"] > 1}


def terms_of(found: Found) -> tuple[str, ...]:
    """The estimators that differ."""
    return TERMS if found["elements"] > 1 else ("first", "second", "third", MENG)


def by_level(every: dict[str, Found], first: str, lines: list[list[str]]) -> str:
    """A table with a column for each level."""
    levels = next(iter(every.values()))["levels"]
    return table(["Problem", first, *(f"σ̂ = {level:g} std" for level in levels)], lines)


def noise_table(every: dict[str, Found]) -> str:
    """The noise of every term at every level."""
    lines = [
        [title(name, found), term, *(spread(each, 2) for each in found["noise"][term])]
        for name, found in every.items()
        for term in terms_of(found)
    ]
    return by_level(every, "Term", lines)


def ratios_table(every: dict[str, Found], keys: list[str]) -> str:
    """Ratios of variances at every level, where they were measured."""
    lines = [
        [title(name, found), key, *(spread(each, 2) for each in found["ratios"][key])]
        for key in keys
        for name, found in every.items()
        if key in found["ratios"]
    ]
    return by_level(every, "Variances", lines)


def shares_table(every: dict[str, Found]) -> str:
    """The share of the probes at every level."""
    lines = [
        [title(name, found), term, *(spread(each, 2) for each in found["probe share"][term])]
        for name, found in every.items()
        for term in TERMS[1:]
    ]
    return by_level(every, "Term", lines)


def samples(noise: Interval, signal: Interval) -> str:
    """The batch in which noise and mean are of one size; the interval is that of the mean."""
    value, low, high = signal
    if low <= 0:
        return NOTHING
    return spread([noise[0] ** 2 / each for each in (value, high, low)], 2)


def signal_table(every: dict[str, Found]) -> str:
    """How many samples the mean gradient takes, where it was seen at all."""
    lines = []
    for name, found in every.items():
        for term in ("first", *HIGHER):
            cells = zip(found["noise"][term], found["signal"][term], strict=True)
            lines.append([title(name, found), term, *(samples(*cell) for cell in cells)])
    return by_level(every, "Term", lines)


def places(every: dict[str, Found], key: str, *, ahead: bool) -> list[str]:
    """Where the first of a ratio has clearly the smaller variance, or clearly the larger."""
    return [
        f"{PROBLEMS[name]} at {level:g} std"
        for name, found in every.items()
        for level, (_, low, high) in zip(found["levels"], found["ratios"][key], strict=True)
        if (high < 1 if ahead else low > 1)
    ]


def meng_against_ours(every: dict[str, Found]) -> str:
    """Where which of the two losses of order two is less noisy."""
    key = f"{MENG} / second"
    theirs, ours = (places(every, key, ahead=ahead) for ahead in (True, False))
    total = sum(len(found["levels"]) for found in every.values())
    where = f": {'; '.join(theirs)}" if theirs else ""
    return (
        f"Of {total} cases theirs has clearly the less noisy gradient in {len(theirs)}{where}. "
        f"Ours has it in {len(ours)}."
    )


def quiet_from(every: dict[str, Found]) -> float | None:
    """The least level from which on every higher term is less noisy than the first everywhere."""
    levels = next(iter(every.values()))["levels"]
    quiet = None
    for i, level in reversed(list(enumerate(levels))):
        if any(
            found["noise"][term][i][0] >= found["noise"]["first"][i][0]
            for found in every.values()
            for term in HIGHER
        ):
            break
        quiet = level
    return quiet


def shares_of(every: dict[str, Found]) -> Iterator[float]:
    """The share of the probes in the higher terms of this library, exact estimator."""
    for found in several(every).values():
        for term in HIGHER:
            yield from (level[0] for level in found["probe share"][term])


def advice(every: dict[str, Found]) -> str:
    """What the share says of `probes=`."""
    shares = list(shares_of(every))
    above = sum(share > WORTH for share in shares)
    return (
        f"With one probe their share is {100 * min(shares):.0f} to {100 * max(shares):.0f} % in "
        f"the {len(shares)} cases of second, trace and third (exact estimator), and above two "
        f"thirds in {above} of them. K probes leave 1 − share + share/K of the variance. At order "
        "two they cost (1 + K)/2 times as much as one, for they share the value: K probes lessen "
        "the noise of a term more than a batch that costs as much where the share is above "
        "K/(K + 1), for two probes two thirds. At order three G costs K times as much, and a "
        "batch K times as large is never worse; it lessens the noise of order one as well."
    )


def section(tests: dict[str, Found]) -> str:
    """The section in Markdown."""
    every = problems(tests)
    pairs = ", ".join(
        f"{found['minibatches']} of {found['batch']} samples for the {PROBLEMS[name]}"
        for name, found in every.items()
    )
    parts = [
        "## How noisy are the gradients?",
        filled(
            f"""A training step sees the gradient of a minibatch. At five noise levels minibatches
            of data and noise ({pairs}) were each evaluated with two independent probe draws, one
            Rademacher probe a sample, without weights. The covariance over all of it has a trace,
            in which the difference of the two draws is the part of the probes. Scaled to a single
            sample, its root is the noise, in units of the first order's (root mean square over the
            levels, the unit taken as exact). Intervals hold 95 %, by bootstrap of the
            minibatches; with tails as heavy as those of trace and third they are rather too
            narrow. The first network was trained with order three under VP, the others with order
            one under VE. In one dimension signs are exact and all estimators of an order the
            same."""
        ),
        "![Noise of the gradient of each term against the noise level]"
        "(images/gradient_variance.png)",
        noise_table(every),
        "### Which estimator?",
        filled(
            """Ratios of the gradient's variance, below 1 where the first is the less noisy. The
            laplacian is an objective of its own (see {doc}`theory`); the sliced one has the mean
            of the exact."""
        ),
    ]
    if several(every):
        keys = ["third laplacian / third", "third sliced / third"]
        keys += [f"{term} {kind} / {term}" for kind in ("gaussian", "dct") for term in HIGHER[::2]]
        parts.append(ratios_table(several(every), keys))
    parts += [
        "### Second order: Meng et al.",
        filled(
            """Their loss (arXiv 2111.04726) has the residual D + v − (ε·v) ε + (f·v) f where ours
            has D + v − (ℓ·v) ℓ, ℓ = ε + f. Both have mean zero at the true score. With an error δ
            of f their minimiser is off by −(δ f*ᵀ + f* δᵀ + δ δᵀ), ours by δ δᵀ. They train a
            second network for it; here the Jacobian of the one network is matched in both, and
            their variance reduction by antithetic noise is not used. """
            + meng_against_ours(every)
        ),
        ratios_table(every, [f"{MENG} / second"]),
    ]
    if several(every):
        parts += [
            "### The share of the probes",
            filled(advice(every)),
            "![Share of the probes against the noise level](images/probe_share.png)",
            filled("An estimate above 1, which is chance, is cut to 1."),
            shares_table(several(every)),
        ]
    parts += [
        "### Noise against signal",
        filled(
            f"""The number of samples in a batch whose noise is of the size of the mean gradient
            (the gradient noise scale of arXiv 1812.06162), with the interval of the mean. A
            {NOTHING} stands where the mean cannot be told from zero: near the end of a training
            that is to be expected."""
        ),
        signal_table(every),
    ]
    return "\n\n".join(parts)


def draw(tests: dict[str, Found], images: Path) -> list[Path]:
    """The two figures, the second where there are random probes."""
    every = problems(tests)
    paths = [draw_noise(every, images / "gradient_variance.png")]
    if several(every):
        paths.append(draw_shares(several(every), images / "probe_share.png"))
    return paths


def draw_noise(every: dict[str, Found], path: Path) -> Path:
    """Noise against σ̂, a panel for a problem."""
    quiet = quiet_from(every)
    plain = "Noise of the gradient of each term"
    message = f"From σ̂ = {quiet or 0:g} std on, every higher term of this library is less noisy"
    message += " than the first"
    figure = figures.new(plain if quiet is None else message, 3.6 * len(every) + 1, 4.8)
    grid = figure.subplots(1, len(every), squeeze=False)[0]
    for axes, (name, found) in zip(grid, every.items(), strict=True):
        axes.set_title(title(name, found), fontsize=9)
        for term in terms_of(found):
            figures.line(axes, found["levels"], found["noise"][term], STYLE[term], term)
        axes.set_yscale("log")
        dress(axes, found)
    grid[0].set_ylabel("noise of the gradient of a sample\n[first order's, r.m.s. over σ̂]")
    figure.legend(*grid[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figures.save(figure, path)
    return path


def draw_shares(every: dict[str, Found], path: Path) -> Path:
    """Share of the probes against σ̂, a panel for a problem."""
    least = 100 * min(shares_of(every))
    figure = figures.new(
        f"With one probe, the probes make at least {least:.0f} % of the gradient's variance\n"
        "(second, trace and third)",
        3.6 * len(every) + 1,
        4.6,
    )
    grid = figure.subplots(1, len(every), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(grid, every.items(), strict=True):
        axes.set_title(title(name, found), fontsize=9)
        for term in TERMS[1:]:
            figures.line(axes, found["levels"], found["probe share"][term], STYLE[term], term)
        axes.set_ylim(0, 1.05)
        axes.axhline(WORTH, color="0.4", linewidth=1)
        told = "above, a second probe at order two pays"
        axes.annotate(told, (found["levels"][-1], WORTH - 0.06), ha="right")
        dress(axes, found)
    grid[0].set_ylabel("part of the probes in the variance [1]")
    figure.legend(*grid[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figures.save(figure, path)
    return path


def dress(axes: Axes, found: Found) -> None:
    """The axis of σ̂, and a grid."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(found["levels"]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("σ̂ [standard deviation of the data]")
    axes.grid(color="0.9")
