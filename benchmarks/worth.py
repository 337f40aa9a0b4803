"""At equal processor time, which loss gives the best likelihood of the ODE? See docs/worth.md.

    python -m benchmarks.worth [--problems REGEX] [--losses REGEX] [--out DIR] [--smoke]
        [--pretraining SECONDS] [--seconds SECONDS] [--rate RATE] [--sweep]

Networks that order one has trained are trained on with each loss: three seeds at a time, from the
same weights, with a fresh Adam at a quarter of the rate and a cosine decay. Each loss has the
processor time of order one's steps; its step is timed first, in turns with a step of order one.

Every result is written to the directory at once, so that a second run goes on where the first one
stopped. All of them end in results/worth.json, those of another rate under "longer". --sweep also
tries other weights, on the first problem.
"""

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment, results
from benchmarks.worth_problems import PROBLEMS, Problem

FILE = results.DIRECTORY / "worth.json"
SEEDS, BATCH, RATE = 3, 256, 1e-3
BEFORE, BASE, SWEEP = "before", "order one", "sweep: "
# Of the higher terms of paired probes in nats; chosen by --sweep on the first problem.
WEIGHT, CANDIDATES = 0.3, (0.1, 1.0)
Loss = Callable[[hosm.ScoreModel], Callable[..., Tensor]]


def losses(problem: Problem, sweep: bool = False) -> dict[str, Loss]:
    """Every loss that is compared: given a model, a function of data and a generator.

    Times are uniform in log σ̂ for all of them, which makes the first term J_SM but for factors.
    """
    elements, schedule = problem.train.shape[1], problem.schedule
    low, high = schedule.log_sigma_hat_range

    def times(count: int, generator: torch.Generator | None) -> Tensor:
        return schedule.time(low + (high - low) * torch.rand(count, generator=generator))

    def of(function: Callable[..., Any], **options: Any) -> Loss:
        return lambda model: partial(function, model, time_sampler=times, **options)

    def stein(weight: float) -> Loss:
        return lambda model: partial(hosm.stein_dsm, model, weight=weight)

    def balanced(model: hosm.ScoreModel) -> hosm.SecondOrderDSM:
        given: Any = {"estimator": "paired", "weights": "balanced", "time_sampler": times}
        return hosm.SecondOrderDSM(model, **given)

    second, third = partial(of, hosm.second_order_dsm), partial(of, hosm.third_order_dsm)

    def paired(weight: float) -> dict[str, Loss]:
        """Second, trace and third are ‖M2‖², (tr M2)² and ‖R3‖², over the d of the first."""
        each, two = weight * elements, {"estimator": "paired"}
        return {
            "order two, paired": second(weights=(1, each, each), **two),
            "order three, paired": third(weights=(1, each, each, each * elements), **two),
            "trace, paired": second(weights=(1, 0, each), **two),
        }

    found: dict[str, Loss] = {
        BASE: of(hosm.first_order_dsm),
        "order two, as in the paper": second(weights=(1, 0.5, 0)),
        "order two, weights 1": second(),
        "order three, as in the paper": third(weights=(1, 0.5, 0, 0.1 * elements**2)),
        "order three, weights 1": third(),
        **paired(WEIGHT),
        "order two, balanced": balanced,
        "Stein, weight 1": stein(1.0),
        "Stein, weight 0.3": stein(0.3),
    }
    if sweep:
        for weight in CANDIDATES:
            tried = paired(weight).items()
            found |= {f"{SWEEP}{name}, weight {weight:g}": loss for name, loss in tried}
        found[f"{SWEEP}Stein, weight 3"] = stein(3.0)
    return found


def turns(problem: Problem, model: hosm.ScoreModel, loss: Loss, steps: int, rate: float):
    """A training of all members, a step each time it is advanced."""
    generator, objective = torch.Generator().manual_seed(1), loss(model)

    def value() -> Tensor:
        return objective(problem.rows(BATCH * SEEDS, generator), generator=generator)

    return experiment.training(model, value, steps, rate)


def step_times(problem: Problem, model: hosm.ScoreModel, chosen: dict[str, Loss], rounds: int):
    """Median seconds of a step with each loss; they take turns."""

    def start(name: str, steps: int):
        return turns(problem, copy.deepcopy(model), chosen[name], steps, RATE)

    return experiment.step_times(start, chosen, rounds)


def trained(
    problem: Problem, model: hosm.ScoreModel, loss: Loss, steps: int, rate: float, bar: str
) -> dict[str, Any]:
    """Train all members; the steps, and the seconds of processor time they took."""
    every = tqdm(turns(problem, model, loss, steps, rate), bar, steps, leave=False)
    return {"steps": steps, "seconds": experiment.clocked(lambda: list(every))[1]}


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
            row["error"] = (difference.std(1) / math.sqrt(value.shape[1])).tolist()
    return row


class Budget(NamedTuple):
    """Seconds of order one before and after, the rate after, and the rounds of a timing."""

    pretraining: float = 240.0
    seconds: float = 25.0
    rate: float = RATE / 4
    rounds: int = 30


SMOKE = Budget(0.02, 0.02, rounds=2)


class Campaign:
    """The results and checkpoints in a directory."""

    def __init__(self, out: Path, budget: Budget) -> None:
        self.out, self.budget = out, budget
        self.file = out / "worth.json"
        self.report = results.read(self.file)
        out.mkdir(parents=True, exist_ok=True)

    def path(self, problem: str, name: str) -> Path:
        """Where the weights after a training and what each point adds to the KL are kept."""
        return self.out / (re.sub(r"\W+", "_", f"{problem} {name}") + ".pt")

    def keep(self, problem: str, name: str, row: dict[str, Any], model: hosm.ScoreModel) -> None:
        kept = {"weights": model.state_dict(), "values": row.pop("values", None)}
        torch.save(kept, self.path(problem, name))
        self.report = results.read(self.file)  # another run may have written since
        self.report.setdefault(problem, {})[name] = row
        results.write(self.file, self.report)

    def kept(self, problem: str, name: str) -> dict[str, Any]:
        """The weights after a training, and what each point adds to the KL."""
        return torch.load(self.path(problem, name), weights_only=True)

    def run(self, name: str, pattern: str = "", sweep: bool = False) -> None:
        """Train with all losses on one problem, but for those that are done."""
        problem = PROBLEMS[name]()
        if self.budget is SMOKE:
            problem = problem.cut(8)
        chosen, done = losses(problem, sweep), self.report.get(name, {})
        base, model = chosen[BASE], problem.model(SEEDS)
        if BEFORE not in done:
            step = step_times(problem, model, {BASE: base}, self.budget.rounds)[BASE]
            steps = max(1, round(self.budget.pretraining / step))
            row = trained(problem, model, base, steps, RATE, f"{name}: before")
            self.keep(name, BEFORE, row | judged(problem, model, None), model)
        start = self.kept(name, BEFORE)["weights"]
        for loss in chosen:
            if loss not in done and re.search(pattern, loss):
                model.load_state_dict(start)
                both = {BASE: base, loss: chosen[loss]}
                self.keep(name, loss, self.restarted(name, problem, model, both), model)

    def restarted(
        self, name: str, problem: Problem, model: hosm.ScoreModel, both: dict[str, Loss]
    ) -> dict[str, Any]:
        """Train on with the last of two losses, the first order one; or say why it cannot be."""
        loss, of_base = list(both)[-1], self.report[name].get(BASE)
        row: dict[str, Any] = {}
        try:
            times = step_times(problem, model, both, self.budget.rounds)
            steps = of_base["steps"] if of_base else self.budget.seconds / times[BASE]
            row["step_time"] = times[loss] / times[BASE]
            taken, rate = max(1, round(steps / row["step_time"])), self.budget.rate
            row |= trained(problem, model, both[loss], taken, rate, f"{name}: {loss}")
        except (ValueError, hosm.DerivativeError) as error:
            return row | {"failed": experiment.reason(error)}
        return row | judged(problem, model, self.kept(name, BASE)["values"] if of_base else None)


def main() -> None:
    parser = experiment.parser(__doc__)
    parser.add_argument("--problems", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--losses", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--out", type=Path, default=Path("worth_out"))
    usual = Budget()
    add = partial(parser.add_argument, type=float)
    add("--pretraining", default=usual.pretraining, help="seconds of order one before")
    add("--seconds", default=usual.seconds, help="of order one after that")
    add("--rate", default=usual.rate, help="of Adam after that")
    parser.add_argument("--sweep", action="store_true", help="try weights on the first problem")
    options = parser.parse_args()
    torch.set_num_threads(1)
    budget = Budget(options.pretraining, options.seconds, options.rate)
    campaign = Campaign(options.out, SMOKE if options.smoke else budget)
    names = [name for name in PROBLEMS if re.search(options.problems, name)]
    for name in tqdm(names, "problems"):
        campaign.run(name, options.losses, options.sweep and name == next(iter(PROBLEMS)))
    if not options.smoke:
        longer = budget.rate != usual.rate
        results.keep(FILE, {"longer": campaign.report} if longer else campaign.report)


if __name__ == "__main__":
    main()
