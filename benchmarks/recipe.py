"""Does the recipe hold at other learning rates, times, batches and networks?

    python -m benchmarks.recipe [--cells REGEX] [--rows REGEX] [--out DIR] [--dirty | --smoke]

Order one plain, orders one to three with averaged targets, and order one on quiet batches with
these train from scratch as in `benchmarks.worth`, for equal evaluations of the network, in its
cells of d = 1, 2 and 4 that search their rates. One setting at a time differs from BASE: a batch
of 256, times uniform in log σ̂, the cell's network, a rate of 3e-3. In eight dimensions, where
`benchmarks.worth` transfers its rates, only the rate is changed. A row is compared as there, with
one of the same setting, over three seeds. Each row is written to results/recipe/ at once, and a
second run goes on where the first one stopped.

At "equal time" order one trains in four and eight dimensions, each seed alone and by the library's
modules, on a network whose step takes at least 20 ms. A call of `learn` costs five such steps and
comes every 100. What a step of each row costs over a plain one, these calls included, is measured
first, in turns, on an idle machine; the steps are those of plain order one over this cost. A rate
of 1e-3, and single networks at equal evaluations, were planned, and never run.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hosm_losses as hosm
from benchmarks import experiment, results
from benchmarks.experiment import seeded
from benchmarks.steps import LOSSES
from benchmarks.worth import (
    EVERY,
    FIRST_ORDER,
    LEARNT,
    SEARCHED,
    Recipe,
    Study,
    begin,
    rows,
)
from benchmarks.worth_problems import CELLS, Cell, Sizes
from benchmarks.worth_quantities import Row, ratios

DIRECTORY = results.DIRECTORY / "recipe"
BASE, RATE, SEEDS = "base", 3e-3, 3
ROWS = (*FIRST_ORDER, "two, averaged", "three, averaged")
TRANSFERRED = "many-well, d = 8, rotated"
PROBLEMS = (*SEARCHED, TRANSFERRED)
TIMED = PROBLEMS[2:]


def training_alone(
    cell: Cell,
    model: hosm.ScoreModel,
    recipe: Recipe,
    steps: int,
    rate: float,
    seed: int,
    every: int,
) -> Iterator[None]:
    """A training of one network by the library's modules, a step each time it is advanced."""
    sampler = hosm.AdaptiveTimes() if recipe.times else None
    return experiment.training_by_module(
        LOSSES[recipe.order](model, antithetic=recipe.noises == 2, time_sampler=sampler),
        lambda generator: cell.draw(cell.batch, generator),
        steps,
        rate,
        seeded(seed),
        averaged=recipe.averaged,
        every=every,
        rows=LEARNT,
    )


class TimedStudy(Study):
    """Each seed trains alone, and each row for the time that plain order one takes its budget."""

    every = 4 * EVERY

    def training(
        self, model: hosm.ScoreModel, recipe: Recipe, steps: int, rates: Sequence[float]
    ) -> Iterator[None]:
        """The networks take each step in turns; in the end they are copied into the ensemble."""
        alone = [self.cell.model([seed]) for seed in range(len(rates))]
        every = [
            training_alone(self.cell, network, recipe, steps, rates[seed], seed, self.every)
            for seed, network in enumerate(alone)
        ]
        for _ in zip(*every, strict=True):
            yield
        with torch.no_grad():
            for seed, network in enumerate(alone):
                for member, own in zip(model.parameters(), network.parameters(), strict=True):
                    member[seed] = own[0]

    def steps(self, recipe: Recipe) -> int:
        costs = self.row("costs", self.costs)["over plain"]
        return round(self.cell.budget / costs[recipe.family])

    def costs(self) -> Row:
        """Seconds of a plain step, and what those of the rows take over it in the mean."""
        recipes, count = rows(self.cell), min(self.cell.budget, 3 * self.every)

        def route(recipe: Recipe) -> Callable[[], object]:
            model = self.cell.model([0])
            return partial(
                next, training_alone(self.cell, model, recipe, count + 2, RATE, 0, self.every)
            )

        routes = {name: route(recipes[name]) for name in FIRST_ORDER}
        experiment.times(routes, 1)  # the first step also imports
        found = experiment.times(routes, count)
        means = {name: sum(seconds) / count for name, seconds in found.items()}
        over = {name: mean / means["one"] for name, mean in means.items()}
        return {"seconds": means["one"], "over plain": over}


class Setting(NamedTuple):
    """What differs from the base: fields of the cell, and the rate."""

    changes: dict[str, Any]
    rate: float = RATE
    study: type[Study] = Study

    @property
    def problems(self) -> tuple[str, ...]:
        """Where it is tried."""
        if self.study is TimedStudy:
            return TIMED
        return SEARCHED if self.changes else PROBLEMS

    @property
    def rows(self) -> tuple[str, ...]:
        """What is trained."""
        return FIRST_ORDER if self.study is TimedStudy else ROWS


SETTINGS = {
    BASE: Setting({}),
    "rate 3e-4": Setting({}, 3e-4),
    "rate 1e-3": Setting({}, 1e-3),
    "rate 1e-2": Setting({}, 1e-2),
    # Of the VE schedule of the base these are the same times.
    "VP, times uniform in t": Setting(
        {"schedule": hosm.VPSchedule(t_min=1e-3), "uniform_in_t": True}
    ),
    "batch 128": Setting({"batch": 128}),
    "batch 1024": Setting({"batch": 1024}),
    "six layers of width 32": Setting({"sizes": Sizes(32, 6)}),
    "one layer of width 512, no predictor": Setting(
        {"sizes": Sizes(512, 1, waves=2), "predictor": False}
    ),
    "equal time, rate 3e-3": Setting({"sizes": Sizes(512)}, 3e-3, TimedStudy),
}


def studies(
    pattern: str, where: Row, *, smoke: bool, out: Path
) -> Iterator[tuple[str, str, Study]]:
    """The cell, the setting and the study of each."""
    for name in PROBLEMS:
        for setting, how in SETTINGS.items():
            title = f"{name}, {setting}"
            if name not in how.problems or not re.search(pattern, title):
                continue
            base = {"batch": 256, "seeds": SEEDS, "long": None}
            cell = replace(CELLS[name](), **base | how.changes)
            if smoke:
                cell = replace(cell.small(), seeds=2)
            yield name, setting, how.study(title, cell, where, out if smoke else DIRECTORY, out)


def main() -> None:
    arguments, where = begin(__doc__, "recipe_out", "of --smoke")
    every = studies(arguments.cells, where, smoke=arguments.smoke, out=arguments.out)
    for name, setting, study in every:
        recipes, how = rows(study.cell), SETTINGS[setting]
        for row in filter(partial(re.search, arguments.rows), how.rows):
            make = partial(study.finish, study.cell.model, recipes[row])
            study.row(row, partial(make, how.rate, f"{setting}: {row}"))
        results.show(f"{name}, {setting}", ratios(study.report))


if __name__ == "__main__":
    main()
