"""The paper's procedure: fine-tune a first-order checkpoint with orders two and three.

The script ramps up the weights of the higher orders, clips gradients and keeps an EMA:

    python docs/examples/fine_tuning.py [--steps 1500]
"""

import math
from argparse import ArgumentParser

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

from hosm_losses import Adaptive, FirstOrderDSM, ScoreModel, ThirdOrderDSM, VPSchedule, ode_nll


class Network(nn.Module):
    """A network that predicts the noise in points of the plane, given features of log σ̂."""

    def __init__(self, schedule: VPSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        hidden = (nn.Linear(128, 128), nn.SiLU())
        self.layers = nn.Sequential(nn.Linear(5, 128), nn.SiLU(), *hidden, nn.Linear(128, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return ε̂(x, t)."""
        level = self.schedule.log_sigma_hat(t)[:, None] / 4
        return self.layers(torch.cat([x, level, level.sin(), level.cos()], 1))


def draw(count: int) -> torch.Tensor:
    """Draw points from eight Gaussians on a ring."""
    angle = torch.randint(0, 8, (count,)) * math.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(count, 2)


def main() -> None:
    """Train, fine-tune, and print the ODE's mean −log p in nats after each phase."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of each of the two phases")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = ScoreModel(Network(VPSchedule()), VPSchedule())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    held_out = draw(256)
    phases = {"order 1": FirstOrderDSM(model), "orders 1 to 3": ThirdOrderDSM(model)}
    for name, objective in phases.items():
        optimizer = torch.optim.Adam(model.parameters(), 1e-3 if name == "order 1" else 3e-4)
        for step in trange(steps, desc=name, leave=False):
            ramp = min(1.0, 2 * step / steps)
            options = {} if name == "order 1" else {"weights": (1, 0.5 * ramp, 0, 0.1 * ramp)}
            optimizer.zero_grad()
            objective(draw(256), **options).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
        result = ode_nll(average.module, held_out, solver=Adaptive(), divergence="exact")
        print(f"{name}: {result.summary().nll:.4f} nats")


if __name__ == "__main__":
    main()
