"""What are quiet batches worth on finite data, where a validation set chooses when to stop?

    python -m benchmarks.finite [--cells REGEX] [--rows REGEX] [--out DIR] [--dirty | --smoke]

Cells, networks, budgets and batches are those of `benchmarks.worth`, with five seeds.
    1. Each seed has points of its own, which its batches draw with replacement; the references of
       averaged targets are the batch. Digits are those of the split, dequantized in every draw.
    2. Every row trains each seed at each of RATES. A running average of the weights with DECAY is
       what is validated, after every tenth of the steps: by order one's loss, at noises and times
       (uniform in log σ̂) that never change. Its points are as many fresh ones as it trains on, at
       most MOST, or those of the split; fewer points are repeated, to some MOST rows in all. These
       are not counted as evaluations.
    3. Each seed is judged at the rate and the tenth where its validation loss was least, and at
       the end, at the rate where it was least there. It is compared with plain order one by seed.
       A seed that has lost a mode is not left out: it is overfitting that is measured here.

This was fixed before anything was run, but for rates and averages. A first run took the rates that
`benchmarks.worth` transfers, .01 for quiet batches, and the weights of the checkpoint: stopped
midway, with no decay behind them, quiet batches had 1.2 (.86 to 1.7) times the KL divergence of
plain order one at 1,000 points of the checkerboard. A second one chose from .001, .003 and .01:
at 2,000 points of the many-well every row chose .001, and quiet batches had 1.17 (1.05 to 1.29).
Long trainings on fresh data were planned, and never run.

Each row is written to results/finite/CELL.json at once, and a second run goes on where the first
one stopped. A row is one command:

    python -m benchmarks.finite --cells '^checkerboard, d = 2, 1,000' --rows '^one, averaged$'
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks import results, worth
from benchmarks.experiment import seeded
from benchmarks.worth_problems import CELLS, Cell, Digits
from benchmarks.worth_quantities import Row, by_member, judge, ratios

DIRECTORY = results.DIRECTORY / "finite"
RATES, DECAY = (3e-4, 1e-3, 3e-3, 1e-2), 0.998
MOST, TENTHS = 10_000, 10
CHANGES = {
    "checkerboard, d = 2, 1,000 points": {"fixed": 1_000},
    "checkerboard, d = 2, 10,000 points": {"fixed": 10_000},
    "many-well, d = 8, rotated, 2,000 points": {"fixed": 2_000},
    "many-well, d = 8, rotated, 20,000 points": {"fixed": 20_000},
    "digits, d = 64": {},
}


@dataclass(frozen=True)
class FiniteCell(Cell):
    """A cell whose seeds have a number of points to train on, or what the cell draws.

    The members of its ensembles are each seed at each rate.
    """

    fixed: int | None = None
    rates: tuple[float, ...] = RATES

    @property
    def members(self) -> list[int]:
        """The seed of each member."""
        return [seed for seed in range(self.seeds) for _ in self.rates]

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """The points of each seed (N, S, d): what it trains on, and what it is validated by."""
        train = self.fixed or 0
        if isinstance(self.density, Digits):
            rows = self.density.validation
            points = self.density.dequantize(rows, seeded(1))
            every = [points] * self.seeds
        else:
            count = train + min(self.fixed or MOST, MOST)
            every = [Cell.draw(self, count, seeded(100 + seed)) for seed in range(self.seeds)]
        points = torch.stack(every, 1)
        return points[:train], points[train:]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of all members in turns, (count, d)."""
        if self.fixed is None:
            return super().draw(count, generator)
        shape = (count // len(self.members), len(self.members))
        rows = torch.randint(self.fixed, shape, generator=generator)
        return self.data[0][rows, torch.tensor(self.members)].flatten(0, 1)

    def validate(self, model: hosm.ScoreModel) -> Tensor:
        """Order one's loss of each member, always at the same times and noises for a seed."""
        points, count = self.data[1], len(self.members)
        x0 = points.repeat(max(1, MOST // len(points)), 1, 1)
        low, high = self.schedule.log_sigma_hat_range
        t = self.schedule.time(torch.linspace(low, high, len(x0))).repeat_interleave(count)
        noise = torch.randn(x0.shape, generator=seeded(3))
        x0, noise = (part[:, self.members].flatten(0, 1) for part in (x0, noise))
        with torch.no_grad():
            terms = hosm.first_order_dsm(model, x0, t=t, noise=noise, reduction="none")
        return by_member(terms, count).mean(1)


class FiniteStudy(worth.Study):
    """Rows whose rates and steps are chosen by validation."""

    cell: FiniteCell

    def validated(self, recipe: worth.Recipe, bar: str) -> Row:
        """The row of a recipe: the seeds as they are chosen by validation, and at the end."""
        cell, states, losses = self.cell, [], []
        model, average = cell.model(cell.members), cell.model(cell.members)
        steps = self.steps(recipe)
        marks = sorted({round(steps * k / TENTHS) for k in range(1, TENTHS + 1)})

        def watch(step: int) -> None:
            share = 1 - min(DECAY, step / (step + 9))
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, share)
            if step in marks:
                states.append([parameter.detach().clone() for parameter in average.parameters()])
                losses.append(cell.validate(average))

        row = self.train(model, recipe, steps, [*cell.rates] * cell.seeds, bar, watch)
        validation = torch.stack(losses).unflatten(1, (cell.seeds, len(cell.rates)))

        def judged(mark: Tensor, rate: Tensor) -> Row:
            """The seeds, each as it was at a mark and a rate."""
            members = torch.arange(cell.seeds) * len(cell.rates) + rate
            chosen = cell.model(range(cell.seeds))
            with torch.no_grad():
                for parameter, each in zip(
                    chosen.parameters(), zip(*states, strict=True), strict=True
                ):
                    parameter.copy_(torch.stack(each)[mark, members])
            where = {"rate": [cell.rates[i] for i in rate], "chosen": [marks[i] for i in mark]}
            return where | judge(cell, chosen, cell.seeds)

        last = torch.full((cell.seeds,), len(marks) - 1)
        best = validation.transpose(0, 1).flatten(1).argmin(1)
        row |= judged(best // len(cell.rates), best % len(cell.rates))
        end = judged(last, validation[-1].argmin(1))
        return row | {"validation": validation.tolist(), "end": end}


def finite_cell(title: str) -> FiniteCell:
    """The cell of the study that a title begins with, changed."""
    name = re.sub(r", [\d,]+ points$", "", title)
    changes = {"seeds": 5, "long": None} | CHANGES[title]
    return replace(FiniteCell(**vars(CELLS[name]())), **changes)


def compared(report: Row) -> Row:
    """Every row at the choice and at the end, beside plain order one there."""
    found: Row = {}
    for when in ("choice", "end"):
        rows = {}
        for name, row in report["rows"].items():
            at = row if when == "choice" else row.get("end", row)
            rows[name] = at | {"lost": [0.0] * len(at["lost"])} if "lost" in at else at
        for name, row in ratios({"rows": rows}, lambda _: "one").items():
            found[f"{name}, {when}"] = row
    return found


def main() -> None:
    arguments, where = worth.begin(__doc__, "finite_out", "of --smoke")
    directory = arguments.out if arguments.smoke else DIRECTORY
    for name in filter(partial(re.search, arguments.cells), CHANGES):
        cell = finite_cell(name)
        if arguments.smoke:
            cell = replace(cell.small(), seeds=2, fixed=cell.fixed and 16)
        study = FiniteStudy(name, cell, where, directory, arguments.out)
        for row in filter(partial(re.search, arguments.rows), worth.FIRST_ORDER):
            study.row(row, partial(study.validated, worth.rows(cell)[row], row))
        results.show(name, compared(study.report))


if __name__ == "__main__":
    main()
