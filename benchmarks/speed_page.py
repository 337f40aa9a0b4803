"""Measure every variant on every network, and make a page of it.

    python -m benchmarks.speed_page [--networks mlp unet] [--rounds N] [--smoke]
    python -m benchmarks.speed_page --page-only

The first writes benchmarks/results/NAME.json, then docs/benchmarks.md and docs/images/speed.png
from that; the second only makes the page again. --smoke measures two networks a moment, into a
temporary directory, and fails if a variant does. What is measured and how: benchmarks.speed.
"""

import argparse
import json
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.networks import NETWORKS
from benchmarks.speed import BASE, NAMES, ROOT, VARIANTS, Row, Setting, environment, measured

Report = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
DRAWN = "convolutional"
NOTHING = "–"
COMMAND = "python -m benchmarks.speed_page"


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


def rounded(found: Any) -> Any:
    """Numbers with five digits, as far down as there are any."""
    if isinstance(found, dict):
        return {key: rounded(each) for key, each in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(each) for each in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


def number(ratio: float | None) -> str:
    """A ratio with two decimals."""
    return NOTHING if ratio is None else f"{ratio:.2f}"


def spread(row: Row, key: str) -> str:
    """A ratio of times with its interval."""
    if f"{key}_ratio" not in row:
        return NOTHING
    low, high = row[f"{key}_interval"]
    ratio = number(row[f"{key}_ratio"])
    return ratio if low == high else f"{ratio} ({low:.2f} to {high:.2f})"


def quotient(rows: dict[str, Row], key: str, base: str, field: str) -> float | None:
    """A field of one variant over that of another, where there are both."""
    above, below = (rows.get(each, {}).get(field) for each in (key, base))
    return above / below if above and below else None


def filled(text: str) -> str:
    """A paragraph with its lines broken anew."""
    return textwrap.fill(" ".join(text.split()), 99, break_long_words=False)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def network_table(rows: dict[str, Row], jax: str | None) -> str:
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
        peer = spread(row, "jax") if jax else "not installed"
        lines.append([name, number(row.get("flops_ratio")), spread(row, "time"), memory, peer])
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
        for field, (most, goal) in (("time", bar.time), ("memory", bar.memory)):
            lines[-1] += [verdict(row.get(f"{field}_ratio"), most, goal), f"{most} ({goal})"]
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


def page(report: Report, path: str) -> str:
    """The page in Markdown."""
    where, networks = report["environment"], report["networks"]
    rounds = max(each["rounds"] for each in networks.values())
    versions = ", ".join(
        f"{name} {where[key] or 'not installed'}"
        for key, name in (("python", "Python"), ("torch", "PyTorch"), ("jax", "JAX"))
    )
    parts = [
        f"<!-- Written by `{COMMAND}`; change that, and not this page. -->",
        "# Benchmarks",
        filled(
            f"""A row is a variant of the loss, its numbers those of a training step, loss and
            backward pass without the optimizer, over a step of order one on the same network.
            FLOPs are those of matrix products and convolutions, counted. Time is processor time
            of one thread, the median over {rounds} rounds in which all variants take turns; in
            parentheses is a 90 % interval by bootstrap of the rounds. Memory is the peak above
            what the process held before the step, in a process of its own. "Ours / JAX" is our
            time over that of the same loss, written and compiled in JAX, in the same rounds: below
            1 ours is faster. "taylor" is the default engine."""
        ),
        filled(
            f"""Measured on {where["threads"]} core of {where["cores"]}, {where["processor"]}, load
            before {where["load_before"]}; {versions}; commit {where["commit"]}, {where["date"]}.
            Numbers are in `{path}`. To measure again (extra `benchmarks`, and JAX):"""
        ),
        f"```bash\n{COMMAND}\n```",
    ]
    if DRAWN in networks:
        parts.append(
            f"![Time against memory of every variant on the {DRAWN} network](images/speed.png)"
        )
        parts.append(f"## Targets\n\nBars are for the {DRAWN} network.")
        parts.append(targets_table(networks[DRAWN]["variants"]))
        parts.append("## Out of memory? Which knob")
        parts.append(
            filled(
                """Ratios to the same step without the knob, which is of order three, exact, where
                nothing else is said."""
            )
        )
        parts.append(knobs_table(networks))
    for name, found in networks.items():
        rows, doc = found["variants"], NETWORKS[name][0].__doc__ or ""
        base = rows[BASE]
        shape = " × ".join(map(str, found["batch"]))
        absolute = [f"{1e3 * base['seconds']:.3g} ms", f"{base['flops'] / 1e9:.3g} GFLOP"]
        if "memory" in base:
            absolute.append(f"{base['memory'] / 2**20:.3g} MiB")
        parts.append(f"## Network: {name}")
        parts.append(
            filled(
                f"""{doc.splitlines()[0]} {found["parameters"] / 1e6:.2g} million parameters, a
                batch of {shape}. A step of order one takes {", ".join(absolute)}."""
            )
        )
        parts.append(network_table(rows, where["jax"]))
    return "\n\n".join(parts) + "\n"


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


def draw_figure(rows: dict[str, Row], path: Path) -> None:
    """Draw time against memory of every variant."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for key in VARIANTS:
        row, label = rows.get(key, {}), key.removeprefix("order ")
        if "memory_ratio" not in row or "time_ratio" not in row:
            continue
        loss, _, how = label.partition(", ")
        (marker, offset), (fill, color) = MARKERS[loss], FILLS.get(how, KNOB)
        point = row["time_ratio"], row["memory_ratio"]
        axes.plot(*point, marker, color=color, fillstyle=fill, mec="black", ms=9)
        side = "left" if offset[0] > 0 else "right"
        axes.annotate(label, point, offset, textcoords="offset points", fontsize=8, ha=side)
    axes.margins(x=0.22)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.set_xlabel("processor time of a step [that of order one]")
    axes.set_ylabel("peak memory of a step [that of order one]")
    axes.grid(color="0.9")
    title = "A fraction of the batch saves time and memory, chunks save memory for time"
    figure.suptitle(f"{title}\n{DRAWN} network, order and variant beside each point")
    figure.savefig(path, dpi=110)


def write_page(results: Path, docs: Path) -> None:
    """Make the page and the figure from a file of results."""
    report = json.loads(results.read_text())
    (docs / "images").mkdir(parents=True, exist_ok=True)
    shown = f"benchmarks/results/{results.name}"
    (docs / "benchmarks.md").write_text(page(report, shown), encoding="utf-8")
    if DRAWN in report["networks"]:
        draw_figure(report["networks"][DRAWN]["variants"], docs / "images" / "speed.png")


def smoke_setting(name: str) -> Setting:
    memory, peers = ([BASE], []) if name == DRAWN else ([], [BASE])
    return Setting(rounds=1, batch=4, memory=memory, peers=peers)


def run(options: argparse.Namespace, results: Path) -> list[str]:
    """Measure, and write after every network; return what failed."""
    report: Report = {"environment": environment(), "networks": {}}
    failed = []
    for name in options.networks:
        setting = Setting(rounds=options.rounds, compiled=name in options.compile)
        found = measured(name, smoke_setting(name) if options.smoke else setting)
        report["networks"][name] = rounded(found)
        report["environment"]["threads"] = found["threads"]
        results.write_text(json.dumps(report, indent=1) + "\n")
        for key, row in found["variants"].items():
            if "failed" in row:
                failed.append(f"{name}, {key}: {row['failed']}")
    return failed


def main() -> None:
    """Measure, and make the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NAMES, help="default: all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--compile", nargs="*", choices=NAMES, default=["unet", "dit"], metavar="NETWORK"
    )
    parser.add_argument("--name", default="speed-cpu-2-cores", help="of the file of results")
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.networks = ["mlp", "convolutional"]
        with TemporaryDirectory() as directory:
            results = Path(directory) / f"{options.name}.json"
            failed = run(options, results)
            write_page(results, Path(directory))
        if failed:
            raise SystemExit("\n".join(failed))
        return
    options.networks = options.networks or list(NAMES)
    results, failed = RESULTS / f"{options.name}.json", []
    if not options.page_only:
        RESULTS.mkdir(exist_ok=True)
        failed = run(options, results)
    write_page(results, DOCS)
    print("\n".join([f"Written: docs/benchmarks.md from {results.relative_to(ROOT)}.", *failed]))


if __name__ == "__main__":
    main()
