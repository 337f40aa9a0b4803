"""The section on the variance of estimators, and its figures."""

from pathlib import Path

from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from benchmarks.page import figures
from benchmarks.page.markdown import filled, number, spread, table
from benchmarks.page.problems import Found, problems, title

TERMS = {"trace": "trace", "Frobenius": "order two", "third": "order three"}
SAMPLERS = ("rademacher", "dct", "sphere", "gaussian", "unit vectors")
SWEPT = ("rademacher", "dct", "gaussian", "orthogonal", "unit vectors", "Hutch++")
STYLE = dict(zip((*SAMPLERS, "orthogonal", "Hutch++"), figures.STYLES, strict=False))
ROUNDING = 1e-6


def over_rademacher(found: Found, term: str, sampler: str) -> list[list[float]]:
    """Ratio of variances at every level, an interval each."""
    return [level[term]["samplers"][sampler]["over_rademacher"] for level in found["levels"]]


def middle(found: Found) -> Found:
    """The level at which the number of probes is varied."""
    return min(found["levels"], key=lambda level: abs(level["level"] - 1))


def known_rows(tests: dict[str, Found]) -> list[Found]:
    """Every variance that is known in closed form."""
    rows = []
    for found in tests.values():
        for level in found["levels"]:
            rows += [row for term in TERMS for row in level[term]["samplers"].values()]
        for samplers in found["probes"].values():
            rows += [row for each in samplers.values() for row in each.values()]
    return [row for row in rows if row.get("known")]


def reproduced(tests: dict[str, Found]) -> str:
    """How the measured variances agree with those known."""
    rows = known_rows(tests)
    inside = sum(row["variance"][1] <= row["known"] <= row["variance"][2] for row in rows)
    worst = max(abs(row["standard_errors"]) for row in rows)
    return (
        f"Of {len(rows)} variances that are known in closed form {inside} lie in their 95 % "
        f"interval ({100 * inside / len(rows):.0f} %), and none is off by more than "
        f"{worst:.1f} standard errors; the benchmark fails at five."
    )


def ratios_table(every: dict[str, Found]) -> str:
    """A row for a problem and a term, at the middle level."""
    lines = []
    for name, found in every.items():
        for term, label in TERMS.items():
            row = middle(found)[term]["samplers"]
            cells = [
                "1" if sampler == "rademacher" else spread(row[sampler]["over_rademacher"], 2)
                for sampler in SAMPLERS
            ]
            lines.append([title(name, found), label, number(row["rademacher"]["variance"][0])])
            lines[-1] += cells
    return table(["Jacobian of", "Term", "Variance, signs", *SAMPLERS], lines)


def levels_table(every: dict[str, Found]) -> str:
    """The trace at every level."""
    lines = []
    for name, found in every.items():
        for sampler in SAMPLERS[1:4]:
            ratios = over_rademacher(found, "trace", sampler)
            lines.append([title(name, found), sampler, *(spread(ratio, 2) for ratio in ratios)])
    levels = next(iter(every.values()))["levels"]
    header = ["Jacobian of", "Probes", *(f"σ̂ = {level['level']:g} std" for level in levels)]
    return table(header, lines)


def rounded(ratio: float) -> float:
    """A ratio, zero where it is rounding."""
    return 0.0 if ratio < ROUNDING else ratio


def efficiencies(found: Found, term: str, sampler: str) -> dict[int, list[float]]:
    """K times the variance at K, over that of one Rademacher probe."""
    one = found["probes"][term]["rademacher"]["1"]["variance"][0]
    rows = found["probes"][term].get(sampler, {})
    return {
        int(count): [rounded(int(count) * each / one) for each in row["variance"]]
        for count, row in rows.items()
    }


def probes_table(every: dict[str, Found]) -> str:
    """K Var(K) of the trace."""
    lines, counts = [], (1, 4, 16, 64)
    for name, found in every.items():
        if found["elements"] < 64:
            continue
        for sampler in SWEPT:
            rows = efficiencies(found, "trace", sampler)
            cells = [spread(rows.get(count, rows.get(count - count % 3)), 2) for count in counts]
            if rows:
                lines.append([title(name, found), sampler, *cells])
    return table(["Jacobian of", "Probes", *(f"K = {count}" for count in counts)], lines)


def largest_ratio(every: dict[str, Found], term: str, samplers: tuple[str, ...]) -> float:
    """The most by which samplers differ from Rademacher probes, where d is 64 or more."""
    ratios = [
        ratio[0]
        for found in every.values()
        if found["elements"] >= 64
        for sampler in samplers
        for ratio in over_rademacher(found, term, sampler)
    ]
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def section(tests: dict[str, Found]) -> str:
    """The section in Markdown."""
    every = problems(tests)
    others = ("gaussian", "sphere", "dct")
    factors = {term: number(largest_ratio(every, term, others), 2) for term in TERMS}
    return "\n\n".join(
        [
            "## Which probes? The variance of the estimators",
            filled(
                """A probe v estimates a trace by vᵀ A v (the likelihood), a Frobenius norm by
                ‖M v‖² (order two), and the vector of the third residual by r3(v) (order three; its
                variance is summed over elements). All are quadratic forms, so that their variances
                are known where the forms are: for signs Σ_{i<j} (B_ij + B_ji)², for Gaussian
                probes 2 ‖(B + Bᵀ)/2‖²_F, and those of `hosm_losses.probes`. """
                + reproduced(tests)
            ),
            filled(
                f"""The numbers are variances over that of Rademacher probes (signs), with 95 %
                intervals by bootstrap; below 1 is better than signs. Up to d = 64 all is exact but
                the sampling of probes; the Jacobian of a network is taken along all unit vectors.
                Of {", ".join(others)} probes at d of 64 or more and all noise levels, none differs
                from signs by more than {factors["third"]} times in order three and
                {factors["Frobenius"]} times in order two, but by up to {factors["trace"]} times in
                the trace."""
            ),
            "![Variance of probes over that of signs against the noise level]"
            "(images/estimator_variance.png)",
            "At σ̂ equal to the standard deviation of the data, one probe:",
            ratios_table(every),
            "The trace at five noise levels:",
            levels_table(every),
            "### How many probes?",
            filled(
                """K times the variance of the mean over K probes, over the variance of one
                Rademacher probe: 1 where K probes divide the variance by K. "orthogonal" are
                directions of a QR decomposition, "unit vectors" are drawn without replacement,
                Hutch++ is that of curvlinops with K matrix products, rounded down to a multiple of
                three. Rademacher, dct and gaussian probes are independent."""
                if "Hutch++" in str(every)
                else """K times the variance of the mean over K probes, over the variance of one
                Rademacher probe: 1 where K probes divide the variance by K. Hutch++ is left out:
                curvlinops-for-pytorch is not installed."""
            ),
            "![K times the variance of K probes](images/number_of_probes.png)",
            probes_table(every),
        ]
    )


def draw(tests: dict[str, Found], images: Path) -> list[Path]:
    """The two figures."""
    every = {name: found for name, found in problems(tests).items() if found["elements"] >= 64}
    return [
        draw_levels(every, images / "estimator_variance.png"),
        draw_counts(every, images / "number_of_probes.png"),
    ]


def draw_levels(every: dict[str, Found], path: Path) -> Path:
    """Variance over that of signs, a row for a term and a column for a problem."""
    others = ("gaussian", "sphere", "dct")
    few = all(largest_ratio(every, term, others) < 3 for term in ("Frobenius", "third"))
    many = largest_ratio(every, "trace", others) > 10
    message = "The distribution of the probes matters for the trace, little for the losses"
    plain = "Variance of one probe over that of Rademacher probes"
    figure = figures.new(message if few and many else plain, 2.6 * len(every) + 2, 7.2)
    grid = figure.subplots(len(TERMS), len(every), sharex=True, sharey="row", squeeze=False)
    for axes, (name, found) in zip(grid[0], every.items(), strict=True):
        axes.set_title(title(name, found), fontsize=9)
    for row, (term, label) in zip(grid, TERMS.items(), strict=True):
        for axes, found in zip(row, every.values(), strict=True):
            levels = [level["level"] for level in found["levels"]]
            for sampler in SAMPLERS:
                ratios = over_rademacher(found, term, sampler)
                figures.line(axes, levels, ratios, STYLE[sampler], sampler)
            axes.set(xscale="log", yscale="log")
            axes.xaxis.set_major_locator(FixedLocator(levels))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if term == "trace" else (1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(color="0.9")
        row[0].set_ylabel(f"{label}: variance\n[that of signs]")
    for axes in grid[-1]:
        axes.set_xlabel("σ̂ [standard deviation of the data]")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figures.save(figure, path)
    return path


def draw_counts(every: dict[str, Found], path: Path) -> Path:
    """K times the variance of a trace against K, a panel for a problem."""
    independent = [
        row[0]
        for found in every.values()
        for sampler in ("orthogonal", "Hutch++")
        for count, row in efficiencies(found, "trace", sampler).items()
        if count <= found["elements"] / 8
    ]
    message = "Orthogonal directions and Hutch++ gain nothing until K is a good part of d"
    plain = "Trace: K times the variance of K probes"
    figure = figures.new(message if min(independent) > 0.8 else plain, 2.6 * len(every) + 2, 3.8)
    grid = figure.subplots(1, len(every), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(grid, every.items(), strict=True):
        for sampler in SWEPT:
            rows = efficiencies(found, "trace", sampler)
            if rows:
                figures.line(axes, list(rows), rows.values(), STYLE[sampler], sampler)
        axes.set(xscale="log", yscale="log", ylim=(0.1, 300))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(FixedLocator([1, 4, 16, 64]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(color="0.9")
        axes.set_xlabel("K, matrix products")
        axes.set_title(title(name, found), fontsize=9)
    grid[0].set_ylabel("K · variance of the trace\n[variance of one sign probe]")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figures.save(figure, path)
    return path
