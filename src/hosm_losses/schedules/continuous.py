r"""The usual noise schedules, in closed form.

Source:
    VP, VE and sub-VP: Song et al., arXiv 2011.13456, appendix B. Cosine: Nichol and Dhariwal,
    arXiv 2102.09672, equation 17. Linear flow: Lipman et al., arXiv 2210.02747. EDM: Karras et
    al., arXiv 2206.00364, table 1.

Precision:
    In float32, 1 − α² loses nearly all significant digits near t_min. Therefore, σ is computed
    with expm1 or as a product of sines, with a relative error below 1e-6. If α² + σ² = 1, σ′ is
    computed as −(α/σ) α′, which loses no digits to cancellation.
"""

# ruff: noqa: D102  (Schedule says what each method returns, and each class its formulas)

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import widest_dtype
from hosm_losses.schedules.base import Schedule, as_time

SQRT_2 = math.sqrt(2)


@dataclass(frozen=True, kw_only=True)
class _LinearBeta(Schedule):
    """The base class of VP and sub-VP; defines β, the integral B of β, the inverse of B, and α."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    _prior_std = 1.0

    def beta(self, t: Tensor | float) -> Tensor:
        """Return β(t) = β₀ + (β₁ − β₀) t."""
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def integrated_beta(self, t: Tensor | float) -> Tensor:
        """Return B(t) = ∫₀ᵗ β = β₀ t + ½ (β₁ − β₀) t²."""
        t = as_time(t)
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(-0.5 * self.integrated_beta(t))

    def drift(self, t: Tensor | float) -> Tensor:
        return -0.5 * self.beta(t)

    def _time_at(self, b: Tensor) -> Tensor:
        # Clamped to bounds outside every range, so that no quotient is 0/0 or inf/inf.
        b = b.clamp(torch.finfo(b.dtype).tiny, 1e30)
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b)
        return self.clip(2 * b / (self.beta_min + root))


@dataclass(frozen=True, kw_only=True)
class VPSchedule(_LinearBeta):
    """Variance-preserving, with linear β: α = exp(−B/2), σ² = 1 − α², B = β₀ t + ½ (β₁ − β₀) t².

    The drift is f = −β/2, the squared diffusion is g² = β, and B = log(1 + σ̂²).

    Example:
        >>> alpha, sigma = VPSchedule()(torch.tensor([1e-5, 1.0]))
        >>> bool(torch.allclose(alpha**2 + sigma**2, torch.ones(2)))
        True
    """

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(_one_minus_exp(self.integrated_beta(t)))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        twice = 2 * as_time(log_sigma_hat)
        return self._time_at(torch.logaddexp(twice, torch.zeros_like(twice)))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return self.beta(t)

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        alpha, sigma = self(t)
        slope = alpha * self.drift(t)
        return slope, -(alpha / sigma) * slope


@dataclass(frozen=True, kw_only=True)
class SubVPSchedule(_LinearBeta):
    """Sub-VP, with linear β: α = exp(−B/2), σ = 1 − α², and B as in VPSchedule.

    The drift is f = −β/2, the squared diffusion is g² = β (1 − α⁴), and B = 2 asinh(σ̂/2).
    """

    def sigma(self, t: Tensor | float) -> Tensor:
        return _one_minus_exp(self.integrated_beta(t))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        return self._time_at(2 * _asinh(0.5 * as_time(log_sigma_hat).exp()))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return self.beta(t) * _one_minus_exp(2 * self.integrated_beta(t))

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        alpha = self.alpha(t)
        slope = alpha * self.drift(t)
        return slope, -2 * alpha * slope


@dataclass(frozen=True, kw_only=True)
class VESchedule(Schedule):
    """Variance-exploding, geometric: α = 1, σ = σ_min (σ_max/σ_min)^t; log σ̂ is linear in t.

    The drift is 0, and the squared diffusion is g² = 2 σ² log(σ_max/σ_min).
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        middle = math.sqrt(self.sigma_min * self.sigma_max)  # centred, for small errors in float32
        return middle * torch.exp(self._log_ratio * (as_time(t) - 0.5))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        return self.clip((as_time(log_sigma_hat) - math.log(self.sigma_min)) / self._log_ratio)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return 2 * self._log_ratio * self.sigma(t).square()

    def drift(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        return self.drift(t), self._log_ratio * self.sigma(t)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Schedule):
    """Cosine: α = cos(φ(t))/cos(φ(0)) with φ(t) = π/2 (t + s)/(1 + s), σ² = 1 − α².

    The drift is f = −φ′ tan φ, and the squared diffusion is −2 f. The schedule ends at
    t_max = 0.9946, before α reaches 0, so that σ̂ stays finite (about 119 at t_max).
    """

    offset: float = 0.008
    t_min: float = 1e-5
    t_max: float = 0.9946

    _prior_std = 1.0

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1 + self.offset)

    def alpha(self, t: Tensor | float) -> Tensor:
        # The sine of the remaining angle to π/2 keeps the digits that the cosine loses.
        return torch.sin(self._rate * (1 - as_time(t))) / math.cos(self._rate * self.offset)

    def sigma(self, t: Tensor | float) -> Tensor:
        # σ² = sin(φ(t) − φ(0)) sin(φ(t) + φ(0))/cos²(φ(0))
        t = as_time(t)
        product = torch.sin(self._rate * t) * torch.sin(self._rate * (t + 2 * self.offset))
        return torch.sqrt(product) / math.cos(self._rate * self.offset)

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        # cos²φ = cos²φ(0)/(1 + σ̂²). With s = sin φ(0), c = cos φ(0) and r = √(s² + σ̂²), the angle
        # follows from its sine and its cosine, both times √(1 + σ̂²). No digits cancel in either:
        # φ(t) − φ(0) = atan2(c σ̂²/(r + s), c² + s r).
        sine, cosine = math.sin(self._rate * self.offset), math.cos(self._rate * self.offset)
        # The bounds exceed the range of any schedule in use, yet no square overflows.
        square = (2 * as_time(log_sigma_hat).clamp(-40, 40)).exp()
        root = torch.sqrt(sine**2 + square)
        angle = torch.atan2(cosine * square / (root + sine), cosine**2 + sine * root)
        return self.clip(angle / self._rate)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return 2 * self._rate / torch.tan(self._rate * (1 - as_time(t)))

    def drift(self, t: Tensor | float) -> Tensor:
        return -0.5 * self.squared_diffusion(t)

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        # The sine of φ(t) keeps digits where the cosine of the remaining angle has none.
        t = as_time(t)
        (alpha, sigma), factor = self(t), self._rate / math.cos(self._rate * self.offset)
        slope = -factor * torch.sin(self._rate * (t + self.offset))
        return slope, -(alpha / sigma) * slope


@dataclass(frozen=True, kw_only=True)
class LinearFlowSchedule(Schedule):
    """Linear flow (rectified flow, flow matching): α = 1 − t, σ = t, up to t_max = 0.999.

    The drift is f = −1/(1 − t), the squared diffusion is g² = 2 t/(1 − t), and t = σ̂/(1 + σ̂).
    """

    t_min: float = 1e-4
    t_max: float = 0.999

    _prior_std = 1.0

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t).clone()

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        return self.clip(torch.sigmoid(as_time(log_sigma_hat)))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return 2 * t / (1 - t)

    def drift(self, t: Tensor | float) -> Tensor:
        return -1 / (1 - as_time(t))

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(as_time(t))
        return -ones, ones


@dataclass(frozen=True, kw_only=True)
class EDMSchedule(Schedule):
    """EDM's schedule (Karras et al.): α = 1, σ = t; in training, log σ follows N(−1.2, 1.2²).

    The drift is 0, and the squared diffusion is 2 t. Draws outside [t_min, t_max] (by default, a
    fraction 2e-5 of all draws) are redistributed over the range rather than clamped to its ends,
    so that the times have a density.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    log_mean: float = -1.2
    log_std: float = 1.2

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
        z = sign * normal.to(widest_dtype(normal))
        # The quantile of a draw within its tail, uniform in [0, 1], becomes its quantile inside
        # the range.
        below = 0.5 * (1 + torch.erf(z / SQRT_2)) / _mass_below(low)
        above = 0.5 * (1 - torch.erf(z / SQRT_2)) / _mass_below(-high)
        mass = _mass_below(low) + inside * torch.where(z < low, below, above)
        moved = (SQRT_2 * torch.erfinv(2 * mass - 1)).clamp(low, high)
        truncated = torch.where((z < low) | (z > high), sign * moved.to(normal.dtype), normal)
        return self.clip((self.log_mean + self.log_std * truncated).exp())

    def _density(self, t: Tensor) -> Tensor:
        standard = (t.log() - self.log_mean) / self.log_std
        unit = self.log_std * math.sqrt(2 * math.pi) * self._standard[-1]
        return torch.exp(-0.5 * standard.square()) / (t * unit)

    @property
    def _standard(self) -> tuple[int, float, float, float]:
        """A sign, the ends of the range of sign · z, and the standard normal mass in this range.

        Here, z is (log σ − log_mean)/log_std. The sign is chosen so that most of the range is
        below 0, because probabilities near 0 keep more digits than probabilities near 1.
        """
        low, high = (
            (math.log(t) - self.log_mean) / self.log_std if t > 0 else -math.inf
            for t in (self.t_min, self.t_max)
        )
        sign = 1 if low + high <= 0 else -1
        low, high = (low, high) if sign == 1 else (-high, -low)
        return sign, low, high, _mass_below(high) - _mass_below(low)


# On the CPU, torch.compile replaces expm1 (up to 2.13) and asinh (in 2.6) with formulas that lose
# digits near 0, so other formulas are compiled.


def _one_minus_exp(b: Tensor) -> Tensor:
    """Return 1 − exp(−b) for b ≥ 0."""
    if torch.compiler.is_compiling():
        return 2 * torch.exp(-b / 2) * torch.sinh(b / 2)
    return -torch.expm1(-b)


def _asinh(h: Tensor) -> Tensor:
    """Return asinh(h) for h ≥ 0."""
    if torch.compiler.is_compiling():
        h = h.clamp(max=1e18)  # whose square is finite; beyond t_max
        return torch.log1p(h + h.square() / (1 + torch.sqrt(1 + h.square())))
    return torch.asinh(h)


def _mass_below(z: float) -> float:
    """Return the probability that a standard normal variable is below z."""
    return 0.5 * math.erfc(-z / SQRT_2)
