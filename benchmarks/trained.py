"""What likelihoods and gradients are measured on: small networks trained here, an exact score.

Networks are trained on the first-order loss under the VE schedule, once in a process; where the
variable HOSM_BENCHMARKS_WEIGHTS names a directory, once for all processes that share it.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from tests.oracles import GaussianMixture, mixture_noise, paper_mixture
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks import networks
from benchmarks.experiment import seeded, train

HELD_OUT = 64
KEPT = "HOSM_BENCHMARKS_WEIGHTS"
Draw = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Problem:
    """A model, data it was not trained on, their std, and a way to draw what it was trained on."""

    model: hosm.ScoreModel
    data: Tensor
    std: float
    draw: Draw | None = None


def mixture(count: int, generator: torch.Generator) -> Tensor:
    """The 1-D mixture of docs/examples/mixture_1d.py, (count, 1)."""
    return paper_mixture().sample(count, generator).float()


def images(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Soft discs of random colour and place on a shaded background, (count, 3, size, size)."""
    axis = torch.linspace(-1, 1, size)
    rows, columns = axis[:, None], axis[None, :]

    def uniform(*shape):
        return 2 * torch.rand(shape, generator=generator) - 1

    slope = uniform(count, 3, 1, 1) * rows + uniform(count, 3, 1, 1) * columns
    drawn = 0.4 * uniform(count, 3, 1, 1) + 0.2 * slope
    for _ in range(3):
        away = (rows - uniform(count, 1, 1, 1)) ** 2 + (columns - uniform(count, 1, 1, 1)) ** 2
        disc = torch.sigmoid(20 * (0.25 + 0.1 * uniform(count, 1, 1, 1) - away.sqrt()))
        drawn = (1 - disc) * drawn + disc * uniform(count, 3, 1, 1)
    return drawn + 0.02 * torch.randn(drawn.shape, generator=generator)


def digits(count: int, generator: torch.Generator) -> Tensor:
    """The 8×8 digits of scikit-learn, dequantized to [−1, 1], in random order, (count, 64)."""
    from sklearn.datasets import load_digits

    levels = torch.as_tensor(load_digits().data, dtype=torch.float32)
    levels = levels[torch.randperm(len(levels), generator=generator)[:count]]
    return -1 + 2 * (levels + torch.rand(levels.shape, generator=generator)) / 17


class Convolutional(networks.Convolutional):
    """Residual blocks with group norm, told the noise level; its input is scaled to unit size."""

    def __init__(self, schedule, std, width=32, blocks=3):
        super().__init__(width, blocks)
        self.schedule, self.std = schedule, std
        self.level = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x, t):
        scaled, features = _seen(x, t, self.schedule, self.std)
        return self.outer(F.silu(self.through_blocks(scaled, self.level(features))))


class Dense(nn.Module):
    """Residual layers on flat data, told the noise level."""

    def __init__(self, schedule, std, elements=64, width=256, blocks=3):
        super().__init__()
        self.schedule, self.std = schedule, std
        self.inner = nn.Linear(elements + 2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            for _ in range(blocks)
        )
        self.outer = nn.Linear(width, elements)

    def forward(self, x, t):
        scaled, features = _seen(x, t, self.schedule, self.std)
        hidden = self.inner(torch.cat([scaled, features], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.outer(F.silu(hidden))


class Plane(nn.Module):
    """Three hidden layers on points of the plane, beside the noise of Gaussian data.

    x is scaled to unit size, and t is log σ̂. What the layers add is scaled as in EDM, if at all.
    """

    scaled = False

    def __init__(self, schedule, std, activation=nn.SiLU, elements=2, width=96):
        super().__init__()
        self.schedule, self.std = schedule, std
        layers = []
        for inner in (elements + 1, width, width):
            layers += [nn.Linear(inner, width), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, elements))

    def forward(self, x, t):
        alpha, sigma = (each[:, None] for each in self.schedule(t))
        size = torch.sqrt(alpha**2 * self.std**2 + sigma**2)
        level = self.schedule.log_sigma_hat(t)[:, None] / 4
        added = self.layers(torch.cat([x / size, level], 1))
        if self.scaled:
            added = -alpha * self.std / size * added
        return sigma / size**2 * x + added


class Velocity(Plane):
    """The same layers, of x and t as they are."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def _seen(x, t, schedule, std):
    """What a network sees of x and t: unit size, and log σ̂ with a wave of it."""
    alpha, sigma = schedule(t)
    size = torch.sqrt(alpha**2 * std**2 + sigma**2)
    level = schedule.log_sigma_hat(t) / 4
    scaled = x / size.reshape(-1, *(1,) * (x.ndim - 1))
    return scaled, torch.stack([level, torch.sin(math.pi * level)], 1)


class Recipe(NamedTuple):
    """How a network is trained: on how many samples of what, in how many steps and batches."""

    network: Callable[[hosm.Schedule, float], nn.Module]
    data: Draw
    count: int
    steps: int
    batch: int


RECIPES = {
    "digits": Recipe(Dense, digits, 1797 - HELD_OUT, 3000, 64),  # d = 64
    "images": Recipe(Convolutional, partial(images, 16), 4096, 700, 64),  # d = 768
    "large images": Recipe(Convolutional, partial(images, 32), 1024, 700, 16),  # d = 3072
}


def exact(mixture: GaussianMixture) -> Problem:
    """The exact score of a mixture in float64, as a module, whose calls hooks can count."""
    schedule, network = hosm.VESchedule(sigma_max=20.0), nn.Module()
    network.forward = mixture_noise(mixture, schedule)
    data = mixture.sample(HELD_OUT, seeded(0))
    return Problem(hosm.ScoreModel(network, schedule), data, float(data.std()))


@lru_cache
def trained(name: str, steps: int | None = None) -> Problem:
    """The network of a recipe in evaluation mode, with 64 samples it has not seen."""
    recipe, generator = RECIPES[name], seeded(0)
    steps = steps or recipe.steps
    with torch.random.fork_rng():
        torch.manual_seed(0)
        everything = recipe.data(recipe.count + HELD_OUT, generator)
        data, held_out = everything[:-HELD_OUT], everything[-HELD_OUT:]
        schedule, std = hosm.VESchedule(sigma_max=20.0), float(data.std())
        network = recipe.network(schedule, std)
    model = hosm.ScoreModel(network, schedule)

    def rows(count: int, generator: torch.Generator) -> Tensor:
        return data[torch.randint(len(data), (count,), generator=generator)]

    def loss() -> Tensor:
        return hosm.first_order_dsm(model, rows(recipe.batch, generator), generator=generator)

    kept = os.environ.get(KEPT)
    file = Path(kept) / f"{name}-{steps}.pt" if kept else None
    if file and file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(model, loss, steps, name, rate=2e-3)
        if file:
            torch.save(network.state_dict(), file)
    network.eval()
    # Images are drawn anew; of the digits there are no others.
    return Problem(model, held_out, std, rows if name == "digits" else recipe.data)
