"""What are quiet targets, and orders two and three, worth at equal evaluations of the network?

    python -m benchmarks.worth [--cells REGEX] [--rows REGEX] [--out DIR] [--dirty | --smoke]

The protocol, fixed before anything was run. For each cell of worth_problems:
    1. From scratch, every row of `rows` trains for as many evaluations of the network as order one
       takes in the cell's budget of steps. A sample costs 3 evaluations at order one, 6 at order
       two, 12 at order three, and 3 + 9 f at order three with fraction f. One Adam, one cosine
       decay to zero, batches of the cell's size, times uniform in log σ̂. Weights are the library's
       defaults; "weights × .1" has a tenth of those of the higher terms.
    2. In one cell each of d = 1, 2 and 4 (SEARCHED) the rate of each family of rows (FAMILIES) is
       chosen by two seeds that are not reported, from RATES. Elsewhere a family has the median,
       on that grid, of what it chose in these cells.
    3. Where the cell has `long` steps, order one with averaged targets trains for so many, and
       then the losses of SECOND_STAGE go on from its weights with a fresh Adam and decay for the
       evaluations of the budget, at rates chosen as in 2. Another training takes a third of the
       steps: if its KL divergence is at most 2 % higher, the long one counts as converged.
    4. Ratios are geometric means over five seeds, with 95 % intervals of log-ratios paired by seed
       (`worth_quantities.compare`). A seed that has lost a mode is counted in a column of its own
       and left out of the ratios.
    5. What a step of each loss costs in time is `python -m benchmarks speed`: on networks of at
       least 20 ms, and never measured here, where the networks are tiny.

Rows of quiet batches, whose protocol was fixed before any of them was run:
    6. "times": each member learns the density of its times with `AdaptiveTimes`, from 64 samples
       every 25 steps. What `learn` evaluates is taken off the steps.
    7. "pairs": each sample has both ε and −ε, so a batch of 256 has 128 samples. All 256 samples
       that plain order one would draw are the reference of averaged targets.
    8. VE cells have the default weighting, which is the objective of 1, and VP cells "likelihood",
       a constant times it.
    9. Families with times, and with pairs and times, have rates of their own, chosen as in 2. A
       row is compared with the same targets without pairs and times.
Orders two and three on quiet batches and 2,048 more references were planned, and never run.

Rows with rates of their own, whose protocol was fixed after those of 6 to 9 were seen (in sixteen
dimensions quiet batches do worse at the rate that small problems choose than at a third of it):
   10. Where rates are transferred, plain order one, averaged targets and quiet batches with these
       are trained again, as "own rate", each at the rate that two seeds choose in the cell itself
       as in 2, and are compared with each other.

All seeds of a row train as one ensemble. Each row is written to results/orders/CELL.json at once,
with its environment, and a second run goes on where the first one stopped; a row that was cut off
starts anew. Two runs may share the work by cells. A row is one command. In the cells of SEARCHED,
which come first, it also searches the rates of the row's family:

    python -m benchmarks.worth --cells '^many-well, d = 8$' --rows '^one, averaged, pairs, times$'

--out has the weights that second stages start from.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment, results
from benchmarks.experiment import seeded
from benchmarks.worth_problems import CELLS, Cell, together
from benchmarks.worth_quantities import (
    OWN,
    Row,
    by_rate,
    dependence,
    facts,
    judge,
    judge_briefly,
    ratios,
)

DIRECTORY = results.DIRECTORY / "orders"
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FAMILIES = ("one", "one, averaged", "two, averaged", "three, averaged")
SECOND_STAGE = ("one, averaged", "two, averaged", "three, averaged")
WEIGHTS = {1: (1.0,), 2: (1.0, 0.5, 0.0)}
INFORMATION_DRAWS = 2**16
SEARCHED = ("mixture, d = 1, VE", "checkerboard, d = 2", "many-well, d = 4")
FIRST_ORDER = ("one", "one, averaged", "one, averaged, pairs, times")  # what other studies train
EVERY, LEARNT = 25, 64  # steps between calls of `learn`, and its samples


class Recipe(NamedTuple):
    """A row of the study: a loss with its targets."""

    order: int
    family: str  # whose rate it has
    averaged: bool = False
    scores: str = ""  # "by element", "matrix" or none
    fraction: float = 1.0
    scale: float = 1.0  # of the weights of the higher terms
    times: bool = False  # whether they are learnt
    noises: int = 1  # of each sample; two are a pair

    @property
    def evaluations(self) -> float:
        """Of the network for a noisy sample in a step."""
        return {1: 3.0, 2: 6.0, 3: 3 + 9 * self.fraction}[self.order]

    def evaluations_in(self, steps: int, batch: int) -> float:
        """Of the network, over those of a row of the batch: in the steps and in `learn`."""
        calls = (steps - 1) // EVERY if self.times else 0
        return self.evaluations * (steps + calls * min(LEARNT * self.noises, batch) / batch)


def weights_of(recipe: Recipe, elements: int) -> tuple[float, ...]:
    """The library's default weights (a test compares), those of higher terms times `scale`."""
    third = (1.0, 0.5, 0.0, min(1.0, 0.1 * elements**2))
    first, *higher = WEIGHTS.get(recipe.order, third)
    return first, *(recipe.scale * weight for weight in higher)


def rows(cell: Cell) -> dict[str, Recipe]:
    """What trains from scratch, by name."""
    recipes = rows_as_drawn(cell)
    recipes |= quiet_rows(recipes)
    if not cell.searched:
        for name in FIRST_ORDER:
            recipes[name + OWN] = recipes[name]._replace(family=name + OWN)
    return recipes


def quiet_rows(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Rows of order one with the same targets on quiet batches."""
    quiet = {}
    for base in ("one", "one, averaged", "one, scores, averaged"):
        if base not in recipes:
            continue
        recipe = recipes[base]
        times = recipe._replace(family=f"{recipe.family}, times", times=True)
        if not recipe.scores:
            quiet[f"{base}, times"] = times
        quiet[f"{base}, pairs, times"] = times._replace(
            family=f"{recipe.family}, pairs, times", noises=2
        )
    return quiet


def rows_as_drawn(cell: Cell) -> dict[str, Recipe]:
    """Rows with times and noise as they are drawn."""
    one, one_averaged, two, three = FAMILIES
    recipes = {
        one: Recipe(1, one),
        one_averaged: Recipe(1, one_averaged, averaged=True),
        two: Recipe(2, two, averaged=True),
        three: Recipe(3, three, averaged=True),
    }
    for fraction, scale in ((1, 0.1), (1 / 4, 1.0), (1 / 4, 0.1), (1 / 8, 1.0), (1 / 8, 0.1)):
        name = f"{three}, fraction {fraction:g}" + ", weights × .1" * (scale != 1)
        recipes[name] = Recipe(3, three, averaged=True, fraction=fraction, scale=scale)
    if not hasattr(cell.density, "data_score"):
        return recipes
    recipes["one, scores"] = Recipe(1, one_averaged, scores="by element")
    best = Recipe(1, one_averaged, averaged=True, scores="by element")
    if cell.density.elements > 1:
        recipes["one, scores, matrix"] = Recipe(1, one_averaged, scores="matrix")
        best = best._replace(scores="matrix")
    recipes["one, scores, averaged"] = best
    recipes["two, scores, averaged"] = best._replace(order=2, family=two)
    recipes["three, scores, averaged"] = best._replace(order=3, family=three)
    eighth = best._replace(order=3, family=three, fraction=1 / 8)
    return recipes | {"three, scores, averaged, fraction 0.125": eighth}


@dataclass(frozen=True, eq=False, repr=False)
class MemberTargets(hosm.AveragedTargets):
    """Targets of an ensemble: the reference of a sample is the part of the batch of its member."""

    members: int = 1
    batch: Tensor | None = None  # all rows, of which those of a call are the first
    averaged: bool = False
    scores: Callable[[Tensor], Tensor] | None = None
    information: Tensor | None = None

    def posterior(self, *args: Any) -> "Members":
        """The posteriors of each member, as one."""
        tensors, others = args[:4], args[4:]
        return Members(
            [
                self.member(i).posterior(*(part[i :: self.members] for part in tensors), *others)
                for i in range(self.members)
            ]
        )

    def member(self, i: int) -> Any:
        """The targets of a member alone."""
        averaged = None
        if self.averaged:
            assert self.batch is not None
            averaged = hosm.AveragedTargets(self.batch[i :: self.members], own=False)
        if self.scores is None:
            return averaged
        return hosm.TargetScores(self.scores, information=self.information, averaged=averaged)


class Members:
    """The posteriors of all members, used by the losses as one `NoiseMoments`."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = members
        self.mean = together([member.mean for member in members])
        self.weights = members[0].weights[:1]  # one row: the rows are not split any further

    def along(self, v: Tensor, ell: Tensor, *, third: bool) -> tuple[Tensor, Tensor | None]:
        count = len(self.members)
        parts = [
            member.along(v[:, i::count], ell[:, i::count], third=third)
            for i, member in enumerate(self.members)
        ]
        C2v, C3v = zip(*parts, strict=True)
        return together(C2v, 1), together(C3v, 1) if third else None


class MemberTimes(hosm.AdaptiveTimes):
    """The learnt times of an ensemble, whose members have densities of their own."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.members = [hosm.AdaptiveTimes() for _ in range(members)]

    def draw(
        self,
        schedule: hosm.Schedule,
        like: Tensor,
        generator: torch.Generator | None,
        *,
        uniform: bool,
    ) -> tuple[Tensor, Tensor]:
        """Times, and 1 over the density of log σ̂, for rows of all members in turns."""
        count = len(self.members)
        t, spread = zip(
            *(
                times.draw(schedule, like[i::count], generator, uniform=uniform)
                for i, times in enumerate(self.members)
            ),
            strict=True,
        )
        return together(t), together(spread)


class EnsembleLoss:
    """The loss of a batch, rows of all members in turns, with everything drawn anew.

    `fraction` draws rows at random, which would mix the members. The first rows of a batch are as
    random: the higher terms are of these, and the first term is of all. Of pairs the first half
    is trained on; the others only serve as references.
    """

    def __init__(self, cell: Cell, recipe: Recipe, model: hosm.ScoreModel, members: int) -> None:
        self.cell, self.recipe, self.model, self.members = cell, recipe, model, members
        self.weights = weights_of(recipe, cell.density.elements)
        self.times = MemberTimes(members)
        self.quiet: dict[str, Any] = {"members": members, "averaged": recipe.averaged}
        if recipe.scores:
            data = cell.draw(INFORMATION_DRAWS, seeded(2)).double()
            scores = cell.density.data_score(data)
            matrix = recipe.scores == "matrix"
            self.quiet |= {
                "scores": lambda x: cell.density.data_score(x.double()).to(x.dtype),
                "information": hosm.TargetScores.information_of(data, scores, matrix=matrix),
            }

    def __call__(self, drawn: Tensor, generator: torch.Generator | None) -> Tensor:
        recipe, model, x0 = self.recipe, self.model, self._samples(drawn)
        how = self._options(self.times) | {"generator": generator}
        if recipe.averaged or recipe.scores:
            how["targets"] = MemberTargets(batch=drawn, **self.quiet)
        if recipe.order == 1:
            return hosm.first_order_dsm(model, x0, **how)
        higher = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}[recipe.order]
        if recipe.fraction == 1:
            return higher(model, x0, weights=self.weights, **how)
        chosen = round(recipe.fraction * len(x0) / self.members) * self.members
        share = chosen / len(x0)
        value = higher(model, x0[:chosen], weights=(share, *self.weights[1:]), **how)
        # AveragedTargets(own=False) finds these rows in the batch as well.
        return value + (1 - share) * hosm.first_order_dsm(model, x0[chosen:], **how)

    def learn(
        self, drawn: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Let each member learn its times as it would alone: by its rows and its part of Adam."""
        x0 = self._samples(drawn)
        targets = MemberTargets(batch=drawn, **self.quiet)
        for i, times in enumerate(self.times.members):
            alone = self.cell.model([i])
            adam = torch.optim.Adam(alone.parameters())
            for own, every in zip(alone.parameters(), self.model.parameters(), strict=True):
                own.data = every.detach()[i : i + 1]
                squares = optimizer.state[every]["exp_avg_sq"]
                adam.state[own] = {"exp_avg_sq": squares[i : i + 1]}
            times.learn(
                hosm.FirstOrderDSM(alone, **self._options(times)),
                x0[i :: self.members],
                adam,
                rows=LEARNT,
                targets=targets.member(i),
                generator=generator,
            )

    def _samples(self, drawn: Tensor) -> Tensor:
        """The rows that are trained on."""
        return drawn[: len(drawn) // self.recipe.noises]

    def _options(self, learnt: hosm.AdaptiveTimes) -> dict[str, Any]:
        cell, how = self.cell, {"antithetic": self.recipe.noises == 2}
        if not self.recipe.times:
            return how if cell.uniform_in_t else how | {"time_sampler": self._uniform}
        as_drawn = cell.uniform_in_t or isinstance(cell.schedule, hosm.VESchedule)
        weighting = "noise" if as_drawn else "likelihood"
        return how | {"time_sampler": learnt, "weighting": weighting}

    def _uniform(self, count: int, generator: torch.Generator | None) -> Tensor:
        low, high = self.cell.schedule.log_sigma_hat_range
        unit = torch.rand(count, generator=generator)
        return self.cell.schedule.time(low + (high - low) * unit)


def training(
    cell: Cell, model: hosm.ScoreModel, recipe: Recipe, steps: int, rates: Sequence[float]
) -> Iterator[None]:
    """A training of all members, each at its own rate, a step each time it is advanced."""
    generator = seeded(1)
    loss = EnsembleLoss(cell, recipe, model, len(rates))

    def draw() -> Tensor:
        return cell.draw(cell.batch * len(rates), generator)

    def value() -> Tensor:
        return loss(draw(), generator)

    share = torch.tensor(rates)[:, None, None] / max(rates)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    every = experiment.training(model, value, steps, max(rates))
    for step, optimizer in enumerate(every, 1):
        if min(rates) < max(rates):  # a step of Adam is proportional to its rate
            with torch.no_grad():
                for now, start in zip(model.parameters(), before, strict=True):
                    now.copy_(torch.lerp(start, now, share))
                    start.copy_(now)
        if recipe.times and step % EVERY == 0 and step < steps:
            loss.learn(draw(), optimizer, generator)
        yield


class Study:
    """The rows of a cell, in a file, each with the environment in which it was made."""

    def __init__(self, name: str, cell: Cell, where: Row, directory: Path, out: Path) -> None:
        slug = results.slug(name)
        self.name, self.cell, self.directory = name, cell, directory
        self.file, self.weights = directory / f"{slug}.json", out / f"{slug}.pt"
        self.report = {"name": name} | results.read(self.file)
        sizes = ("predictor", "budget", "long", "solver", "batch", "points", "scored", "seeds")
        settings = cell.sizes._asdict() | {key: getattr(cell, key) for key in sizes}
        if self.report.setdefault("cell", settings) != settings:
            raise ValueError(
                f"{self.file}: expected rows of {settings}; got {self.report['cell']}."
            )
        self.where, self.environments = where, self.report.setdefault("environments", [])
        self.rows: Row = self.report.setdefault("rows", {})

    def row(self, name: str, make: Callable[[], Row]) -> Row:
        """The row of a name, made now if there is none."""
        if name not in self.rows:
            try:
                made = make()
            except (ValueError, hosm.DerivativeError) as error:
                made = {"failed": experiment.reason(error)}
            if self.where not in self.environments:
                self.environments.append(self.where)
            self.rows[name] = made | {"environment": self.environments.index(self.where)}
            results.write(self.file, self.report)
        return self.rows[name]

    def train(
        self,
        model: hosm.ScoreModel,
        recipe: Recipe,
        steps: int,
        rates: Sequence[float],
        bar: str,
        watch: Callable[[int], None] | None = None,
    ) -> Row:
        """All steps; `watch` is called after each."""
        every = self.training(model, recipe, steps, rates)
        bar = f"{self.name}: {bar}"
        for step, _ in enumerate(tqdm(every, bar, steps, leave=False, mininterval=30), 1):
            if watch is not None:
                watch(step)
        weights = weights_of(recipe, self.cell.density.elements)
        evaluations = recipe.evaluations_in(steps, self.cell.batch)
        return {"steps": steps, "weights": weights, "evaluations": evaluations}

    def training(
        self, model: hosm.ScoreModel, recipe: Recipe, steps: int, rates: Sequence[float]
    ) -> Iterator[None]:
        """A training of all members, a step each time it is advanced."""
        return training(self.cell, model, recipe, steps, rates)

    def steps(self, recipe: Recipe) -> int:
        budget = self.cell.budget * 3
        steps = round(budget / recipe.evaluations)
        while recipe.times and recipe.evaluations_in(steps, self.cell.batch) > budget:
            steps -= 1
        return steps

    def search(self, models: Callable[[Sequence[int]], hosm.ScoreModel], recipe: Recipe) -> Row:
        """The spare seeds at every rate, but for the highest where the loss diverges there."""
        spares = range(self.cell.seeds, self.cell.seeds + self.cell.spares)
        bar, tried = f"rates of {recipe.family}", len(RATES)
        while True:
            rates = np.repeat(RATES[:tried], len(spares)).tolist()
            model = models([*spares] * tried)
            try:
                row = self.train(model, recipe, self.steps(recipe), rates, bar)
            except (ValueError, hosm.DerivativeError):  # as in `row`
                if tried == 1:
                    raise
                tried -= 1
                continue
            found = judge_briefly(self.cell, model, len(rates))["kl"]
            return row | {"kl": found + [None] * (len(spares) * (len(RATES) - tried))}

    def rate(
        self,
        recipe: Recipe,
        models: Callable[[Sequence[int]], hosm.ScoreModel],
        stage: str = "rates: ",
    ) -> float:
        """That of the family: chosen here, or the median of what other cells chose."""
        family = recipe.family
        if not (self.cell.searched or family.endswith(OWN)):
            return transferred_rate(family, self.directory)
        representative = rows(self.cell)[family]
        row = self.row(stage + family, partial(self.search, models, representative))
        means = by_rate(row, RATES)
        return min(means, key=lambda rate: means[rate])

    def finish(
        self,
        models: Callable[[Sequence[int]], hosm.ScoreModel],
        recipe: Recipe,
        rate: float,
        bar: str,
        steps: int | None = None,
    ) -> Row:
        """The reported seeds, trained for some steps or for the budget, and judged."""
        seeds = self.cell.seeds
        model = models(range(seeds))
        row = self.train(model, recipe, steps or self.steps(recipe), [rate] * seeds, bar)
        return row | {"rate": rate} | judge(self.cell, model, seeds)

    def run(self, pattern: str = "") -> None:
        """Do all that is not done."""
        if "facts" not in self.report:
            self.report["facts"] = facts(self.cell)
            results.write(self.file, self.report)
        recipes = rows(self.cell)
        for name, recipe in recipes.items():
            if re.search(pattern, name):
                rate = self.rate(recipe, self.cell.model)
                self.row(name, partial(self.finish, self.cell.model, recipe, rate, name))
        if self.cell.long is None or not re.search(pattern, "long"):
            return
        one = recipes["one, averaged"]
        rate, bar, third = self.rate(one, self.cell.model), "a third of long", self.cell.long // 3
        self.row(bar, partial(self.finish, self.cell.model, one, rate, bar, third))
        if "failed" in self.row("long", partial(self.train_long, one, rate)):
            return
        for name in SECOND_STAGE:
            rate = self.rate(recipes[name], self.from_long, "rates after: ")
            make = partial(self.finish, self.from_long, recipes[name], rate, f"after: {name}")
            self.row(f"after: {name}", make)

    def train_long(self, recipe: Recipe, rate: float) -> Row:
        """Order one for long, with the spare seeds, whose second stages choose the rates."""
        cell = self.cell
        assert cell.long is not None
        seeds = cell.seeds + cell.spares
        model = cell.model(range(seeds))
        row = self.train(model, recipe, cell.long, [rate] * seeds, f"{cell.long} steps")
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: p.detach() for key, p in model.named_parameters()}, self.weights)
        return row | {"rate": rate} | judge(cell, self.from_long(range(cell.seeds)), cell.seeds)

    def from_long(self, seeds: Sequence[int]) -> hosm.ScoreModel:
        """Networks with the weights after the long training."""
        if not self.weights.exists():
            raise ValueError(
                "expected the weights of the row 'long'; remove that row and run again"
            )
        weights, model = torch.load(self.weights, weights_only=True), self.cell.model(seeds)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name][list(seeds)])
        return model


def transferred_rate(family: str, directory: Path) -> float:
    """The median, on the grid of rates, of what a family chose in cells that searched."""
    chosen = []
    for report in results.read_all(directory):
        means = by_rate(report["rows"].get(f"rates: {family}", {}), RATES)
        if means:
            chosen.append(min(means, key=lambda rate: means[rate]))
    if len(chosen) < len(SEARCHED):
        raise SystemExit(
            f"expected rates of {family!r} from {len(SEARCHED)} cells; got {len(chosen)}: run "
            f"{'; '.join(SEARCHED)} first."
        )
    return median_low(chosen)


def begin(doc: str | None, out: str, told: str) -> tuple[Namespace, Row]:
    """The arguments of a study and its environment."""
    parser = experiment.parser(doc)
    parser.add_argument("--cells", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--rows", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--out", type=Path, default=Path(out), help=told)
    return experiment.begin(parser)


def main() -> None:
    arguments, where = begin(__doc__, "worth_out", "for weights")
    directory = arguments.out if arguments.smoke else DIRECTORY
    for name, make in CELLS.items():
        if re.search(arguments.cells, name):
            try:
                cell = make()
            except ModuleNotFoundError as error:
                print(f"{name}: left out, as {error.name} is not installed")
                continue
            if arguments.smoke:
                cell = cell.small()
            study = Study(name, cell, where, directory, arguments.out)
            study.run(arguments.rows)
            results.show(name, ratios(study.report))
    found = dependence(results.read_all(directory))
    results.show("What the ratios depend on: rank correlations", found)


if __name__ == "__main__":
    main()
