"""Coordinates in which Gaussian data do not move along the ODE; the formulas are in `paths`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import expand_right, sum_elements
from hosm_losses.schedules import Schedule

Span = tuple[float, float]  # u = log σ̂ at the start of a path and at its end


class NoiseLevel(NamedTuple):
    """α, σ and the scale c at given u = log σ̂; all fields but t broadcast against a batch."""

    t: Tensor  # the schedule's time (n,), never outside [t_min, t_max]
    alpha: Tensor
    sigma: Tensor
    sigma_hat: Tensor  # σ/α
    scale: Tensor  # c, per element if the data's std is per element


@dataclass(frozen=True)
class Coordinates:
    """z = (x/α − mean)/c with c² = std² + σ̂²."""

    schedule: Schedule
    mean: Tensor  # of the data, broadcast to (1, *)
    std: Tensor  # of the data, broadcast to (1, *)
    log_size: float  # log of the root mean square of std, on the host
    start: float | None = None  # log σ̂ at the data end; None for t_min

    @property
    def span(self) -> Span:
        """log σ̂ at the data end and at the noise end."""
        low, high = self.schedule.log_sigma_hat_range
        return low if self.start is None else self.start, high

    def levels(self, log_sigma_hat: Tensor) -> Callable[[slice], NoiseLevel]:
        """Return a function that maps slices of a grid u (n,) to their noise levels.

        A slice of length one gives one level for the whole batch, and a slice of length B gives
        one level for each sample. The schedule is evaluated once for the whole grid. The scale may
        have as many elements as a sample, so it is computed only for the slice.
        """
        t = self.schedule.time(log_sigma_hat)
        alpha, sigma = self.schedule(t)
        alphas, sigmas = expand_right(alpha, self.mean), expand_right(sigma, self.mean)

        def level(place: slice) -> NoiseLevel:
            sigma_hat = sigmas[place] / alphas[place]
            scale = torch.sqrt(self.std.square() + sigma_hat.square())
            return NoiseLevel(t[place], alphas[place], sigmas[place], sigma_hat, scale)

        return level

    def level(self, log_sigma_hat: Tensor) -> NoiseLevel:
        """The noise levels at u = log σ̂ (n,), in the precision of u."""
        return self.levels(log_sigma_hat)(slice(None))

    def ends(self, span: Span) -> tuple[NoiseLevel, NoiseLevel]:
        """The noise levels at both ends of a span of u, for a whole batch."""
        level = self.levels(torch.tensor(span, dtype=self.std.dtype, device=self.std.device))
        return level(slice(0, 1)), level(slice(1, 2))

    def to_z(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Convert data coordinates to z."""
        return (x / level.alpha - self.mean) / level.scale

    def to_x(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Convert z to data coordinates."""
        return level.alpha * (level.scale * z + self.mean)

    def slope(self, z: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """dz/du for the predicted noise ε̂."""
        ratio = level.sigma_hat / level.scale
        return ratio * (noise - ratio * z)

    def integrand(self, divergence: Tensor, level: NoiseLevel) -> Tensor:
        """σ ∇·ε̂ − Σ_i σ̂²/c² from the divergence ∇·ε̂ (K, n)."""
        shrinking = (level.sigma_hat / level.scale).square()
        return level.sigma.reshape(-1) * divergence - sum_elements(shrinking, 1)

    def log_volume(self, level: NoiseLevel) -> Tensor:
        """Σ_i log(α c), (n,)."""
        return sum_elements((level.alpha * level.scale).log(), 1)

    def log_gaussian(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The log-density (B,) of x at a noise level, for Gaussian data with this mean and std."""
        normalisation = x[0].numel() * math.log(2 * math.pi)
        squares = sum_elements(self.to_z(x, level).square(), 1)
        return -(squares + normalisation) / 2 - self.log_volume(level)

    def covector(self, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The gradient of the log-density with respect to z.

        The result is exact if the model's score equals the score of its ODE.
        """
        return -(level.scale / level.sigma_hat) * noise


def rounding(dtype: torch.dtype) -> float:
    """The least error in a log-density, in nats, due to rounding in a network of this dtype."""
    return 0.0 if dtype == torch.float64 else 1e-6
