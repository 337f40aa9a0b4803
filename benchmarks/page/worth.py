"""The tables of docs/worth.md, from results/worth.json.

It holds what benchmarks.worth wrote, under "longer" what a longer run of it did, and under
"quadratic" and "samples" what benchmarks.quadratic and benchmarks.worth_samples did.
"""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.page.numbers import NOTHING, Found, markdown
from benchmarks.worth import BASE, BEFORE, SEEDS, SWEEP
from benchmarks.worth_problems import PROBLEMS

KL = "KL, per cent"
Rows = dict[str, dict[str, Any]]  # by loss


def change(row: Found, base: Found, key: str = "kl") -> tuple[float, float]:
    """The difference of the means and its standard error, in per cent; of negative means in nats.

    The error is the larger of those over seeds and over points.
    """
    mean = fmean(base[key])
    unit = 100 / mean if mean > 0 else 1.0
    error = max(row.get("seeds_error", 0.0), fmean(row.get("error", [0.0])))
    return unit * (fmean(row[key]) - mean), unit * error


def changes(rows: Rows) -> Found:
    """The steps and the changes of each loss: against order one, and the network before both."""
    found: Found = {}
    for name, row in rows.items():
        found[name] = {"step": row.get("step_time")}
        for base, more, less in ((BASE, "more", "less"), (BEFORE, "lost", "won")):
            moved, _ = change(row, rows[base])
            found[name] |= {more: moved, less: -moved}
    return found


def compared(every: Iterable[Rows]) -> list[str]:
    """The losses that are compared with order one."""
    names = dict.fromkeys(name for rows in every for name in rows)
    return [name for name in names if name not in (BEFORE, BASE) and SWEEP not in name]


def cell(rows: Rows, name: str, key: str) -> str:
    """What stands in a table for a loss: bold where it is better by two standard errors."""
    row, base = rows.get(name, {}), rows[BASE]
    if "failed" in row:
        return "diverged"
    if row.get(key) is None:
        return NOTHING
    if key == "step_time":
        return f"{row[key]:.1f}"
    moved, error = change(row, base, key)
    if base["j_sm"] is None:
        text = f"{moved:+.2f} ± {error:.2f} nats"
    else:
        text = f"{moved:+.1f}" + (f" ± {error:.1f}" if key == "kl" else "")
    return f"**{text}**" if key == "kl" and moved < -2 * error else text


def grid(report: Found, key: str, first: str) -> str:
    """A table of a quantity, of each loss on each problem."""
    found = {name: report[name] for name in PROBLEMS if BASE in report.get(name, {})}
    of_one = [rows[BASE][key] for rows in found.values()]
    lines = [[BASE, *(NOTHING if each is None else f"{np.mean(each):.4g}" for each in of_one)]]
    for name in compared(found.values()):
        lines.append([name, *(cell(rows, name, key) for rows in found.values())])
    return markdown([first, *found], lines)


def tables(report: Found) -> str:
    """KL, J_SM, step times, how far order one had got, the weights tried."""
    starts, first = [], next(iter(PROBLEMS))
    for problem in PROBLEMS:
        if BASE not in report.get(problem, {}):
            continue
        before, base = (report[problem][each] for each in (BEFORE, BASE))
        moved, _ = change(base, before)
        told = f"{moved:+.2f} nats" if base["j_sm"] is None else f"{moved:+.1f} %"
        cells = [f"{before['seconds']:.0f}", f"{fmean(before['kl']):.4g}"]
        starts.append([problem, *cells, f"{fmean(base['kl']):.4g}", told, str(base["steps"])])
    head = ["", "seconds before", "KL before", "order one", "change of KL", "its steps"]
    rows = report.get(first, {})
    tried = [[name.removeprefix(SWEEP), cell(rows, name, "kl")] for name in rows if SWEEP in name]
    every = [grid(report, "kl", KL), grid(report, "j_sm", "J_SM, per cent")]
    every += [grid(report, "step_time", "time of a step"), markdown(head, starts)]
    return "\n\n".join([*every, markdown(["Tried", KL], tried)])


def of_quadratic(report: Found) -> str:
    """KL without an optimizer, against order one."""
    lines = []
    for name in next(iter(report.values())):
        lines.append([name])
        for losses in report.values():
            base = np.mean([kl for kl, _ in losses[BASE]])
            kls, errors = np.transpose(losses[name])
            moved, error = 100 * (kls.mean() / base - 1), 100 * errors.mean() / base
            lines[-1].append(f"{base:.4g}" if name == BASE else f"{moved:+.1f} ± {error:.1f}")
    return markdown([KL, *report], lines)


def of_samples(report: Found) -> str:
    """The distances of samples to data, a column for each seed."""
    head = ["distance of samples", *(f"seed {i}" for i in range(SEEDS))]
    return markdown(head, [[name, *(f"{x:.3f}" for x in row)] for name, row in report.items()])
