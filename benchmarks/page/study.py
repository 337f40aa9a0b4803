"""What an earlier study of the losses puts on the pages: results/worth/*.json.

Ratios are those of `worth_quantities.compare`, over the better of plain and averaged order one; of
what trains from scratch, over three budgets of order one.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.intervals import Estimate, over_seeds
from benchmarks.page.numbers import NOTHING, Found, markdown, number

BASELINE_RATES = (1e-2, 3e-3, 1e-3)
ONE, AVERAGED, TWO = "order one", "order one, averaged", "order two, averaged"
RECIPE = "order three, averaged"
WHOLE = f"whole: {RECIPE}"
SHOWN = {
    WHOLE: "order three from scratch",
    RECIPE: "order three after order one",
    TWO: "order two after order one",
}
HEADLINES = {"from scratch": WHOLE, "switched": f"switch: {RECIPE}", "after": RECIPE}
HEADLINES |= {"exact probes": f"{WHOLE}, exact probes", "direct": "likelihood"}
# The rows of README's table: the recipe of each problem.
GAINS = {
    "mixture, d = 1, VP": WHOLE,
    "checkerboard, d = 2": WHOLE,
    "many-well, d = 4, width 128": WHOLE,
    "many-well, d = 8, width 128": RECIPE,
}
Row = dict[str, Any]


def compare(row: Row, base: Row) -> dict[str, Estimate]:
    """The ratios of KL divergences and of score errors, geometric means over seeds."""
    with np.errstate(divide="ignore", invalid="ignore"):
        of_kl = np.log(np.mean(row["kl"], 1) / np.mean(base["kl"], 1))
    of_score = np.subtract(row["log_score"], base["log_score"])
    return {
        name: Estimate(*(float(np.exp(bound)) for bound in over_seeds(log_ratios)))
        for name, log_ratios in (("kl", of_kl[:, None]), ("score", of_score))
    }


def densities(found: Found) -> dict[str, Row]:
    """The finished cells whose density is known, by name, in the order of their dimensions."""
    cells = {name: each for name, each in found.items() if "kl" in each["rows"].get(WHOLE, {})}
    return dict(sorted(cells.items(), key=lambda item: _size(item[0])))


def digits(found: Found) -> dict[str, Row]:
    """The finished cells of digits."""
    cells = {name: each for name, each in found.items() if "test" in each["rows"].get(ONE, {})}
    return dict(sorted(cells.items(), key=lambda item: _size(item[0])))


def _size(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.replace(",", " ").split() if part.isdigit())


def judged(report: Row) -> dict[str, Row]:
    """The losses that went on from order one, without those that failed."""
    rows = report["rows"].items()
    others = ("budget", "choice", "rates", "step")
    named = {name: row for name, row in rows if not name.startswith(others)}
    return {name: row for name, row in named.items() if "kl" in row or "test" in row}


def beside(report: Row, name: str) -> tuple[Row, Row]:
    """The row of a loss, and that of order one which it is compared with."""
    base = "budget 3" if name.startswith(("whole", "switch")) else best(report)
    return report["rows"][name], report["rows"][base]


def ratio(report: Row, name: str) -> Mapping[str, Estimate]:
    """KL divergence and score error of a loss over those of order one."""
    return compare(*beside(report, name))


def lower(report: Row, name: str) -> bool:
    """Whether a loss has less KL divergence, beyond the chance of seeds and of points."""
    row, base = beside(report, name)
    return over_seeds(np.subtract(row["kl"], base["kl"])).high < 0


def best(report: Row) -> str:
    """Order one, plain or averaged, as it goes on better."""
    rows = judged(report)
    return min((ONE, AVERAGED), key=lambda name: float(np.mean(rows[name]["kl"])))


def change(report: Row, name: str) -> Estimate:
    """The nats that a loss changes on the test split against order one."""
    return over_seeds(np.subtract(report["rows"][name]["test"], report["rows"][ONE]["test"]))


def short(estimate: Estimate, better: bool) -> str:
    """A number, bold where it is better beyond chance."""
    text = f"{estimate.value:.2f}"
    return f"**{text}**" if better else text


def long(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def headlines(report: Row) -> Row:
    """What the sentences of the page say of a finished cell."""
    if "test" in report["rows"].get(ONE, {}):
        return {"change": {loss: change(report, loss).value for loss in judged(report)}}
    if "kl" not in report["rows"].get(WHOLE, {}):
        return {}
    plain, averaged = at_first(report)
    found: Row = {"averaged less": 100 * (1 - averaged / plain)}
    for name, loss in HEADLINES.items():
        if loss in judged(report):
            found[name] = {key: each.value for key, each in ratio(report, loss).items()}
    return found


def ratio_of(report: Row, loss: str) -> float:
    """The time of a step of a loss over that of order one."""
    rows = report["rows"]
    timed = rows.get(f"step times: {loss}", rows["step times"])
    return timed["ratios"][loss]


def at_first(report: Row) -> list[float]:
    """KL divergence of order one, plain and averaged, after the same steps from scratch."""
    found, network = [], report["rows"]["budget 1"]["network"]
    for targets in (ONE, AVERAGED):
        row = report["rows"][f"choice: {network}, {targets}"]
        means = np.reshape(np.array(row["kl"], float), (len(BASELINE_RATES), -1)).mean(1)
        found.append(float(np.nanmin(means)))
    return found


def summary(found: Found) -> str:
    """The table of the page: a row for each cell."""
    lines = []
    for name, report in densities(found).items():
        cells = []
        for loss in (WHOLE, RECIPE):
            over = ratio(report, loss)
            cells.append(short(over["kl"], lower(report, loss)))
            cells.append(short(over["score"], over["score"].high < 1))
        lines.append([starred(name, report), *map(number, at_first(report)), *cells])
    head = ["", "plain, nats", "averaged, nats"]
    head += [f"{stage}: {key}" for stage in ("scratch", "after") for key in ("KL", "score")]
    return markdown(head, lines)


def starred(name: str, report: Row) -> str:
    """The name of a cell, with a star where order one had not converged."""
    return f"{name}{'' if report['converged'] else '*'}"


def gains(found: Found) -> str:
    """The table of README: KL divergence and score error over order one, with their intervals."""
    lines = []
    for name, loss in GAINS.items():
        cells = [long(ratio(found[name], loss)[key]) for key in ("kl", "score")]
        lines.append([name, SHOWN[loss].removeprefix("order three "), *cells])
    head = ["", "order three, averaged", "KL divergence", "error of the ODE's score"]
    return markdown(head, lines)


def of_digits(found: Found) -> str:
    """The table of the digits: nats of held-out data."""
    lines = []
    for name, report in digits(found).items():
        every = judged(report)
        before = report["rows"][f"budget {report['start']}"]
        shown = {"before": before} | every
        for loss, row in shown.items():
            moved = NOTHING if loss in ("before", ONE) else _signed(change(report, loss))
            nats, own = float(np.mean(row["test"])), float(np.mean(row["self_consistency"]))
            lines.append([name, loss, f"{nats:.2f}", moved, number(own)])
    head = ["", "loss", "nats", "change against order one", "self-consistency"]
    return markdown(head, lines)


def _signed(estimate: Estimate) -> str:
    text = "{:+.2f} ({:+.2f} to {:+.2f})".format(*estimate)
    return f"**{text}**" if estimate.high < 0 else text


def tables(found: Found) -> Iterator[str]:
    """Two tables for each cell: errors, and samples and costs."""
    for name, report in densities(found).items():
        errors, samples = [], []
        for loss, row in judged(report).items():
            over = ratio(report, loss)
            nats, j_sm = (number(float(np.mean(row[key]))) for key in ("kl", "j_sm"))
            base = loss == best(report)
            both = [NOTHING] * 2 if base else [long(over[key]) for key in ("kl", "score")]
            mean, median = (
                number(float(np.mean(row[f"score_{key}"]))) for key in ("mean", "median")
            )
            errors.append([loss, nats, *both, mean, median, j_sm])
            of_samples = [
                number(float(np.mean(row[key])))
                for key in ("effective_size", "reverse_kl", "low_share")
            ]
            of_z = number(float(np.sqrt(np.mean(np.square(row["log_z_error"])))))
            step = f"{ratio_of(report, re.sub('^(whole|switch): ', '', loss)):.1f}"
            samples.append([loss, *of_samples, of_z, step, str(row["steps"]), f"{row['rate']:g}"])
        yield f"### {name}"
        yield start(report)
        yield markdown(
            [
                "",
                "KL, nats",
                "over order one",
                "score error over order one",
                "its mean",
                "median",
                "J_SM",
            ],
            errors,
        )
        yield markdown(
            ["", "ESS", "reverse KL", "log w < −5", "log Z", "step", "steps", "rate"], samples
        )


def start(report: Row) -> str:
    """A sentence on what the losses start from."""
    budgets = [name for name in report["rows"] if name.startswith("budget")]
    rows = {int(name.split()[1]): report["rows"][name] for name in budgets}
    kls = ", ".join(number(float(np.mean(row["kl"]))) for _, row in sorted(rows.items()))
    last = rows[max(rows)]
    targets = "averaged" if last["targets"] == AVERAGED else "plain"
    told = "converged" if report["converged"] else "not converged"
    steps = ", ".join(f"{times * report['cell']['budget']:,}" for times in sorted(rows))
    return (
        f"Order one chose the {last['network']} network, {targets} targets and in the end a rate "
        f"of {last['rate']:.1g}. It had {kls} nats after {steps} steps: {told}."
    )
