r"""The schedule of EDM, whose training draws log σ from a normal distribution.

Source:
    Karras et al., arXiv 2206.00364, table 1.
"""

# ruff: noqa: D102  (Schedule says what each method returns, and the class its formulas)

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hosm_losses.schedules.base import as_time
from hosm_losses.schedules.continuous import Parametric

SQRT_2 = math.sqrt(2)
# Of a normal distribution, what draws in double precision can still be told apart in.
LEAST_MASS = 1e-9


@dataclass(frozen=True, kw_only=True)
class EDMSchedule(Parametric):
    """Karras et al.: α = 1, σ = t; training draws log σ from N(−1.2, 1.2²), t in the range.

    Its drift is 0, its squared diffusion 2 t. A draw outside [t_min, t_max], 2e-5 of all in the
    default range, becomes another one inside, so that the draws have a density.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    log_mean: float = -1.2
    log_std: float = 1.2

    _rules = ("log_mean < inf", "0 < log_std")

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t).clone()

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        return self.clip(as_time(log_sigma_hat).exp())

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return 2 * as_time(t)

    def drift(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        zeros = self.drift(t)
        return zeros, torch.ones_like(zeros)

    def _draw(self, shape: tuple[int], **options: Any) -> Tensor:
        normal = torch.randn(shape, **options)
        sign, low, high, inside = self._standard
        z = sign * normal.to(torch.float32 if normal.device.type == "mps" else torch.float64)
        # A draw in a tail is uniform in the tail's mass, and becomes what is so in that inside.
        below = 0.5 * (1 + torch.erf(z / SQRT_2)) / _mass_below(low)
        above = 0.5 * (1 - torch.erf(z / SQRT_2)) / _mass_below(-high)
        mass = _mass_below(low) + inside * torch.where(z < low, below, above)
        again = (SQRT_2 * torch.erfinv(2 * mass - 1)).clamp(low, high)
        kept = torch.where((z < low) | (z > high), sign * again.to(normal.dtype), normal)
        return self.clip((self.log_mean + self.log_std * kept).exp())

    def _density(self, t: Tensor) -> Tensor:
        standard = (t.log() - self.log_mean) / self.log_std
        unit = self.log_std * math.sqrt(2 * math.pi) * self._standard[-1]
        return torch.exp(-0.5 * standard.square()) / (t * unit)

    @property
    def _standard(self) -> tuple[int, float, float, float]:
        """A sign, the range of sign · z for standard normal z, and the mass inside.

        The sign puts most of the range below 0, where a mass keeps its digits.
        """
        low, high = (
            (math.log(t) - self.log_mean) / self.log_std if t > 0 else -math.inf
            for t in (self.t_min, self.t_max)
        )
        sign = 1 if low + high <= 0 else -1
        low, high = (low, high) if sign == 1 else (-high, -low)
        inside = _mass_below(high) - _mass_below(low)
        if inside < LEAST_MASS:
            expected = "log_mean and log_std by which some draws fall between t_min and t_max"
            raise ValueError(f"EDMSchedule: expected {expected}; got {self}.")
        return sign, low, high, inside


def _mass_below(z: float) -> float:
    """Mass of the standard normal distribution below z."""
    return 0.5 * math.erfc(-z / SQRT_2)
