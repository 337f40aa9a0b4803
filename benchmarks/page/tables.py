"""The tables that are worked out, and those whose description several pages share."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.page.numbers import NOTHING, markdown, number, spread, table, walk
from benchmarks.page.tree import PROBLEMS, Found

MENG = "second, Meng et al. / second"
# A variant of the convolutional network as README.md calls it, and its network evaluations.
COSTS = {
    "order 2": ("order 2, taylor", "6"),
    "order 3": ("order 3 exact, taylor", "12"),
    'order 3, `third="laplacian"`': ("order 3 laplacian, taylor", "9"),
    "order 3, `fraction=0.25`": ("order 3 exact, fraction=1/4", "5.25"),
    "order 3, `chunks=4`": ("order 3 exact, chunks=4", "16"),
}


def known(found: Found) -> str:
    """How many of the variances that are known in closed form lie in their interval."""
    paths = "probes > * > * > *", "levels > * > * > samplers > *"
    every = [row for path in paths for _, row in walk(found, f"estimator_variance > * > {path}")]
    rows = [row for row in every if row.get("known")]
    if not rows:
        raise KeyError("estimator_variance")
    inside = sum(row["variance"][1] <= row["known"] <= row["variance"][2] for row in rows)
    return f"{inside} of {len(rows)}"


def cost(found: Found) -> str:
    """What a training step costs on the convolutional network."""
    lines = []
    for name, (key, evaluations) in COSTS.items():
        row = found["speed"]["convolutional"]["variants"][key]
        jax, memory = row.get("jax_ratio", [None])[0], row.get("memory_ratio")
        ratios = [(row["flops_ratio"], 2), (row["time_ratio"][0], 1), (memory, 1), (jax, 2)]
        cells = [NOTHING if each is None else f"{each:.{digits}f}" for each, digits in ratios]
        lines.append([name, evaluations, *cells])
    head = ["training step, order one = 1", "network evaluations (order one: 3)", "FLOPs"]
    return markdown([*head, "time", "peak memory", "time over JAX's"], lines)


class Case(NamedTuple):
    """One comparison with a peer: theirs over ours, below 1 where theirs is better."""

    peer: str
    compared: str
    place: str
    ratio: Sequence[float]
    fewer: bool = False

    def ahead(self) -> str:
        """Where and by how much the peer is ahead, empty where it is not."""
        if self.ratio[2] < 1:
            return f"{self.place}: {spread(self.ratio)}"
        return f"{self.place}: fewer evaluations" if self.fewer else ""


def cases(found: Found) -> Iterator[Case]:
    """Every comparison that was measured."""
    for (name, target, peer), row in walk(found, "likelihood > * > targets > * > *"):
        place = f"{PROBLEMS[name]}, {target}"
        if not row["ours"]:
            peer = peer.removesuffix(", exact")
            compared = "likelihood, time to a target error"
            yield Case(peer, compared, place, row["over_ours"], row["fewer_evaluations"])
    for (name, count), ratio in walk(
        found, "estimator_variance > * > scaled > Hutch++ > trace > *"
    ):
        compared = "a trace by K products, variance over that of signs"
        yield Case("Hutch++ of curvlinops", compared, f"{PROBLEMS[name]}, K = {count}", ratio)
    for (name, level), ratio in walk(found, f"gradient_variance > * > ratios > {MENG} > *"):
        place = f"{PROBLEMS[name]} at {level}"
        yield Case("second-order loss of Meng et al.", "variance of its gradient", place, ratio)
    for (name, key), row in walk(found, "speed > * > variants > order 1 or order *, taylor"):
        if "jax_ratio" in row:
            value, low, high = row["jax_ratio"]
            ratio, peer = [1 / value, 1 / high, 1 / low], "the paper's losses, jitted by JAX"
            yield Case(peer, "a training step, time", f"{name}, {key}", ratio)


def peers(found: Found) -> str:
    """Every peer at a glance, and where it is ahead by the whole of the interval."""
    by_peer: dict[str, list[Case]] = {}
    for case in cases(found):
        by_peer.setdefault(case.peer, []).append(case)
    lines = []
    for peer, every in by_peer.items():
        values = [case.ratio[0] for case in every]
        ahead = [place for case in every if (place := case.ahead())]
        span = f"{number(min(values))} to {number(max(values))}"
        lines.append([peer, every[0].compared, span, f"{len(ahead)} of {len(every)}"])
        lines[-1].append("; ".join(ahead))
    return markdown(["Peer", "Compared", "Theirs over ours", "Ahead in", "Where"], lines)


def gpu(_: Found, directory: Path = results.DIRECTORY) -> str:
    """Every file that `python -m benchmarks.gpu --out` wrote; ratios are to order one."""
    fields = {
        "ms": ("step", "ms", 1),
        "GiB": ("step", "memory", 2**30),
        "kernels": ("step", "kernels", 1),
        "ms in a CUDA graph": ("graph_given", "ms", 1),
        "ms compiled": ("compiled", "ms", 1),
    }
    lines = []
    for file in sorted(directory.glob("gpu*.json")):
        report = json.loads(file.read_text())
        where = "{card}, PyTorch {torch}, commit {commit}, {date}".format(**report["environment"])
        for each in report["tables"]:
            for key, row in each["variants"].items():
                cells = []
                for name, field, unit in fields.values():
                    value, base = (
                        (rows.get(name) or {}).get(field)
                        for rows in (row, each["variants"]["order 1"])
                    )
                    over = f" ({value / base:.2f})" if value and base else ""
                    cells.append(NOTHING if value is None else number(value / unit, 3) + over)
                error = (row.get("gradient") or {}).get("error")
                cells.append(NOTHING if error is None else f"{error:.1e}")
                head = f"{where}: batch {each['batch']}, {each['precision']}"
                lines.append([head, key, *cells])
    head = ["Card", "Variant", *fields, "error of the gradient"]
    return markdown(head, lines) if lines else "none"


SHARED = {
    "accuracy": "Data | likelihood > [!r]* > headlines"
    " | Evaluations, ours = evaluations | the recipe's = recipe > evaluations"
    " | Solver's error, ours, nats = solver_error"
    " | Standard deviation of one estimate, nats: fresh probes = noise > fixed grid, fresh signs"
    ' | fresh probes, `distribution="dct"` = noise > fixed grid, fresh dct'
    " | one probe kept, same grid = noise > fixed grid, one probe kept"
    " | Variance, kept over fresh = kept over fresh"
    " | Time of one estimate, the recipe over ours = recipe > time"
    " | Time to a given standard error, the recipe over ours = recipe > time to a standard error"
    " | turned",
    "likelihood": "One estimate for a 3×16×16 image, Steps or tolerance"
    " | likelihood > images > rows > fixed* or score* > 64 or 1e-05 | Evaluations = evaluations"
    " | Error, nats = error | of the solver = solver_error | Time of 16 images, ms = seconds",
    "modes": "Value and divergence by | divergence_mode > ours* or a pass* or f* or the*"
    " | One probe = 1 > * | Four probes = 4 > *",
}
TABLES: dict[str, Callable[[Found], str]] = {
    "peers": peers,
    "gpu": gpu,
    "known": known,
    "cost": cost,
    **{name: partial(table, described=each) for name, each in SHARED.items()},
}
