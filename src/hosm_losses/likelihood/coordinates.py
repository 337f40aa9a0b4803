r"""The probability-flow ODE in coordinates where every schedule is one ODE, and nearly flat.

What:
    With σ̂ = σ/α and u = log σ̂, y = x/α moves with dy/du = σ̂ ε̂ whatever the schedule. Centred
    and scaled by what the data's Gaussian would have at that noise, z = (y − m)/c with c² = s² +
    σ̂², it does not move at all for data N(m, s²).

Formula:
    dz/du = (σ̂/c) ε̂ − (σ̂²/c²) z
    log p_x(x₀) = log p_T(x_T) + Σ_i log(α₁ c₁/(α₀ c₀)) + ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du
    0 the data end, 1 the noise end; the sums run over the elements of a sample.

Source:
    Kingma et al., "Variational Diffusion Models", arXiv 2107.00630; Karras et al.,
    arXiv 2206.00364, for y and the scaling; Zheng et al., ICML 2023, for log SNR as time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import expand_right, over_elements
from hosm_losses.schedules import Schedule


class NoiseLevel(NamedTuple):
    """What α, σ and the scale are at some u; all but t are expanded to multiply a batch."""

    t: Tensor  # the schedule's time (n,), never outside [t_min, t_max]
    alpha: Tensor
    sigma: Tensor
    sigma_hat: Tensor  # σ/α
    scale: Tensor  # c, by element where the data's std is


@dataclass(frozen=True)
class Coordinates:
    """z = (x/α − mean)/c with c² = std² + σ̂²."""

    schedule: Schedule
    mean: Tensor  # of the data, broadcast to (1, *)
    std: Tensor  # of the data, broadcast to (1, *)

    def level(self, log_sigma_hat: Tensor) -> NoiseLevel:
        """The noise level at u = log σ̂ (n,), in the precision of u."""
        return self._scaled(*self._asked(log_sigma_hat))

    def levels(self, log_sigma_hat: Tensor) -> Callable[[int], NoiseLevel]:
        """A function of i that gives a whole batch the level u_i of a grid (n,)."""
        # The schedule is asked once for all; the scale, as large as a sample, is made when due.
        parts = self._asked(log_sigma_hat)
        return lambda index: self._scaled(*(part[index : index + 1] for part in parts))

    def ends(self, span: tuple[float, float]) -> tuple[NoiseLevel, NoiseLevel]:
        """The levels of a whole batch at both ends of a span of u."""
        level = self.levels(torch.tensor(span, dtype=self.std.dtype, device=self.std.device))
        return level(0), level(1)

    def _asked(self, log_sigma_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = self.schedule.time(log_sigma_hat)
        alpha, sigma = self.schedule(t)
        return t, expand_right(alpha, self.mean), expand_right(sigma, self.mean)

    def _scaled(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> NoiseLevel:
        sigma_hat = sigma / alpha
        scale = torch.sqrt(self.std.square() + sigma_hat.square())
        return NoiseLevel(t, alpha, sigma, sigma_hat, scale)

    def to_z(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Data coordinates to z."""
        return (x / level.alpha - self.mean) / level.scale

    def to_x(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Z to data coordinates."""
        return level.alpha * (level.scale * z + self.mean)

    def slope(self, z: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """dz/du for the predicted noise ε̂."""
        ratio = level.sigma_hat / level.scale
        return ratio * (noise - ratio * z)

    def integrand(self, divergence: Tensor, level: NoiseLevel) -> Tensor:
        """σ ∇·ε̂ − Σ_i σ̂²/c² from the divergence ∇·ε̂ (K, n)."""
        shrinking = over_elements((level.sigma_hat / level.scale).square(), 1)
        return level.sigma.reshape(-1) * divergence - shrinking

    def log_volume(self, level: NoiseLevel) -> Tensor:
        """Σ_i log(α c), (n,)."""
        return over_elements((level.alpha * level.scale).log(), 1)

    def covector(self, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The gradient in z of the log-density, where the model's score is that of its ODE."""
        return -(level.scale / level.sigma_hat) * noise


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64, but float32 on devices that have no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64
