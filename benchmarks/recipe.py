"""Does the recipe hold at other learning rates, times, batches and networks?

    python -m benchmarks.recipe [--cells REGEX] [--dirty | --smoke]

Order one plain, orders one to three with averaged targets, and order one on quiet batches with
these train from scratch as in `benchmarks.worth`, for equal evaluations of the network, in its
cells of d = 1, 2 and 4 that search their rates. One setting at a time differs from BASE: a batch
of 256, times uniform in log σ̂, the cell's network, a rate of 3e-3. In eight dimensions, where
`benchmarks.worth` transfers its rates, only the rate is changed. A row is compared as there, with
one of the same setting, over three seeds. Each row is written to results/recipe/ at once, and a
second run goes on where the first one stopped.

Two kinds of setting train without an ensemble, each seed alone and by the library's modules:
    a single network    at equal evaluations, in every cell;
    equal time          order one in four and eight dimensions, on a network whose step takes at
                        least 20 ms. What a step of each row costs over a plain one, calls of
                        `learn` included, is measured first, in turns, on an idle machine; the
                        steps are those of plain order one over this cost.
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
from benchmarks.worth import EVERY, LEARNT, SEARCHED, Recipe, Study, rows
from benchmarks.worth_problems import CELLS, Cell, Sizes
from benchmarks.worth_quantities import Row, ratios

DIRECTORY = results.DIRECTORY / "recipe"
BASE, RATE, SEEDS = "base", 3e-3, 3
FIRST = ("one", "one, averaged", "one, averaged, pairs, times")
ROWS = (*FIRST, "two, averaged", "three, averaged")
TRANSFERRED = "many-well, d = 8, rotated"
PROBLEMS = (*SEARCHED, TRANSFERRED)
TIMED = PROBLEMS[2:]


def training_alone(
    cell: Cell, recipe: Recipe, steps: int, rate: float, seed: int
) -> Iterator[hosm.ScoreModel]:
    """Train a network by the library's modules, and yield it after each step."""
    model, generator = cell.model([seed]), torch.Generator().manual_seed(seed)
    module = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}[recipe.order]
    sampler = hosm.AdaptiveTimes() if recipe.times else None
    loss = module(model, antithetic=recipe.noises == 2, time_sampler=sampler)

    def batch() -> Row:
        drawn = cell.draw(cell.batch, generator)
        targets = hosm.AveragedTargets(drawn, own=False) if recipe.averaged else None
        x0 = drawn[: len(drawn) // recipe.noises]
        return {"x0": x0, "targets": targets, "generator": generator}

    every = experiment.training(model, lambda: loss(**batch()), steps, rate)
    for step, optimizer in enumerate(every, 1):
        if sampler is not None and step % EVERY == 0 and step < steps:
            sampler.learn(loss, optimizer=optimizer, rows=LEARNT, **batch())
        yield model


class SingleStudy(Study):
    """Each seed trains alone."""

    def train(
        self,
        model: hosm.ScoreModel,
        recipe: Recipe,
        steps: int,
        rates: Sequence[float],
        *_: Any,
    ) -> Row:
        """The networks are copied into those of the ensemble, which is judged."""
        for seed, rate in enumerate(rates):
            *_, alone = training_alone(self.cell, recipe, steps, rate, seed)
            with torch.no_grad():
                for every, own in zip(model.parameters(), alone.parameters(), strict=True):
                    every[seed] = own[0]
        return {"steps": steps, "evaluations": recipe.evaluations_in(steps, self.cell.batch)}


class TimedStudy(SingleStudy):
    """Each row takes as much processor time as plain order one does for the budget."""

    def steps(self, recipe: Recipe) -> int:
        costs = self.row("costs", self.costs)["over plain"]
        return round(self.cell.budget / costs[recipe.family])

    def costs(self) -> Row:
        """Seconds of a plain step, and what those of the rows take over it in the mean."""
        recipes, count = rows(self.cell), min(self.cell.budget, 8 * EVERY)

        def route(recipe: Recipe) -> Callable[[], object]:
            return partial(next, training_alone(self.cell, recipe, count + 1, RATE, 0))

        routes = {name: route(recipes[name]) for name in FIRST}
        found = experiment.times(routes, count)
        means = {name: sum(seconds) / count for name, seconds in found.items()}
        over = {name: mean / means["one"] for name, mean in means.items()}
        return {"seconds": means["one"], "over plain": over}


class Setting(NamedTuple):
    """What differs from the base: fields of the cell, and the rate."""

    changes: dict[str, Any]
    rate: float = RATE
    study: type[Study] = Study


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
    "a single network": Setting({}, study=SingleStudy),
} | {
    f"equal time, rate {rate:.0e}".replace("e-0", "e-"): Setting(
        {"sizes": Sizes(512)}, rate, TimedStudy
    )
    for rate in (1e-3, 3e-3)
}


def studies(
    pattern: str, where: Row, *, smoke: bool, out: Path
) -> Iterator[tuple[str, str, Study]]:
    """The cell, the setting and the study of each."""
    for name in PROBLEMS:
        for setting, (changes, _, study) in SETTINGS.items():
            title = f"{name}, {setting}"
            timed = study is TimedStudy
            if not re.search(pattern, title):
                continue
            if name not in TIMED if timed else name == TRANSFERRED and changes:
                continue
            cell = replace(CELLS[name](), **{"batch": 256, "seeds": SEEDS, "long": None} | changes)
            if smoke:
                cell = replace(cell.small(), seeds=2)
            yield name, setting, study(title, cell, where, out if smoke else DIRECTORY, out)


def main() -> None:
    parser = experiment.parser(__doc__)
    parser.add_argument("--cells", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--out", type=Path, default=Path("recipe_out"), help="of --smoke")
    arguments = parser.parse_args()
    where = experiment.environment(arguments)
    torch.set_num_threads(1)
    every = studies(arguments.cells, where, smoke=arguments.smoke, out=arguments.out)
    for name, setting, study in every:
        recipes, timed = rows(study.cell), isinstance(study, TimedStudy)
        for row in FIRST if timed else ROWS:
            make = partial(study.finish, study.cell.model, recipes[row])
            study.row(row, partial(make, SETTINGS[setting].rate, f"{setting}: {row}"))
        results.show(f"{name}, {setting}", ratios(study.report))


if __name__ == "__main__":
    main()
