"""The section on what a training step costs, and its figure."""

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.networks import NETWORKS
from benchmarks.page import figures
from benchmarks.page.markdown import NOTHING, filled, spread, table
from benchmarks.page.problems import by_parameter
from benchmarks.speed import BASE, VARIANTS, Row

Report = dict[str, Any]
DRAWN = "convolutional"


class Bar(NamedTuple):
    """Ratios to order one that may not be exceeded, and those hoped for."""

    flops: float
    time: tuple[float, float]
    memory: tuple[float, float]


SECOND, EXACT, LAPLACIAN = "order 2, taylor", "order 3 exact, taylor", "order 3 laplacian, taylor"
QUARTER, CHUNKS = "order 3 exact, fraction=1/4", "order 3 exact, chunks=4"
BARS = {
    SECOND: Bar(2.05, (2.5, 2.2), (3.5, 2.3)),
    EXACT: Bar(4.10, (6.0, 4.5), (8.0, 4.5)),
    LAPLACIAN: Bar(3.10, (4.4, 3.4), (6.0, 3.5)),
    "order 3 sliced, taylor": Bar(4.10, (5.5, 4.5), (8.0, 4.5)),
    QUARTER: Bar(1.80, (2.3, 1.9), (2.8, 1.9)),
}
NOISIER, OTHER = "noisier, no bias", "another objective where the Jacobian is not symmetric"
# A knob: the variant with it, the one without, and what it does to the gradient.
KNOBS = {
    "`chunks=4`": (CHUNKS, EXACT, "none"),
    "`fraction=1/4`": (QUARTER, EXACT, NOISIER),
    '`third="laplacian"`': (LAPLACIAN, EXACT, OTHER),
    "`probes=1` for 4, order 2": (SECOND, "order 2, probes=4", NOISIER),
    "`probes=1` for 4, laplacian": (LAPLACIAN, "order 3 laplacian, probes=4", NOISIER),
    "`torch.compile`": ("order 3 exact, compiled", EXACT, "none"),
}


def number(ratio: float | None) -> str:
    """A ratio with two decimals."""
    return NOTHING if ratio is None else f"{ratio:.2f}"


def quotient(rows: dict[str, Row], key: str, base: str, field: str) -> float | None:
    """A field of one variant over that of another, where there are both."""
    above, below = (rows.get(each, {}).get(field) for each in (key, base))
    return above / below if above and below else None


def network_table(rows: dict[str, Row]) -> str:
    """A row for each variant of a network."""
    lines = []
    for key, row in rows.items():
        if "seconds" not in row:
            lines.append([key, f"failed: {row['failed'].replace('|', ' ')}", *[NOTHING] * 3])
            continue
        seconds = row.get("compile_seconds")
        name = key if seconds is None else f"{key} in {seconds:.0f} s"
        memory = number(row.get("memory_ratio"))
        without = quotient(rows, CHUNKS, EXACT, "memory")
        if key == CHUNKS and without:
            memory += f" ({number(without)} of chunks=1)"
        flops = number(row.get("flops_ratio"))
        lines.append([name, flops, spread(row.get("time_ratio")), memory])
        lines[-1].append(spread(row.get("jax_ratio")))
    return table(["Variant", "FLOPs", "Time", "Memory", "Ours / JAX"], lines)


def verdict(ratio: float | None, bar: float, goal: float | None = None) -> str:
    """A ratio, and whether it meets its bar and its goal."""
    if ratio is None:
        return NOTHING
    word = "missed" if ratio > bar else "met" if goal is None or ratio > goal else "goal met"
    return f"{number(ratio)}, {word}"


def targets_table(rows: dict[str, Row]) -> str:
    """The bars beside what was reached."""
    lines = []
    for key, bar in BARS.items():
        row = rows.get(key, {})
        flops = [verdict(row.get("flops_ratio"), bar.flops), f"{bar.flops:.2f}"]
        lines.append([key, *flops])
        time = row.get("time_ratio", [None])[0]
        for ratio, (most, goal) in ((time, bar.time), (row.get("memory_ratio"), bar.memory)):
            lines[-1] += [verdict(ratio, most, goal), f"{most} ({goal})"]
    header = ["Variant", "FLOPs", "bar", "Time", "bar (goal)", "Memory", "bar (goal)"]
    return table(header, lines)


def knobs_table(networks: dict[str, Report]) -> str:
    """What each knob does to time and memory."""
    names = [name for name in (DRAWN, "unet") if name in networks]
    every = [networks[name]["variants"] for name in names]
    lines = []
    for knob, (key, base, gradient) in KNOBS.items():
        cells = [
            number(quotient(rows, key, base, field))
            for rows in every
            for field in ("seconds", "memory")
        ]
        if set(cells) != {NOTHING}:
            lines.append([knob, gradient, *cells])
    lines.append(["bfloat16 by `torch.autocast`", "rounded", *["not measured"] * 2 * len(names)])
    fields = [f"{field}, {name}" for name in names for field in ("time", "memory")]
    return table(["Knob", "Change of the gradient", *fields], lines)


def networks_of(tests: dict[str, Report]) -> dict[str, Report]:
    """The tests of all variants in turns, by the name of their network."""
    found = by_parameter(tests)
    return {name: found[name] for name in NETWORKS if name in found}


def is_default(key: str) -> bool:
    """Whether a variant is what a user gets who chooses no engine."""
    return key == BASE or "taylor" in key


def ahead(networks: dict[str, Report], *, default: bool) -> list[str]:
    """Where the loss in JAX takes less time than ours, interval and all."""
    return [
        f"{name}, {key}: {spread(row['jax_ratio'])}"
        for name, found in networks.items()
        for key, row in found["variants"].items()
        if is_default(key) == default and row.get("jax_ratio", [0, 0])[1] > 1
    ]


def section(tests: dict[str, Report]) -> str:
    """The section in Markdown."""
    networks = networks_of(tests)
    rounds = sorted({each["rounds"] for each in networks.values()})
    parts = [
        "## What does a training step cost?",
        filled(
            f"""A row is a variant of the loss, its numbers those of a training step, loss and
            backward pass without the optimizer, over a step of order one on the same network.
            FLOPs are those of matrix products and convolutions, counted. Time is processor time
            of one thread, the median over {", ".join(map(str, rounds))} rounds in which all
            variants take turns; in parentheses is a 95 % interval by bootstrap of the rounds.
            Memory is the peak above what the process held before the step, in a process of its
            own. "Ours / JAX" is our time over that of the same loss, written and compiled in JAX,
            in the same rounds: below 1 ours is faster. "taylor" is the default engine."""
        ),
    ]
    slower = {default: "; ".join(ahead(networks, default=default)) for default in (True, False)}
    told = f"""JAX is faster, by the whole of the interval, than the default engine at:
        {slower[True] or "nothing"}."""
    if slower[False]:
        told += f" Than other engines: {slower[False]}."
    parts.append(filled(told))
    if not any(
        "jax_ratio" in row for each in networks.values() for row in each["variants"].values()
    ):
        parts.append("JAX is not installed, so that its column is empty.")
    if DRAWN in networks:
        rows = networks[DRAWN]["variants"]
        parts += [
            f"![Time against memory of every variant on the {DRAWN} network](images/speed.png)",
            f"### Targets\n\nBars are for the {DRAWN} network.",
            targets_table(rows),
            "### Out of memory? Which knob",
            filled(
                """Ratios to the same step without the knob, which is of order three, exact, where
                nothing else is said."""
            ),
            knobs_table(networks),
        ]
    for name, found in networks.items():
        parts += network_parts(name, found)
    return "\n\n".join(parts)


def network_parts(name: str, found: Report) -> list[str]:
    """Heading, description and table of one network."""
    rows, doc = found["variants"], NETWORKS[name][0].__doc__ or ""
    base = rows[BASE]
    absolute = [f"{1e3 * base['seconds']:.3g} ms", f"{base['flops'] / 1e9:.3g} GFLOP"]
    if "memory" in base:
        absolute.append(f"{base['memory'] / 2**20:.3g} MiB")
    described = filled(
        f"""{doc.splitlines()[0]} {found["parameters"] / 1e6:.2g} million parameters, a batch of
        {" × ".join(map(str, found["batch"]))}. A step of order one takes {", ".join(absolute)}."""
    )
    return [f"### Network: {name}", described, network_table(rows)]


# Shapes are losses, each with a side for its label; fills are engines.
MARKERS = {
    "1": ("*", (8, -3)),
    "2": ("o", (8, -3)),
    "3 exact": ("s", (8, -9)),
    "3 laplacian": ("^", (8, 3)),
    "3 sliced": ("D", (-8, 4)),
}
FILLS = {
    "taylor": ("full", "#0072b2"),
    "reverse": ("left", "#e69f00"),
    "forward": ("none", "white"),
    "": ("full", "black"),
}
KNOB = ("bottom", "#0072b2")


def draw(tests: dict[str, Report], images: Path) -> list[Path]:
    """Time against memory of every variant, where both were measured."""
    rows = networks_of(tests).get(DRAWN, {"variants": {}})["variants"]
    points = {
        key: (rows[key]["time_ratio"][0], rows[key]["memory_ratio"])
        for key in VARIANTS
        if {"time_ratio", "memory_ratio"} <= rows.get(key, {}).keys()
    }
    if not points:
        return []
    title = "A fraction of the batch saves time and memory, chunks save memory for time"
    figure = figures.new(f"{title}\n{DRAWN} network, order and variant beside each point", 9, 6)
    axes = figure.subplots()
    for key, point in points.items():
        label = key.removeprefix("order ")
        loss, _, how = label.partition(", ")
        (marker, offset), (fill, color) = MARKERS[loss], FILLS.get(how, KNOB)
        axes.plot(*point, marker, color=color, fillstyle=fill, mec="black", ms=9)
        side = "left" if offset[0] > 0 else "right"
        axes.annotate(label, point, offset, textcoords="offset points", fontsize=8, ha=side)
    axes.margins(x=0.22)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.set_xlabel("processor time of a step [that of order one]")
    axes.set_ylabel("peak memory of a step [that of order one]")
    axes.grid(color="0.9")
    figures.save(figure, images / "speed.png")
    return [images / "speed.png"]
