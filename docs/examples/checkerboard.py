"""Densities of the ODE on the 2-D checkerboard, after training with orders one, two and three.

Every order trains the same network for the same number of steps or, with --seconds, for the same
processor time. The KL divergence from the data at the noise level of t_min to the density of the
ODE is computed as a sum over a grid, without sampling error.

    python docs/examples/checkerboard.py [--steps 6000 | --seconds 90]
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import mixture_1d as mixture
import torch
from torch import Tensor, nn

import hosm_losses as hosm

SCHEDULE = hosm.VESchedule(sigma_max=20.0)
EDGE = 1.25
# The paper's weights. The paper does not divide its terms by powers of d, hence d²·0.1.
LOSSES = {
    1: hosm.first_order_dsm,
    2: partial(hosm.second_order_dsm, weights=(1, 0.5, 0)),
    3: partial(hosm.third_order_dsm, weights=(1, 0.5, 0, 0.4)),
}


class Network(nn.Module):
    """An MLP for ε̂(x, t) with layers scaled and shifted by features of log σ̂."""

    def __init__(self, data: Tensor, waves: int = 4, width: int = 96) -> None:
        super().__init__()
        self.mean, self.std, self.waves = data.mean(0), data.std(0), waves
        elements = data.shape[1]
        sizes = (elements * (1 + 2 * waves), width, width)
        self.layers = nn.ModuleList(nn.Linear(inputs, width) for inputs in sizes)
        self.times = nn.ModuleList(nn.Linear(17, 2 * width) for _ in sizes)
        self.output = nn.Linear(width, elements)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x (B, d) at t (B,)."""
        sigma = SCHEDULE.sigma(t)[:, None]
        size = (self.std**2 + sigma**2).sqrt()
        standard = (x - self.mean) / size
        features = [
            f(k * standard) for k in range(1, self.waves + 1) for f in (torch.sin, torch.cos)
        ]
        level, hidden = mixture.waves(sigma.log() / 4, 8), torch.cat([standard, *features], 1)
        for layer, times in zip(self.layers, self.times, strict=True):
            scale, shift = times(level).chunk(2, dim=1)
            hidden = nn.functional.silu(layer(hidden) * (1 + scale) + shift)
        return sigma / size * standard + self.output(hidden)


def draw(count: int) -> Tensor:
    """Draw points (count, 2), uniform on 8 of the 16 squares of [−1, 1]²."""
    row = torch.randint(4, (count,))
    corner = torch.stack([row, 2 * torch.randint(2, (count,)) + row % 2], 1)
    return (corner + torch.rand(count, 2)) / 2 - 1


def log_density(x: Tensor) -> Tensor:
    """Return the log-density of the data at t_min, from normal integrals over strips."""
    below = torch.special.ndtr((x[..., None] - torch.linspace(-1, 1, 5)) / SCHEDULE.sigma_min)
    strips = below[..., :-1] - below[..., 1:]
    even, odd = (strips[..., part::2].sum(-1).prod(-1) for part in (0, 1))
    return torch.log((even + odd) / 2)


def train(
    model: hosm.ScoreModel,
    loss: Callable[[], Tensor],
    steps: int = 0,
    seconds: float | None = None,
    rate: float = 2e-3,
) -> str:
    """Train for `seconds` of processor time or, if None, `steps`; return what was spent."""
    optimizer = torch.optim.Adam(model.parameters())
    start, step, spent = time.process_time(), 0, 0.0
    while (part := spent / seconds if seconds else step / steps) < 1:
        optimizer.param_groups[0]["lr"] = rate / 2 * (1 + math.cos(math.pi * part))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        step, spent = step + 1, time.process_time() - start
    return f"{step} steps, {spent:.0f} s"


def nll(model: hosm.ScoreModel, x: Tensor) -> Tensor:
    """Return −log p (B,) under the ODE, with the exact divergence."""
    solver = hosm.FixedGrid(96, data_std=3**-0.5)
    return hosm.ode_nll(model, x, solver=solver, divergence="exact", batch_size=4096).nll


def main() -> None:
    """Train with every order and print the KL divergences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seconds", type=float, help="of training for each order, not --steps")
    parser.add_argument("--side", type=int, default=200, help="of the grid, in points")
    options = parser.parse_args()
    if options.steps < 1 or not (options.seconds is None or options.seconds > 0):
        parser.error("--steps, --seconds: expected positive numbers")
    torch.set_num_threads(1)
    axis = torch.linspace(-EDGE, EDGE, options.side)
    grid = torch.cartesian_prod(axis, axis)
    log_q = log_density(grid.double())
    for order, loss in LOSSES.items():
        torch.manual_seed(0)
        model = hosm.ScoreModel(Network(draw(4096)), SCHEDULE)
        cost = train(
            model, lambda m=model, f=loss: f(m, draw(256)), options.steps, options.seconds
        )
        log_p = -nll(model, grid)
        # Points where the density of the data is zero in float64 contribute nothing.
        ratio = torch.where(log_q.isinf(), 0, log_q - log_p)
        kl = float((log_q.exp() * ratio).sum() * (axis[1] - axis[0]) ** 2)
        print(f"order {order}: KL {kl:.4f} nats ({cost})", flush=True)


if __name__ == "__main__":
    main()
