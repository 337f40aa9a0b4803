"""The tables that are worked out."""

from collections.abc import Callable, Sequence

from benchmarks.page.numbers import PROBLEMS, Found, markdown, number, spread, walk
from benchmarks.upstream import ISSUES

JAX = "speed > * > variants > order 1 or order *, taylor > jax_ratio"


def known(found: Found) -> str:
    """How many of the variances that are known in closed form lie in their interval."""
    every = [each["known"] for each in found["estimator_variance"].values()]
    inside, total = (sum(each[key] for each in every) for key in ("inside", "all"))
    return f"{inside} of {total}"


def peers(found: Found) -> str:
    """Every peer at a glance: theirs over ours, and where the whole interval is below 1."""
    # By peer and what is compared: the place, the ratio, and whether evaluations are fewer.
    cases: dict[tuple[str, str], list[tuple[str, Sequence[float], bool]]] = {}
    for (name, target, peer), row in walk(found, "likelihood > * > targets > * > *"):
        if not row["ours"]:
            key = peer.removesuffix(", exact"), "likelihood, time to a target error"
            case = f"{PROBLEMS[name]}, {target}", row["over_ours"], row["fewer_evaluations"]
            cases.setdefault(key, []).append(case)
    for (network, step), (value, low, high) in walk(found, JAX):
        key = "the paper's losses, jitted by JAX", "a training step, time"
        case = f"{network}, {step}", [1 / value, 1 / high, 1 / low], False
        cases.setdefault(key, []).append(case)
    lines = []
    for key, every in cases.items():
        ahead = [
            f"{place}: {spread(ratio) if ratio[2] < 1 else 'fewer evaluations'}"
            for place, ratio, fewer in every
            if ratio[2] < 1 or fewer
        ]
        values = [ratio[0] for _, ratio, _ in every]
        span = f"{number(min(values))} to {number(max(values))}"
        lines.append([*key, span, f"{len(ahead)} of {len(every)}", "; ".join(ahead)])
    return markdown(["Peer", "Compared", "Theirs over ours", "Ahead in", "Where"], lines)


def upstream(found: Found) -> str:
    """The operators of which some PyTorch gets a derivative wrong, each verdict with its versions.

    Versions are named where verdicts differ between them.
    """
    columns = {
        "Second derivative, `torch.func.jvp`": ("jvp", "second"),
        "Second, backward": ("backward", "second"),
        "Third, backward": ("backward", "third"),
        "Both, this library": ("library", "second", "third"),
    }
    versions = sorted(found["upstream"], key=lambda each: [*map(int, each.split("."))])
    reports = {each.rpartition(".")[0]: found["upstream"][each]["found"] for each in versions}
    lines = []
    for name in next(iter(reports.values())):
        cells = []
        for way, *ordinals in columns.values():
            groups: dict[str, list[str]] = {}
            for version, rows in reports.items():
                given = {rows[name][each][way]["verdict"]: None for each in ordinals}
                text = ", ".join(given).replace("refused", "an error")
                groups.setdefault(text, []).append(version)
            several = [f"{given} in {', '.join(among)}" for given, among in groups.items()]
            cells.append("; ".join(several if len(several) > 1 else groups))
        if any("wrong" in each or "NaN" in each for each in cells):
            issues = (
                f"[{n}](https://github.com/pytorch/pytorch/issues/{n})"
                for n in ISSUES.get(name, ())
            )
            lines.append([name, *cells, ", ".join(issues)])
    return markdown(["Operator", *columns, "Issue"], lines)


TABLES: dict[str, Callable[[Found], str]] = {
    "peers": peers,
    "known": known,
    "upstream": upstream,
}
