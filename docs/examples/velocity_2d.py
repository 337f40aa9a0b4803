"""A velocity (flow-matching) network in two dimensions, trained further with order one or two.

python docs/examples/velocity_2d.py [--steps 2000]

Prints the mean −log p of held-out points, in nats, under the ODE and under the data's own density.
"""

import copy
import math
from argparse import ArgumentParser

import torch
from torch import Tensor, nn

import hosm_losses as hosm

STD = 0.2
ANGLES = torch.arange(8) * (math.pi / 4)
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
SCHEDULE = hosm.LinearFlowSchedule(t_min=0.01, t_max=0.98)
LOSSES = (hosm.first_order_dsm, hosm.second_order_dsm)
SiLU, Linear = nn.SiLU, nn.Linear


def ring(count: int, generator: torch.Generator) -> Tensor:
    """Draw points (count, 2) from eight Gaussians on a circle."""
    centre = CENTRES[torch.randint(8, (count,), generator=generator)]
    return centre + STD * torch.randn(count, 2, generator=generator)


def train(model, loss, steps: int, rate: float) -> hosm.ScoreModel:  # noqa: ANN001
    """Train for a number of steps, with a learning rate that decays to 0."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, ring(256, generator), generator=generator).backward()
        optimizer.step()
        decay.step()
    return model


class Velocity(nn.Sequential):
    """A network for the velocity at x (B, 2) and t (B,), given the noise level as a feature."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate the layers on x, t and the noise level."""
        level = SCHEDULE.log_sigma_hat(t) / 4
        return super().forward(torch.cat([x, t[:, None], level[:, None]], 1))


def main() -> None:
    """Train with order one, continue with each loss, and compare."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    network = Velocity(Linear(4, 64), SiLU(), Linear(64, 64), SiLU(), Linear(64, 2))
    model = hosm.ScoreModel(network, SCHEDULE, prediction="velocity")
    train(model, hosm.first_order_dsm, steps, 2e-3)
    held_out = ring(1000, torch.Generator().manual_seed(1))
    for loss in LOSSES:
        tuned = train(copy.deepcopy(model), loss, max(1, steps // 2), 5e-4)
        solver = hosm.FixedGrid(data_std=0.7)
        result = hosm.ode_nll(tuned, held_out, solver=solver, divergence="exact")
        nll = result.summary().nll
        print(f"{loss.__name__}: {nll:.4f} nats")
    exponents = -torch.cdist(held_out, CENTRES).square() / (2 * STD**2)
    density = exponents.logsumexp(1) - math.log(8 * 2 * math.pi * STD**2)
    print(f"density of the data: {-density.mean():.4f} nats")


if __name__ == "__main__":
    main()
