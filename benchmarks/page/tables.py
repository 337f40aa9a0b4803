"""The tables that are worked out."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.page.numbers import NOTHING, PROBLEMS, Found, markdown, number, spread, walk

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
    every = [each["known"] for each in found["estimator_variance"].values()]
    inside, total = (sum(each[key] for each in every) for key in ("inside", "all"))
    return f"{inside} of {total}"


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


TABLES: dict[str, Callable[[Found], str]] = {"peers": peers, "known": known, "cost": cost}
