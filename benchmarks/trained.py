"""Small networks trained here on data at hand, for the benchmarks of the likelihood.

Trained on the first-order loss under the VE schedule, once in a process; where the variable
HOSM_BENCHMARKS_WEIGHTS names a directory, once for all processes that share it.
"""

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from tqdm import tqdm

import hosm_losses as hosm

HELD_OUT = 64
KEPT = "HOSM_BENCHMARKS_WEIGHTS"
IMAGES = {"images": 4096, "large images": 1024}  # how many are drawn to train on
SIDES = {"images": 16, "large images": 32}
STEPS = {"images": 700, "digits": 3000, "large images": 700}
BATCH = {"images": 64, "digits": 64, "large images": 16}


@dataclass(frozen=True)
class Problem:
    """A model, data it was not trained on, and the standard deviation of the data."""

    model: hosm.ScoreModel
    data: Tensor
    std: float


def drawn_images(count: int, size: int = 16, generator: torch.Generator | None = None) -> Tensor:
    """Soft discs of random colour and place on a shaded background, (count, 3, size, size)."""
    axis = torch.linspace(-1, 1, size)
    rows, columns = axis[:, None], axis[None, :]

    def uniform(*shape):
        return 2 * torch.rand(shape, generator=generator) - 1

    slope = uniform(count, 3, 1, 1) * rows + uniform(count, 3, 1, 1) * columns
    images = 0.4 * uniform(count, 3, 1, 1) + 0.2 * slope
    for _ in range(3):
        away = (rows - uniform(count, 1, 1, 1)) ** 2 + (columns - uniform(count, 1, 1, 1)) ** 2
        disc = torch.sigmoid(20 * (0.25 + 0.1 * uniform(count, 1, 1, 1) - away.sqrt()))
        images = (1 - disc) * images + disc * uniform(count, 3, 1, 1)
    noise = 0.02 * torch.randn(images.shape, generator=generator)
    return images + noise


def digits(generator: torch.Generator) -> Tensor:
    """The 8×8 digits of scikit-learn, dequantized to [−1, 1], in random order, (1797, 64)."""
    from sklearn.datasets import load_digits

    levels = torch.as_tensor(load_digits().data, dtype=torch.float32)
    levels = levels[torch.randperm(len(levels), generator=generator)]
    return -1 + 2 * (levels + torch.rand(levels.shape, generator=generator)) / 17


class Convolutional(nn.Module):
    """Residual blocks with group norm, told the noise level; its input is scaled to unit size."""

    def __init__(self, schedule, std, width=32, blocks=3):
        super().__init__()
        self.schedule, self.std = schedule, std
        self.inner = nn.Conv2d(3, width, 3, padding=1)
        self.level = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.outer = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x, t):
        scaled, features = _seen(x, t, self.schedule, self.std)
        hidden = self.inner(scaled) + self.level(features)[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.outer(F.silu(hidden))


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


def _seen(x, t, schedule, std):
    """What a network sees of x and t: unit size, and log σ̂ with a wave of it."""
    alpha, sigma = schedule(t)
    size = torch.sqrt(alpha**2 * std**2 + sigma**2)
    level = schedule.log_sigma_hat(t) / 4
    scaled = x / size.reshape(-1, *(1,) * (x.ndim - 1))
    return scaled, torch.stack([level, torch.sin(math.pi * level)], 1)


def trained(name: str, steps: int | None = None) -> Problem:
    """Train a network with the first-order loss, under the VE schedule, once in a process.

    Args:
        name: "digits", d = 64; "images", d = 768; or "large images", d = 3072.
        steps: of the optimizer, those of STEPS if None.

    Returns:
        The model in evaluation mode, with 64 samples it has not seen.
    """
    return _trained(name, steps or STEPS[name])


@lru_cache
def _trained(name: str, steps: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "digits":
            everything = digits(generator)
        else:
            everything = drawn_images(IMAGES[name] + HELD_OUT, SIDES[name], generator)
        data, held_out = everything[:-HELD_OUT], everything[-HELD_OUT:]
        schedule = hosm.VESchedule(sigma_max=20.0)
        std = float(data.std())
        network = (Dense if name == "digits" else Convolutional)(schedule, std)
        model = hosm.ScoreModel(network, schedule)
        kept = os.environ.get(KEPT)
        file = Path(kept) / f"{name}-{steps}.pt" if kept else None
        if file is not None and file.exists():
            network.load_state_dict(torch.load(file))
        else:
            _train(model, data, steps, BATCH[name], generator, name)
            if file is not None:
                torch.save(network.state_dict(), file)
    network.eval()
    return Problem(model, held_out, std)


def _train(
    model: hosm.ScoreModel,
    data: Tensor,
    steps: int,
    batch: int,
    generator: torch.Generator,
    name: str,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), f"training, {name}", leave=False):
        rows = torch.randint(len(data), (batch,), generator=generator)
        optimizer.zero_grad()
        hosm.first_order_dsm(model, data[rows], generator=generator).backward()
        optimizer.step()
        decay.step()
