"""The tables that are worked out, and those whose description several pages share."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.page.numbers import NOTHING, markdown, number, spread, table, walk
from benchmarks.page.tree import PROBLEMS, Found

HUTCH = "estimator_variance > * > scaled > Hutch++ > trace > *"
MENG = "gradient_variance > * > ratios > second, Meng et al. / second > *"
JAX = "speed > * > variants > order 1 or order *, taylor > jax_ratio"
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
    fewer_evaluations: bool = False

    def ahead(self) -> str:
        """Where and by how much the peer is ahead, empty where it is not."""
        if self.ratio[2] < 1:
            return f"{self.place}: {spread(self.ratio)}"
        return f"{self.place}: fewer evaluations" if self.fewer_evaluations else ""


def cases(found: Found) -> Iterator[Case]:
    """Every comparison that was measured."""
    compared = "likelihood, time to a target error"
    for (name, target, peer), row in walk(found, "likelihood > * > targets > * > *"):
        if not row["ours"]:
            place, few = f"{PROBLEMS[name]}, {target}", row["fewer_evaluations"]
            yield Case(peer.removesuffix(", exact"), compared, place, row["over_ours"], few)
    peer, compared = "Hutch++ of curvlinops", "a trace by K products, variance over that of signs"
    for (name, count), ratio in walk(found, HUTCH):
        yield Case(peer, compared, f"{PROBLEMS[name]}, K = {count}", ratio)
    peer, compared = "second-order loss of Meng et al.", "variance of its gradient"
    for (name, level), ratio in walk(found, MENG):
        yield Case(peer, compared, f"{PROBLEMS[name]} at {level}", ratio)
    peer, compared = "the paper's losses, jitted by JAX", "a training step, time"
    for (network, step), (value, low, high) in walk(found, JAX):
        yield Case(peer, compared, f"{network}, {step}", [1 / value, 1 / high, 1 / low])


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
    "modes": "Value and divergence by | divergence_mode > ours* or a pass* or f* or the*"
    " | One probe = 1 > * | Four probes = 4 > *",
}
TABLES: dict[str, Callable[[Found], str]] = {
    "peers": peers,
    "known": known,
    "cost": cost,
    **{name: partial(table, described=each) for name, each in SHARED.items()},
}
