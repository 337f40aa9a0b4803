"""The tables that are worked out.

Those of the losses are in `study`, but for an earlier map: results/worth.json, an experiment on
ten problems, "longer" of the same networks, and "quadratic", losses without an optimizer.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.page import study
from benchmarks.page.numbers import NOTHING, PROBLEMS, Found, markdown, named, number, spread, walk

KL = "KL, per cent"
# Rows and problems of results/worth.json, in the order of the page.
BEFORE, BASE, SWEEP = "before", "order one", "sweep: "
DATA = (
    "mixture, d = 8, width 24",
    "mixture, d = 8, width 128",
    "mixture, d = 1, VE",
    "mixture, d = 1, VP",
    "checkerboard, d = 2",
    "mixture, d = 16, width 24",
    "mixture, d = 16, width 128",
    "mixture, d = 32, width 24",
    "mixture, d = 32, width 128",
    "digits, d = 64",
)
Rows = dict[str, dict[str, Any]]  # by loss
JAX = "speed > * > variants > order 1 or order *, taylor > jax_ratio"
# A variant as README.md calls it.
COSTS = {
    "order 2": "order 2, taylor",
    "order 3": "order 3 exact, taylor",
    'order 3, `third="laplacian"`': "order 3 laplacian, taylor",
    "order 3, `fraction=0.25`": "order 3 exact, fraction=1/4",
}


def known(found: Found) -> str:
    """How many of the variances that are known in closed form lie in their interval."""
    every = [each["known"] for each in found["estimator_variance"].values()]
    inside, total = (sum(each[key] for each in every) for key in ("inside", "all"))
    return f"{inside} of {total}"


def cost(found: Found) -> str:
    """What a training step costs over one of order one, on the worst network and the best."""
    lines = []
    for name, key in COSTS.items():
        path = f"speed > * > variants > {key}"
        memory = named(found, f"{path} > memory_ratio")
        times = sorted((row["time_ratio"][0], network) for (network,), row in walk(found, path))
        ((_, of_mlp),) = walk(found, f"speed > mlp > variants > {key} > flops_ratio")
        evaluations = f"{round(12 * of_mlp) / 4:g}"  # the MLP has nothing beside its products
        worst, best = (f"{ratio:.1f} ({network})" for ratio, network in (times[-1], times[0]))
        lines.append([name, evaluations, worst, best, memory])
    head = ["step over order one", "evaluations (order one: 3)", "time, worst", "best", "memory"]
    return markdown(head, lines)


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


def change(row: Found, base: Found) -> tuple[float, float]:
    """The difference of the mean divergences and its standard error, in per cent.

    In nats where the mean is negative. The error is the larger of those over seeds and points.
    """
    mean = fmean(base["kl"])
    unit = 100 / mean if mean > 0 else 1.0
    error = max(row.get("seeds_error", 0.0), fmean(row.get("error", [0.0])))
    return unit * (fmean(row["kl"]) - mean), unit * error


def changes(rows: Rows) -> Found:
    """The changes of each loss against order one."""
    moved = {name: change(row, rows[BASE])[0] for name, row in rows.items()}
    return {name: {"more": each, "less": -each} for name, each in moved.items()}


def cell(rows: Rows, name: str) -> str:
    """What stands in a table for a loss: bold where it is better by two standard errors."""
    row, base = rows.get(name, {}), rows[BASE]
    if "failed" in row:
        return "diverged"
    if row.get("kl") is None:
        return NOTHING
    moved, error = change(row, base)
    if base["j_sm"] is None:
        text = f"{moved:+.2f} ± {error:.2f} nats"
    else:
        text = f"{moved:+.1f} ± {error:.1f}"
    return f"**{text}**" if moved < -2 * error else text


def grid(report: Found) -> str:
    """A table of divergences, of each loss on each problem."""
    found = {name: rows for name, rows in report.items() if BASE in rows}
    lines = [[BASE, *(f"{np.mean(rows[BASE]['kl']):.4g}" for rows in found.values())]]
    for name in dict.fromkeys(name for rows in found.values() for name in rows):
        if name not in (BEFORE, BASE) and SWEEP not in name:
            lines.append([name, *(cell(rows, name) for rows in found.values())])
    return markdown([KL, *found], lines)


def of_quadratic(report: Found) -> str:
    """KL without an optimizer, against order one."""
    lines = []
    for name in next(iter(report.values())):
        lines.append([name])
        for losses in report.values():
            base = fmean(kl for kl, _ in losses[BASE])
            kls, errors = np.transpose(losses[name])
            moved, error = 100 * (kls.mean() / base - 1), 100 * errors.mean() / base
            lines[-1].append(f"{base:.4g}" if name == BASE else f"{moved:+.1f} ± {error:.1f}")
    return markdown([KL, *report], lines)


TABLES: dict[str, Callable[[Found], str]] = {
    "peers": peers,
    "known": known,
    "cost": cost,
    "gain": lambda found: study.gains(found["study"]),
    "worth": lambda found: study.summary(found["study"]),
    "worth, digits": lambda found: study.of_digits(found["study"]),
    "worth, cells": lambda found: "\n\n".join(study.tables(found["study"])),
    "worth, map": lambda found: "\n\n".join(
        grid({name: found["worth.json"].get(name, {}) for name in half})
        for half in (DATA[:5], DATA[5:])
    ),
    "worth, longer": lambda found: grid(found["worth.json"]["longer"]),
    "worth, quadratic": lambda found: of_quadratic(found["worth.json"]["quadratic"]),
}
