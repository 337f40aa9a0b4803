"""The section on the likelihood, its figures, and what other pages say of it."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.likelihood_methods import ADAPTIVE, DCT, EXACT, FRESH, KEPT, RECIPE
from benchmarks.page import figures
from benchmarks.page.markdown import filled, number, spread, table
from benchmarks.page.problems import PROBLEMS, Found, problems, title

# Methods by the part of their name before the comma, one style each; open markers are exact.
NAMES = (FRESH, DCT, KEPT, EXACT, ADAPTIVE)
PEERS = (RECIPE, "torchdiffeq", "k-diffusion", "diffrax", "flow_matching")


def nats(error: float) -> str:
    """An error with its unit."""
    return f"{error:g} nat" if error == 1 else f"{error:g} nats"


def setting(row: Found) -> str:
    """Steps or a tolerance."""
    value = row["setting"]
    return f"{value:.0f} steps" if row["unit"] == "steps" else f"{value:g}"


def seconds(estimate: list[float]) -> str:
    """Milliseconds with their interval."""
    return spread([1e3 * each for each in estimate])


def settings_table(found: Found) -> str:
    """Every method at every setting."""
    lines = [
        [
            ("" if row["ours"] else "*") + row["method"] + ("" if row["ours"] else "*"),
            setting(row),
            number(row["evaluations"]),
            seconds(row["seconds"]),
            spread(row["error"], 2),
            number(row["solver_error"], 2),
        ]
        for row in found["rows"]
    ]
    header = ["Method", "Setting", "Evaluations", "Time, ms", "Error, nats", "of the solver"]
    return table(header, lines)


def targets_table(found: Found) -> str:
    """The cheapest setting of every method that reaches an error."""
    lines = []
    for target in found["targets"]:
        kind = "random" if target["random"] else "exact"
        for row in target["rows"]:
            told = "" if row["ours"] else "time" if row["ahead"] else ""
            if row["fewer_evaluations"]:
                told = f"{told}, evaluations".lstrip(", ")
            lines.append(
                [
                    f"{nats(target['error'])}, {kind}",
                    row["method"],
                    setting(row),
                    number(row["evaluations"]),
                    number(1e3 * row["seconds"]),
                    spread(row["over_ours"]),
                    told,
                ]
            )
    header = [
        "Target",
        "Method",
        "Setting",
        "Evaluations",
        "Time, ms",
        "Time over ours",
        "Ahead in",
    ]
    return table(header, lines)


def described(name: str, found: Found) -> str:
    """How one problem was measured."""
    text = f"{found['samples']} samples, {found['seeds']} seeds."
    difference = found["reference_difference"]
    if difference is not None:
        text += f""" The error is the root mean square of the difference to a reference, over
            samples and seeds; the reference, with exact divergence in float64, is within
            {number(difference, 2)} nats of an independent one."""
    else:
        text += """ The error is put together from the standard deviation over seeds and the
            solver's error."""
    if found["compile_seconds"]:
        text += f" JAX had compiled for {number(found['compile_seconds'], 2)} s before."
    if name == "ring":
        text += " The score is exact, in float64, and the network costs next to nothing."
    return filled(text)


def skipped(every: dict[str, Found]) -> str:
    """Peers that did not take part."""
    told = [
        f"{peer} on the {PROBLEMS[name]} ({why})"
        for name, found in every.items()
        for peer, why in found["skipped"].items()
    ]
    return f"Left out: {'; '.join(told)}." if told else ""


def section(tests: dict[str, Found]) -> str:
    """The section in Markdown."""
    every = problems(tests)
    parts = [
        "## How wrong is a likelihood, for its calls and its time?",
        filled(
            """Every method solves the same samples of the same model from data to noise. Ours are
            `ode_nll`: on the fixed grid with fresh probes at every node or with the exact
            divergence, and adaptive with the exact divergence. "One probe kept" is the same grid
            with one probe along the path, as in most public code. Others, in italics, are called
            as their users call them, with rtol = atol, one Rademacher probe a sample kept along
            the path, or "exact" where they offer that. Evaluations are forward passes a sample,
            counted, but for diffrax six a step and three before the first; each has a pass back
            for a probe, and d passes back for the exact divergence. Time is processor time of one
            thread for the batch, the median over the seeds, for which all take turns. The solver's
            error is what the same probes give at a much finer setting, in float64. Intervals hold
            95 %."""
        ),
        filled(
            """At a target error the setting of each method that takes the least time is taken, and
            apart from it the least evaluations of any setting. A random result may be the mean of
            several estimates, as many as bring its error down to the target, with that many times
            the time and the evaluations; its solver's error stays, and has to be smaller than the
            target. An exact result has to reach it at once. "Ours" in a ratio is the fastest of
            ours of the same kind. A peer is ahead in time where the whole interval is below 1, in
            evaluations where their number is below that of each of ours."""
        ),
        "![Error against network evaluations](images/likelihood_calls.png)",
        "![Error against time](images/likelihood_time.png)",
        filled(skipped(every)),
    ]
    for name, found in every.items():
        parts += [
            f"### Likelihood: {title(name, found)}",
            described(name, found),
            targets_table(found),
            settings_table(found),
        ]
    return "\n\n".join(part for part in parts if part)


def style_of(row: Found) -> tuple[figures.Style, bool]:
    """The style of a method, and whether its markers are open."""
    names = (*NAMES, *PEERS)
    name = row["method"] if row["ours"] else row["method"].removesuffix(", exact")
    index = names.index(name)
    # Ours are lines in colour, others are grey with a marker of their own.
    if row["ours"]:
        return figures.STYLES[index], not row["random"]
    marker = figures.STYLES[index - len(NAMES)].marker
    return figures.Style("#7f7f7f", marker, "--"), not row["random"]


def draw_rows(axes: Axes, found: Found, key: str) -> None:
    """Error against a field, a line for a method."""
    names = list(dict.fromkeys(row["method"] for row in found["rows"]))
    for name in names:
        rows = [row for row in found["rows"] if row["method"] == name]
        style, open_marker = style_of(rows[0])
        x = [row[key] if key == "evaluations" else 1e3 * row[key][0] for row in rows]
        y, low, high = zip(*(row["error"] for row in rows), strict=True)
        bars = [
            [v - a for v, a in zip(y, low, strict=True)],
            [b - v for v, b in zip(y, high, strict=True)],
        ]
        axes.errorbar(
            *(x, y, bars),
            fmt=style.marker + style.dash,
            color=style.color,
            mfc="white" if open_marker else style.color,
            ms=5,
            lw=1,
            label=name,
        )
    axes.set(xscale="log", yscale="log")
    axes.grid(color="0.9")


def draw(tests: dict[str, Found], images: Path) -> list[Path]:
    """The two figures."""
    every = problems(tests)
    kept = "Fresh probes at every node make the likelihood less noisy than one kept along the path"
    fewer = all(found["headlines"]["kept over fresh"][1] > 1 for found in every.values())
    paths = []
    for key, label in (
        ("evaluations", "network evaluations"),
        ("seconds", "processor time [ms]"),
    ):
        message = kept if fewer else f"Error of the likelihood against {label}"
        figure = figures.new(message, max(9.5, 3.3 * len(every) + 1), 5.4)
        grid = figure.subplots(1, len(every), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axes, (name, found) in zip(grid, every.items(), strict=True):
            draw_rows(axes, found, key)
            axes.set_title(title(name, found), fontsize=9)
            axes.set_xlabel(label)
            shown, labels = axes.get_legend_handles_labels()
            handles |= dict(zip(labels, shown, strict=True))
        grid[0].set_ylabel("error [nats]")
        told = [f"{name} (ours)" if name in NAMES else name for name in handles]
        figure.legend(handles.values(), told, loc="outside lower center", ncols=4, fontsize=8)
        name = "calls" if key == "evaluations" else "time"
        paths.append(images / f"likelihood_{name}.png")
        figures.save(figure, paths[-1])
    return paths


def peers(tests: dict[str, Found]) -> list[list[str]]:
    """Every peer at a glance: its time over ours at a target error, and where it is ahead."""
    ratios: dict[str, list[float]] = {}
    ahead: dict[str, list[str]] = {}
    for name, found in problems(tests).items():
        for target in found["targets"]:
            for row in target["rows"]:
                if row["ours"]:
                    continue
                peer = row["method"].removesuffix(", exact")
                ratios.setdefault(peer, []).append(row["over_ours"][0])
                place = f"{PROBLEMS[name]}, {nats(target['error'])}"
                words = ["time"] * row["ahead"] + ["evaluations"] * row["fewer_evaluations"]
                if words:
                    ahead.setdefault(peer, []).append(f"{place} ({' and '.join(words)})")
    return [
        [
            f"{peer}",
            f"the likelihood: time of theirs over ours at a target error {number(min(each), 2)} "
            f"to {number(max(each), 2)}",
            "; ".join(ahead.get(peer, ["nowhere"])),
        ]
        for peer, each in ratios.items()
    ]


def advice(found: Found) -> list[tuple[str, str, str]]:
    """Which method of ours, and how many steps."""
    advised = []
    for target in found["targets"]:
        own = [row for row in target["rows"] if row["ours"] and row["method"] != KEPT]
        if not own:
            continue
        best, others = own[0], own[1:]
        told = ", ".join(
            f"{row['method']} ({setting(row)}) {number(row['over_ours'][0], 2)}" for row in others
        )
        kind = "random" if target["random"] else "exact"
        advised.append(
            (
                f"`ode_nll`, {kind}, to {nats(target['error'])} a sample",
                f"{best['method']}, {setting(best)}",
                f"{number(best['evaluations'])} evaluations in {number(1e3 * best['seconds'])} ms "
                f"for {found['samples']} samples" + (f"; times over that: {told}" if told else ""),
            )
        )
    return advised


def error_of(found: Found, method: str) -> list[float] | None:
    """The standard deviation of one estimate at 64 steps."""
    return found["headlines"]["noise"].get(method)


def accuracy(tests: Found) -> str:
    """The table of docs/likelihood.md: accuracy for 74 evaluations, beside the usual recipe."""
    every = {name: each for name, each in problems(tests).items() if name != "ring"}
    rows: dict[str, list[str]] = {}

    def put(label: str, text: str) -> None:
        rows.setdefault(label, []).append(text)

    for found in every.values():
        head = found["headlines"]
        recipe = head.get("recipe", {})
        put(
            "Evaluations, ours / the recipe, which takes two a call",
            f"{number(head['evaluations'])} / {number(recipe.get('evaluations'))}",
        )
        put("Solver's error, root mean square, ours", solver_error(found))
        for label, method in (
            ("Standard deviation of one estimate: fresh probes", FRESH),
            ('fresh probes, `distribution="dct"`', DCT),
            ("one probe kept, same grid", KEPT),
        ):
            put(label, f"{spread(error_of(found, method), 2)} nats")
        put("Variance, kept over fresh", spread(head["kept over fresh"], 2))
        put("Time of one estimate, the recipe over ours", spread(recipe.get("time"), 2))
        put(
            "Time to a given standard error, the recipe over ours",
            spread(recipe.get("time to a standard error"), 2),
        )
    return table(
        ["", *(title(name, found) for name, found in every.items())],
        [[label, *cells] for label, cells in rows.items()],
    )


def paragraph(tests: Found) -> str:
    """The paragraph of README.md, on the images."""
    found = problems(tests)["images"]
    head = found["headlines"]
    noise = {name: number(row[0], 2) for name, row in head["noise"].items()}
    text = f"""The likelihood: on a network for 3×16×16 images the {number(head["evaluations"])}
        evaluations of `ode_nll(model, x)` leave a solver error of {solver_error(found)}, and fresh
        probes at every node a standard deviation of {noise[FRESH]} nats ({noise[DCT]} with
        `distribution="dct"`) where one probe kept along the path, as in most public code, leaves
        {noise[KEPT]}."""
    if "recipe" in head:  # it is not where scipy is not installed
        times = spread(head["recipe"]["time to a standard error"], 2)
        text += f" The usual recipe takes {times} times as long to the same standard error."
    return filled(text)


def solver_error(found: Found) -> str:
    """That of 64 steps, root mean square over the samples."""
    return f"{number(found['headlines']['solver_error'], 2)} nats"
