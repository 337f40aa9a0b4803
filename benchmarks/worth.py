"""At equal processor time, which loss gives the best likelihood of the ODE? See docs/worth.md.

    python -m benchmarks.worth [--problems REGEX] [--losses REGEX] [--out DIR] [--smoke]
        [--pretraining SECONDS] [--seconds SECONDS] [--sweep]

Networks that order one has trained are trained on with each loss: three seeds at a time, from the
same weights, with a fresh Adam at half the rate and a cosine decay. Each loss has the processor
time of order one's steps; a step of it is timed first, in turns with a step of order one.

Every result is written at once, so that a second run goes on where the first one stopped.
--sweep also tries other weights, on the first problem.
"""

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment, results
from benchmarks.worth_problems import PROBLEMS, Problem

SEEDS, BATCH, RATE, WARM_UP, ROUNDS = 3, 256, 1e-3, 5, 30
BEFORE, BASE = "before", "order one"
# Of the higher terms in nats; chosen by --sweep on the first problem.
WEIGHTS = {"order two, paired": 0.3, "order three, paired": 0.3, "trace, paired": 0.3}
CANDIDATES = (0.03, 0.1, 0.3, 1.0)
Loss = Callable[..., Tensor]


def losses(problem: Problem, sweep: bool = False) -> dict[str, Loss]:
    """Every loss that is compared, as a function of model and data.

    Times are uniform in log σ̂ for all of them, which makes the first term J_SM but for factors.
    """
    elements, schedule = problem.train.shape[1], problem.schedule
    low, high = schedule.log_sigma_hat_range

    def times(count: int, generator: torch.Generator | None) -> Tensor:
        return schedule.time(low + (high - low) * torch.rand(count, generator=generator))

    second = partial(hosm.second_order_dsm, time_sampler=times)
    third = partial(hosm.third_order_dsm, time_sampler=times)

    def paired(name: str, weight: float) -> Loss:
        """Second, trace and third are ‖M2‖², (tr M2)² and ‖R3‖², over the d of the first."""
        each = weight * elements
        if name == "trace, paired":
            return partial(second, estimator="paired", weights=(1, 0, each))
        if name == "order two, paired":
            return partial(second, estimator="paired", weights=(1, each, each))
        return partial(third, estimator="paired", weights=(1, each, each, each * elements))

    found: dict[str, Loss] = {
        BASE: partial(hosm.first_order_dsm, time_sampler=times),
        "order two, as in the paper": partial(second, weights=(1, 0.5, 0)),
        "order two, weights 1": second,
        "order three, as in the paper": partial(third, weights=(1, 0.5, 0, 0.1 * elements**2)),
        "order three, weights 1": third,
        **{name: paired(name, weight) for name, weight in WEIGHTS.items()},
        "Stein, weight 1": hosm.stein_dsm,
        "Stein, weight 0.3": partial(hosm.stein_dsm, weight=0.3),
    }
    if sweep:
        found |= {
            f"{name}, weight {weight:g}": paired(name, weight)
            for name in WEIGHTS
            for weight in CANDIDATES
        }
    return found


def trained(
    problem: Problem, model: hosm.ScoreModel, loss: Loss, steps: int, rate: float, bar: str
) -> float:
    """Train all members; the seconds of processor time it took."""
    _, seconds = experiment.clocked(
        lambda: [
            None for _ in tqdm(turns(problem, model, loss, steps, rate), bar, steps, leave=False)
        ]
    )
    return seconds


def turns(problem: Problem, model: hosm.ScoreModel, loss: Loss, steps: int, rate: float):
    """A training of all members, a step each time it is advanced."""
    generator = torch.Generator().manual_seed(1)

    def value() -> Tensor:
        return loss(model, problem.rows(BATCH * SEEDS, generator), generator=generator)

    return experiment.training(model, value, steps, rate)


def step_times(problem: Problem, model: hosm.ScoreModel, chosen: dict[str, Loss], rounds: int):
    """Median seconds of a step with each loss; they take turns."""
    routes = {
        name: partial(next, turns(problem, copy.deepcopy(model), loss, WARM_UP + rounds, RATE))
        for name, loss in chosen.items()
    }
    experiment.times(routes, WARM_UP)
    found = experiment.times(routes, rounds)
    return {name: float(np.median(seconds)) for name, seconds in found.items()}


def judged(problem: Problem, model: hosm.ScoreModel, base: Tensor | None) -> dict[str, Any]:
    """KL of each member, its difference to that of `base`, and their standard errors.

    `error` is that over points, `seeds_error` that over members, of the mean difference.
    """
    value, j_sm = problem.judged(model, SEEDS)
    if not value.isfinite().all():
        return {"failed": "the KL divergence is not finite"}
    row: dict[str, Any] = {"kl": value.mean(1).tolist(), "j_sm": j_sm, "values": value}
    if base is not None:
        difference = value - base
        mean = difference.mean(1)
        row |= {"difference": mean.tolist(), "seeds_error": float(mean.std() / math.sqrt(SEEDS))}
        if problem.factor is None:
            errors = difference.std(1) / math.sqrt(value.shape[1])
            row["error"] = errors.tolist()
    return row


class Campaign:
    """The results and checkpoints in a directory."""

    def __init__(self, out: Path, smoke: bool) -> None:
        self.out, self.smoke = out, smoke
        self.file = out / "worth.json"
        self.report = results.read(self.file)
        out.mkdir(parents=True, exist_ok=True)

    def path(self, problem: str, name: str) -> Path:
        """Where the weights after a training and what each point adds to the KL are kept."""
        return self.out / (re.sub(r"\W+", "_", f"{problem} {name}") + ".pt")

    def keep(self, problem: str, name: str, row: dict[str, Any], model: hosm.ScoreModel) -> None:
        """Write a result."""
        kept = {"weights": model.state_dict(), "values": row.pop("values", None)}
        torch.save(kept, self.path(problem, name))
        self.report = results.read(self.file)  # another run may have written since
        self.report.setdefault(problem, {})[name] = row
        results.write(self.file, self.report)

    def run(self, name: str, seconds: float, pretraining: float, pattern: str, sweep: bool):
        """All losses on one problem, but for those that are done."""
        problem = PROBLEMS[name]()
        if self.smoke:
            problem = problem.cut(8)
        done = self.report.get(name, {})
        chosen = losses(problem, sweep)
        todo = [loss for loss in chosen if loss not in done and re.search(pattern, loss)]
        model = problem.model(SEEDS)
        rounds = 2 if self.smoke else ROUNDS
        if BEFORE not in done:
            step = step_times(problem, model, {BASE: chosen[BASE]}, rounds)[BASE]
            steps = max(1, round(pretraining / step))
            spent = trained(problem, model, chosen[BASE], steps, RATE, f"{name}: before")
            row = judged(problem, model, None) | {"steps": steps, "seconds": spent}
            self.keep(name, BEFORE, row, model)
        start = torch.load(self.path(name, BEFORE))["weights"]
        for loss in todo:
            model.load_state_dict(start)
            row = self.restarted(name, problem, model, loss, chosen, seconds, rounds)
            self.keep(name, loss, row, model)
            yield

    def restarted(
        self,
        name: str,
        problem: Problem,
        model: hosm.ScoreModel,
        loss: str,
        chosen: dict[str, Loss],
        seconds: float,
        rounds: int,
    ) -> dict[str, Any]:
        """Train on with one loss; a result, or why there is none."""
        of_base = self.report[name].get(BASE)
        row: dict[str, Any] = {}
        try:
            both = {BASE: chosen[BASE], loss: chosen[loss]}
            times = step_times(problem, model, both, rounds)
            steps = of_base["steps"] if of_base else seconds / times[BASE]
            row["step_time"] = times[loss] / times[BASE]
            row["steps"] = max(1, round(steps / row["step_time"]))
            bar = f"{name}: {loss}"
            spent = trained(problem, model, chosen[loss], row["steps"], RATE / 2, bar)
        except (ValueError, hosm.DerivativeError) as error:
            return row | {"failed": experiment.reason(error)}
        base = torch.load(self.path(name, BASE))["values"] if of_base else None
        return row | {"seconds": spent} | judged(problem, model, base)


def main() -> None:
    """Train, judge and write what is not yet done, then print it."""
    parser = experiment.parser(__doc__)
    parser.add_argument("--problems", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--losses", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--out", type=Path, default=Path("worth_out"))
    parser.add_argument("--pretraining", type=float, default=240.0, help="seconds of order one")
    parser.add_argument("--seconds", type=float, default=25.0, help="of every loss after that")
    parser.add_argument("--sweep", action="store_true", help="try weights on the first problem")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = (0.05, 0.05) if options.smoke else (options.seconds, options.pretraining)
    campaign = Campaign(options.out, options.smoke)
    names = [name for name in PROBLEMS if re.search(options.problems, name)]
    for name in tqdm(names, "problems"):
        sweep = options.sweep and name == next(iter(PROBLEMS))
        list(campaign.run(name, *seconds, options.losses, sweep))
    print(tables(campaign.report))
    draw(campaign.report, options.out / "worth.png")


def in_percent(row: dict[str, Any], base: dict[str, Any], key: str = "kl") -> tuple[float, float]:
    """The mean difference to order one in per cent of that, and its standard error.

    The error is the larger of those over seeds and over points.
    """
    mean = float(np.mean(base[key]))
    difference = float(np.mean(row[key])) - mean
    error = max(row.get("seeds_error", 0.0), float(np.mean(row.get("error", 0.0))))
    return 100 * difference / abs(mean), 100 * error / abs(mean)


def tables(report: results.Report) -> str:
    """Three tables in Markdown: KL, J_SM, and how far order one had got."""
    found = {name: report[name] for name in PROBLEMS if BASE in report.get(name, {})}
    names = list(dict.fromkeys(loss for rows in found.values() for loss in rows))
    names = [name for name in names if name not in (BEFORE, BASE) and ", weight " not in name[5:]]

    def cell(rows: dict[str, Any], name: str, key: str) -> str:
        if name not in rows:
            return ""
        if "failed" in rows[name]:
            return "diverged"
        if rows[name][key] is None:
            return "–"
        change, error = in_percent(rows[name], rows[BASE], key)
        text = f"{change:+.1f}" + (f" ± {error:.1f}" if key == "kl" else "")
        clear = key == "kl" and change < -2 * error
        return f"**{text}**" if clear else text

    def grid(key: str, first: str) -> list[list[str]]:
        of_one = [rows[BASE][key] for rows in found.values()]
        base = [BASE, *("–" if each is None else f"{np.mean(each):.4g}" for each in of_one)]
        lines = [[name, *(cell(rows, name, key) for rows in found.values())] for name in names]
        return [[first, *found], base, *lines]

    steps = [
        ["", "seconds before", "KL before", "then, order one", "change", "steps of order one"]
    ]
    steps[0] += [f"step of {name}" for name in names]
    for problem, rows in found.items():
        before, base = rows[BEFORE], rows[BASE]
        change = 100 * (np.mean(base["kl"]) / np.mean(before["kl"]) - 1)
        cells = [f"{before['seconds']:.0f}", f"{np.mean(before['kl']):.4g}"]
        cells += [f"{np.mean(base['kl']):.4g}", f"{change:+.1f} %", str(base["steps"])]
        cells += [
            f"{rows[name]['step_time']:.1f}" if "step_time" in rows.get(name, {}) else ""
            for name in names
        ]
        steps.append([problem, *cells])
    every = grid("kl", "KL, per cent"), grid("j_sm", "J_SM, per cent"), steps
    return "\n\n".join(map(markdown, every))


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def draw(report: results.Report, path: Path) -> None:
    """Draw KL over that of order one, for each problem and loss."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots()
    found = [name for name in PROBLEMS if BASE in report.get(name, {})]
    found = [name for name in found if report[name][BASE]["j_sm"] is not None]
    names = list(dict.fromkeys(loss for name in found for loss in report[name]))
    names = [name for name in names if name not in (BEFORE, BASE) and ", weight " not in name[5:]]
    markers = "osDv^<>PX"
    for i, loss in enumerate(names):
        rows = [
            (k, report[name].get(loss, {}), report[name][BASE]) for k, name in enumerate(found)
        ]
        shown = [(k, *in_percent(row, base)) for k, row, base in rows if "kl" in row]
        if not shown:
            continue
        places, changes, errors = np.array(shown).T
        offset = (i - (len(names) - 1) / 2) / (len(names) + 2)
        style: dict[str, Any] = {"fmt": markers[i % len(markers)], "markersize": 5, "capsize": 2}
        ratio = 1 + changes / 100
        axes.errorbar(places + offset, ratio, errors / 100, label=loss, **style)
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found])
    axes.set_ylabel("KL over that of order one, at equal processor time")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
