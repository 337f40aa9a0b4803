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

__all__ = ["Coordinates", "Place"]

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import expand_right
from hosm_losses.schedules import Schedule


class Place(NamedTuple):
    """Where on the path: what α, σ and the scale are at some u.

    Attributes:
        t: the schedule's time (n,), never outside [t_min, t_max].
        alpha: α, expanded to multiply a batch.
        sigma: σ, likewise.
        sigma_hat: σ/α, likewise.
        scale: c, likewise, and by element where the data's std is.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    sigma_hat: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Coordinates:
    """z = (x/α − mean)/c with c² = std² + σ̂².

    Attributes:
        schedule: the noise schedule.
        mean: the data's mean, broadcast to (1, *).
        std: the data's standard deviation, broadcast to (1, *).
    """

    schedule: Schedule
    mean: Tensor
    std: Tensor

    def place(self, log_sigma_hat: Tensor) -> Place:
        """The place at u = log σ̂ (n,), in the precision of u."""
        schedule = self.schedule
        t = schedule.time(log_sigma_hat)
        alpha, sigma = (expand_right(part, self.mean) for part in schedule(t))
        sigma_hat = sigma / alpha
        return Place(
            t, alpha, sigma, sigma_hat, torch.sqrt(self.std.square() + sigma_hat.square())
        )

    def at(self, log_sigma_hat: float) -> Place:
        """The place at one u, for a whole batch."""
        return self.place(self.std.new_full((1,), log_sigma_hat))

    def to_z(self, x: Tensor, place: Place) -> Tensor:
        """Data coordinates to z."""
        return (x / place.alpha - self.mean) / place.scale

    def to_x(self, z: Tensor, place: Place) -> Tensor:
        """Z to data coordinates."""
        return place.alpha * (place.scale * z + self.mean)

    def slope(self, z: Tensor, noise: Tensor, place: Place) -> Tensor:
        """dz/du for the predicted noise ε̂."""
        ratio = place.sigma_hat / place.scale
        return ratio * (noise - ratio * z)

    def integrand(self, divergence: Tensor, place: Place) -> Tensor:
        """σ ∇·ε̂ − Σ_i σ̂²/c² from the divergence ∇·ε̂ (K, n)."""
        shrinking = (place.sigma_hat / place.scale).square()
        return _flat(place.sigma)[:, 0] * divergence - _flat(shrinking).sum(-1)

    def log_volume(self, place: Place) -> Tensor:
        """Σ_i log(α c), (n,)."""
        return _flat((place.alpha * place.scale).log()).sum(-1)

    def covector(self, noise: Tensor, place: Place) -> Tensor:
        """The gradient in z of the log-density, where the model's score is that of its ODE."""
        return -(place.scale / place.sigma_hat) * noise


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1)
