"""Which loss gives the best likelihood and score of the ODE, at equal cost?

    python -m benchmarks.worth [--cells REGEX] [--losses REGEX] [--levels N] [--out DIR] [--smoke]

For each cell of worth_problems and worth_reserved:
    1. Order one chooses between two networks, plain and averaged targets, and three rates, by the
       KL divergence of seeds that are not reported: one, or three where some networks miss a mode.
    2. It trains with that choice, and goes on until it has had three times the steps, with a fresh
       Adam and a cosine decay, at its rate or a third of it. This repeats, --levels in all, until
       three times lower the KL divergence by less than GATE, or by more than HOPELESS.
       `converged` says whether by less than GATE: no loss is recommended as a second stage from a
       cell where order one has not converged.
    3. Every loss goes on from the weights of the longest training, with a fresh Adam and a cosine
       decay, for as many steps as cost what the cell's budget of order one costs. Step times are
       measured once, in turns. The rate is chosen on the seeds that are not reported.
    4. The losses of WHOLE train from scratch, at the cost of order one's three budgets.
    5. That of SWITCHED does as well, with order one for the first of the three budgets. One Adam
       and one cosine decay serve the whole training.

Five seeds and those that are not reported train as one ensemble. Each row is written to
results/worth/CELL.json at once, with its environment, and a second run goes on where the first one
stopped. Two runs may share the work by cells. The weights that the losses start from are in --out;
without that file they are trained again, and so are the losses if other weights come out of it.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment, results
from benchmarks.worth_problems import CELLS, KINDS, Cell, MemberTargets
from benchmarks.worth_quantities import Row, by_rate, compare, judge, judge_briefly
from benchmarks.worth_reserved import RESERVED

DIRECTORY = results.DIRECTORY / "worth"
BASELINE_RATES, RATES = (1e-2, 3e-3, 1e-3), (1e-3, 3e-4, 1e-4)
GATE, HOPELESS, LEVELS, ROUNDS = 0.02, 0.2, 3, 20
ONE, AVERAGED = TARGETS = ("order one", "order one, averaged")
SWITCHED, EXACT = "order three, averaged", "order three, averaged, exact probes"
WHOLE, COST = (SWITCHED, EXACT), 3  # budgets of order one
FEW = 4  # elements up to which all unit vectors are tried as probes
LIKELIHOOD_ROWS, LIKELIHOOD_STEPS, LIKELIHOOD_ELEMENTS = 32, 32, 8
Loss = Callable[[hosm.ScoreModel], Callable[..., Tensor]]
Models = Callable[[Sequence[int]], hosm.ScoreModel]  # of seeds; from scratch, or to go on from


def losses(cell: Cell, members: int, baseline: str = "") -> dict[str, Loss]:
    """Every loss, as a function of a model that gives one of data and a generator.

    Times are uniform in log σ̂ for all of them unless their name says otherwise.
    """
    elements = cell.density.elements
    low, high = cell.schedule.log_sigma_hat_range
    averaged = {"targets": MemberTargets(members=members)}

    def times(power: int, rows: int, generator: torch.Generator | None) -> Tensor:
        return cell.schedule.time(
            low + (high - low) * torch.rand(rows, generator=generator) ** power
        )

    def of(function: Callable[..., Any], power: int = 1, **options: Any) -> Loss:
        sampler = partial(times, power)
        return lambda model: partial(function, model, time_sampler=sampler, **options)

    def likelihood(model: hosm.ScoreModel) -> Callable[..., Tensor]:
        alpha, sigma = cell.schedule(torch.tensor(cell.schedule.t_min))

        def loss(x0: Tensor, generator: torch.Generator) -> Tensor:
            x0 = x0[: LIKELIHOOD_ROWS * members]
            x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
            given: Any = cell.ode(min(LIKELIHOOD_STEPS, cell.solver))
            return hosm.ode_nll(model, x, enable_grad=True, **given).nll.nanmean()

        return loss

    second = partial(of, hosm.second_order_dsm, weights=(1, 0.5, 0))
    third = partial(of, hosm.third_order_dsm, weights=(1, 0.5, 0, 0.1 * elements**2))
    found: dict[str, Loss] = {
        ONE: of(hosm.first_order_dsm),
        AVERAGED: of(hosm.first_order_dsm, **averaged),
        # Half of the times in the lowest quarter.
        "order one, small σ": of(
            hosm.first_order_dsm, 2, **(averaged if baseline == AVERAGED else {})
        ),
        "order two": second(),
        "order two, averaged": second(**averaged),
        "order three": third(),
        SWITCHED: third(**averaged),
    }
    if 1 < elements <= FEW:
        found[EXACT] = third(probes="exact", **averaged)
    if elements <= LIKELIHOOD_ELEMENTS:
        found["likelihood"] = likelihood
    return found


def in_turn(first: Loss, second: Loss, steps: int) -> Loss:
    """A loss for so many calls, and another one after them."""

    def of(model: hosm.ScoreModel) -> Callable[..., Tensor]:
        both, calls = (first(model), second(model)), count()
        return lambda *given, **options: both[next(calls) >= steps](*given, **options)

    return of


def training(
    cell: Cell, model: hosm.ScoreModel, loss: Loss, steps: int, rates: Sequence[float]
) -> Iterator[None]:
    """A training of all members, each at its own rate, a step each time it is advanced."""
    generator, objective = torch.Generator().manual_seed(1), loss(model)

    def value() -> Tensor:
        return objective(cell.draw(cell.batch * len(rates), generator), generator=generator)

    share = torch.tensor(rates)[:, None, None] / max(rates)
    before = [each.detach().clone() for each in model.parameters()]
    for _ in experiment.training(model, value, steps, max(rates)):
        if min(rates) < max(rates):  # a step of Adam is proportional to its rate
            with torch.no_grad():
                for now, start in zip(model.parameters(), before, strict=True):
                    now.copy_(torch.lerp(start, now, share))
                    start.copy_(now)
        yield


class Study:
    """The rows of a cell, in a file, and the weights that its losses start from.

    The seeds after those of the cell are spare: they choose and are not reported.
    """

    overfits = False  # whether a longer training may fail
    chooses = "kl"  # of each seed, by which networks, targets and rates are chosen

    def __init__(self, name: str, cell: Cell, directory: Path, out: Path) -> None:
        slug = re.sub(r"\W+", "_", name)
        self.name, self.cell, self.seeds = name, cell, cell.seeds
        self.spares = range(cell.seeds, cell.seeds + cell.spares)
        self.file, self.out = directory / f"{slug}.json", out / slug
        self.report = {"name": name} | results.read(self.file)
        sizes = ("budget", "solver", "batch", "points", "scored")
        told = cell.sizes._asdict() | {key: getattr(cell, key) for key in sizes}
        if self.report.setdefault("cell", told) != told:
            raise ValueError(f"{self.file}: expected rows of {told}; got {self.report['cell']}.")
        self.environments: list[Row] = self.report.setdefault("environments", [])
        self.here: Row | None = None  # written with the first row that is made
        self.rows: Row = self.report.setdefault("rows", {})

    def row(self, name: str, make: Callable[[], Row], start: str | None = None) -> Row:
        """The row of a name, made now if there is none of these starting weights."""
        if name not in self.rows or self.rows[name].get("start") != start:
            try:
                made = make()
            except (ValueError, hosm.DerivativeError) as error:
                made = {"failed": experiment.reason(error)}
            if self.here is None:
                self.here = results.environment()
                self.environments.append(self.here)
            self.rows[name] = made | {"environment": len(self.environments) - 1}
            if start is not None:
                self.rows[name]["start"] = start
            results.write(self.file, self.report)
        return self.rows[name]

    def train(
        self, model: hosm.ScoreModel, loss: Loss, steps: int, rates: Sequence[float], bar: str
    ) -> Row:
        every = training(self.cell, model, loss, steps, rates)
        every = tqdm(every, f"{self.name}: {bar}", steps, leave=False, mininterval=10)
        return {"steps": steps, "seconds": experiment.clocked(lambda: list(every))[1]}

    def choose(self) -> tuple[str, str, float]:
        """Network, targets and rate of order one, by the KL divergence of the spare seeds."""
        found: dict[tuple[str, str, float], float] = {}
        for kind, name in product(KINDS, TARGETS):
            make = partial(self.tune, self.fresh(kind), name, self.cell.budget, BASELINE_RATES)
            row = self.row(f"choice: {kind}, {name}", make)
            found |= {
                (kind, name, rate): kl
                for rate, kl in by_rate(row, self.chooses, BASELINE_RATES).items()
            }
        return min(found, key=lambda each: found[each])

    def fresh(self, kind: str) -> Models:
        """Networks of a kind, with new weights."""
        return partial(self.cell.model, kind=kind)

    @property
    def targets(self) -> str:
        """The targets that order one chose, if it has."""
        return self.rows.get("budget 1", {}).get("targets", "")

    def baseline(self, levels: int) -> int:
        """Train order one, and return after how many budgets the losses go on from it."""
        kind, name, rate = self.choose()
        for times in (3**level for level in range(levels)):
            if times > 1 and f"budget {times}" not in self.rows:
                start, rates = self.start(times // 3), [rate, rate / 3]
                given = start.model, name, self.steps(times), rates, start.digest
                rate = self.best_rate(f"budget {times}", *given) or rate
            row = self.row(f"budget {times}", partial(self.go_further, kind, name, rate, times))
            if "failed" in row and not (self.overfits and times > 1):
                raise ValueError(f"{self.name}: budget {times} of order one: {row['failed']}")
            if times > 1 and self.is_settled():
                break
        self.report["converged"] = levels > 1 and self.converged()
        self.report["start"] = self.chosen_budget()
        return self.report["start"]

    def is_settled(self) -> bool:
        """Whether three times the budget would tell no more of whether order one converges."""
        return self.converged() or self.gain() > HOPELESS

    def converged(self) -> bool:
        """Whether three times the budget lowered order one's KL divergence by less than GATE."""
        return self.gain() < GATE

    def gain(self) -> float:
        """What three times the budget took off order one's KL divergence, of all."""
        *_, before, after = self.budgets().values()
        return 1 - compare(after, before)["kl"].value

    def budgets(self) -> dict[int, Row]:
        """The rows of order one, by budget, without one that failed."""
        done = {name: row for name, row in self.rows.items() if "failed" not in row}
        found = {int(name.split()[1]): name for name in done if name.startswith("budget")}
        return {times: done[found[times]] for times in sorted(found)}

    def chosen_budget(self) -> int:
        """The budget of the weights that the losses start from: the longest."""
        return max(self.budgets())

    def judge(self, model: hosm.ScoreModel) -> Row:
        return judge(self.cell, model, self.seeds)

    def judge_budget(self, model: hosm.ScoreModel) -> Row:
        """What is kept of a training of order one."""
        return self.judge(model)

    def judge_briefly(self, model: hosm.ScoreModel, members: int) -> Row:
        return judge_briefly(self.cell, model, members)

    def steps(self, times: int) -> int:
        """What is left of so many budgets after a third of them."""
        return (times - times // 3) * self.cell.budget

    def start(self, times: int) -> "Start":
        """The weights of a row of order one, from a file, or trained again."""
        row, file = self.rows[f"budget {times}"], self.out / f"{times}.pt"
        kind, name = row["network"], row["targets"]
        if file.exists():
            weights = torch.load(file, weights_only=True)
        else:
            weights = self.train_further(kind, name, row["rate"], times)[1]
        return Start(self.cell, kind, name, weights)

    def train_further(
        self, kind: str, name: str, rate: float, times: int
    ) -> tuple[Row, dict[str, Tensor]]:
        """Train all seeds for so many budgets in all; their weights go to a file as well."""
        members = range(self.seeds + len(self.spares))
        models = self.fresh(kind) if times == 1 else self.start(times // 3).model
        model = models(members)
        loss = losses(self.cell, len(members))[name]
        row = self.train(model, loss, self.steps(times), [rate] * len(members), f"budget {times}")
        weights = {key: each.detach().clone() for key, each in model.named_parameters()}
        self.out.mkdir(parents=True, exist_ok=True)
        torch.save(weights, self.out / f"{times}.pt")
        return row | {"network": kind, "targets": name, "rate": rate}, weights

    def go_further(self, kind: str, name: str, rate: float, times: int) -> Row:
        """The row of so many budgets of order one."""
        row, weights = self.train_further(kind, name, rate, times)
        start = Start(self.cell, kind, name, weights)
        return row | self.judge_budget(start.model(range(self.seeds)))

    def run(self, pattern: str = "", levels: int = LEVELS, rounds: int = ROUNDS) -> None:
        """Do all that is not done."""
        chosen, first = self.baseline(levels), self.rows["budget 1"]
        every = losses(self.cell, self.seeds, self.targets)
        fresh, start = self.fresh(first["network"]), None
        given = every, fresh, rounds
        self.row("step times", partial(self.step_times, *given))
        ratios = {name: self.step_ratio(name, *given) for name in every}
        for name in every:
            if re.search(pattern, name):
                start = self.start(chosen) if start is None else start
                steps = [max(1, round(self.cell.budget / ratios[name]))] * 2
                self.tuned(name, name, start.model, steps, RATES, start.digest)
        if levels > 1:
            dear = {name: ratio / ratios[self.targets] for name, ratio in ratios.items()}
            for name in filter(every.__contains__, WHOLE):
                if re.search(pattern, f"whole: {name}"):
                    steps = [max(1, round(k * self.cell.budget / dear[name])) for k in (1, COST)]
                    self.tuned(f"whole: {name}", name, fresh, steps, BASELINE_RATES)
            if re.search(pattern, f"switch: {SWITCHED}"):
                late = max(1, round((COST - 1) * self.cell.budget / dear[SWITCHED]))
                name, steps = f"switch: {SWITCHED}", self.cell.budget + late
                self.tuned(name, name, fresh, [steps] * 2, BASELINE_RATES)

    def step_ratio(self, name: str, *given: Any) -> float:
        """The time of a step over that of order one; timed now if it was no row of the others."""
        ratios = self.rows["step times"]["ratios"]
        if name not in ratios:
            every, *rest = given
            both = {key: every[key] for key in (ONE, name)}
            make = partial(self.step_times, both, *rest)
            ratios = self.row(f"step times: {name}", make)["ratios"]
        return ratios[name]

    def tuned(
        self,
        row: str,
        name: str,
        models: Models,
        steps: Sequence[int],
        rates: Sequence[float],
        digest: str | None = None,
    ) -> None:
        """The row of a loss at its best rate; `steps` are those of the choice, and of the row."""
        rate = self.best_rate(row, models, name, steps[0], rates, digest)
        if rate is not None:
            self.row(row, partial(self.finish, models, name, steps[1], rate, row), digest)

    def best_rate(
        self,
        row: str,
        models: Models,
        name: str,
        steps: int,
        rates: Sequence[float],
        digest: str | None,
    ) -> float | None:
        """The rate of a loss at which the spare seeds do best; None where all fail."""
        make = partial(self.tune, models, name, steps, rates)
        found = by_rate(self.row(f"rates: {row}", make, digest), self.chooses, rates)
        return min(found, key=lambda rate: found[rate], default=None)

    def step_times(self, every: Mapping[str, Loss], models: Models, rounds: int) -> Row:
        """Median times of a step over that of order one."""

        def begin(name: str, steps: int) -> Iterator[None]:
            model = models(range(self.seeds))
            return training(self.cell, model, every[name], steps, [RATES[0]] * self.seeds)

        seconds = experiment.step_times(begin, every, rounds)
        ratios = {name: each / seconds[ONE] for name, each in seconds.items()}
        return {"seconds": seconds[ONE], "ratios": ratios, "rounds": rounds}

    def tune(self, models: Models, name: str, steps: int, rates: Sequence[float]) -> Row:
        """The spare seeds at every rate."""
        members, each = [*self.spares] * len(rates), np.repeat(rates, len(self.spares)).tolist()
        model = models(members)
        row = self.train(model, self.loss(name, len(members)), steps, each, f"rates of {name}")
        return row | {"rates": list(rates)} | self.judge_briefly(model, len(members))

    def loss(self, name: str, members: int) -> Loss:
        """The loss of a row, that of "switch" after a budget of order one."""
        every = losses(self.cell, members, self.targets)
        if name in every:
            return every[name]
        after = every[name.removeprefix("switch: ")]
        return in_turn(every[self.targets], after, self.cell.budget)

    def finish(self, models: Models, name: str, steps: int, rate: float, bar: str) -> Row:
        """The reported seeds, trained with a loss."""
        model = models(range(self.seeds))
        loss = self.loss(name, self.seeds)
        row = self.train(model, loss, steps, [rate] * self.seeds, bar) | {"rate": rate}
        return row | self.judge(model)

    def summary(self) -> Row:
        """Each loss over the better order one: KL divergence and score error, with intervals."""
        done = {name: row for name, row in self.rows.items() if "log_score" in row}
        base = min((done[name] for name in TARGETS if name in done), key=kl_of, default=None)
        if base is None:
            return {
                name: {"nats": kl_of(row), "score": row["score_mean"]}
                for name, row in done.items()
            }
        return {name: {"nats": kl_of(row), **compare(row, base)} for name, row in done.items()}


class Start(NamedTuple):
    """What the losses go on from."""

    cell: Cell
    kind: str
    targets: str
    weights: dict[str, Tensor]  # of all seeds, the spare ones last

    def model(self, members: Sequence[int]) -> hosm.ScoreModel:
        """A model of these members."""
        model = self.cell.model([0] * len(members), self.kind)
        with torch.no_grad():
            for name, each in model.named_parameters():
                each.copy_(self.weights[name][list(members)])
        return model

    @property
    def digest(self) -> str:
        joined = torch.cat([each.flatten() for each in self.weights.values()])
        return hashlib.sha256(joined.numpy().tobytes()).hexdigest()[:12]


def kl_of(row: Row) -> float:
    return float(np.mean(row["kl"]))


def run_all(
    doc: str | None, cells: Mapping[str, Callable[[], Cell]], study_of: type[Study] = Study
) -> None:
    """The command line: run cells, and print what they found."""
    parser = experiment.parser(doc)
    parser.add_argument("--cells", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--losses", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--levels", type=int, default=LEVELS, help="of order one, 1, 3, 9")
    parser.add_argument("--out", type=Path, default=Path("worth_out"), help="for weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, make in cells.items():
        if re.search(options.cells, name):
            try:
                cell, directory, rounds = make(), DIRECTORY, ROUNDS
            except ModuleNotFoundError as error:
                print(f"{name}: left out, as {error.name} is not installed")
                continue
            if options.smoke:
                cell, directory, rounds = cell.small(), options.out, 1
            study = study_of(name, cell, directory, options.out)
            study.run(options.losses, options.levels, rounds)
            results.show(name, study.summary())


if __name__ == "__main__":
    run_all(__doc__, {**CELLS, **RESERVED})
