r"""The noise schedules of the field, in closed form.

Source:
    VP, VE and sub-VP: Song et al., arXiv 2011.13456, appendix B. Cosine: Nichol and Dhariwal,
    arXiv 2102.09672, equation 17. EDM: Karras et al., arXiv 2206.00364, table 1. Linear flow:
    Lipman et al., arXiv 2210.02747.

Precision:
    1 − α² loses every digit near t_min; σ is written with expm1 or a product of sines, and is
    right to 1e-6 in float32.
"""

__all__ = [
    "CosineSchedule",
    "EDMSchedule",
    "LinearFlowSchedule",
    "SubVPSchedule",
    "VESchedule",
    "VPSchedule",
]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hosm_losses.schedule import Schedule, as_time


@dataclass(frozen=True, kw_only=True)
class _LinearBeta(Schedule):
    """What VP and sub-VP share: β(t) = β₀ + (β₁ − β₀) t and its integral B(t)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    @property
    def prior_std(self) -> float:
        """1, as σ(t_max) is to four digits."""
        return 1.0

    def beta(self, t: Tensor | float) -> Tensor:
        """β(t) = β₀ + (β₁ − β₀) t."""
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def integrated_beta(self, t: Tensor | float) -> Tensor:
        """B(t) = ∫₀ᵗ β = β₀ t + ½ (β₁ − β₀) t²."""
        t = as_time(t)
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def alpha(self, t: Tensor) -> Tensor:
        """α = exp(−B/2)."""
        return torch.exp(-0.5 * self.integrated_beta(t))

    def drift(self, t: Tensor | float) -> Tensor:
        """f = −β/2."""
        return -0.5 * self.beta(t)

    def _time_of(self, integrated_beta: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integrated_beta)
        return 2 * integrated_beta / (self.beta_min + root)


@dataclass(frozen=True, kw_only=True)
class VPSchedule(_LinearBeta):
    """Variance preserving, β linear: α = exp(−B/2), σ² = 1 − α², B = β₀ t + ½ (β₁ − β₀) t².

    Example:
        >>> alpha, sigma = VPSchedule()(torch.tensor([1e-5, 1.0]))
        >>> bool(torch.allclose(alpha**2 + sigma**2, torch.ones(2)))
        True
    """

    def sigma(self, t: Tensor) -> Tensor:
        """σ = (1 − e^{−B})^½."""
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂ = ½ log(e^B − 1)."""
        b = self.integrated_beta(t)
        return 0.5 * (b + torch.log(-torch.expm1(-b)))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂: B = log(1 + σ̂²), solved for t."""
        twice = 2 * as_time(log_sigma_hat)
        return self._time_of(torch.logaddexp(twice, torch.zeros_like(twice)))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = β."""
        return self.beta(t)


@dataclass(frozen=True, kw_only=True)
class SubVPSchedule(_LinearBeta):
    """Sub-VP, β linear: α = exp(−B/2), σ = 1 − e^{−B}."""

    def sigma(self, t: Tensor) -> Tensor:
        """σ = 1 − e^{−B}."""
        return -torch.expm1(-self.integrated_beta(t))

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂ = log(2 sinh(B/2))."""
        b = self.integrated_beta(t)
        return 0.5 * b + torch.log(-torch.expm1(-b))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂: B = 2 asinh(σ̂/2), solved for t."""
        return self._time_of(2 * torch.asinh(0.5 * torch.exp(as_time(log_sigma_hat))))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = β (1 − e^{−2B})."""
        return -self.beta(t) * torch.expm1(-2 * self.integrated_beta(t))


@dataclass(frozen=True, kw_only=True)
class VESchedule(Schedule):
    """Variance exploding, geometric: α = 1, σ = σ_min (σ_max/σ_min)^t; log σ̂ is linear in t."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def _log_middle(self) -> float:
        return 0.5 * math.log(self.sigma_min * self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        """α = 1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """σ = σ_min (σ_max/σ_min)^t, from the geometric middle, where float32 errs least."""
        return math.exp(self._log_middle) * torch.exp(self._log_ratio * (t - 0.5))

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂ = log σ_min + t log(σ_max/σ_min)."""
        return self._log_middle + self._log_ratio * (as_time(t) - 0.5)

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂."""
        return (as_time(log_sigma_hat) - math.log(self.sigma_min)) / self._log_ratio

    def drift(self, t: Tensor | float) -> Tensor:
        """f = 0."""
        return torch.zeros_like(as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = 2 σ² log(σ_max/σ_min)."""
        return 2 * self._log_ratio * self.sigma(as_time(t)).square()


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Schedule):
    """Cosine: α = cos(φ(t))/cos(φ(0)) with φ(t) = π/2 (t + s)/(1 + s), σ² = 1 − α².

    It ends at t_max = 0.9946, before α reaches 0, so that σ̂ is finite (about 119).
    """

    offset: float = 0.008
    t_min: float = 1e-5
    t_max: float = 0.9946

    @property
    def prior_std(self) -> float:
        """1, as the schedule preserves variance."""
        return 1.0

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1 + self.offset)

    def alpha(self, t: Tensor) -> Tensor:
        """α = sin(π/2 (1 − t)/(1 + s))/cos(φ(0)): the sine keeps the digits the cosine loses."""
        return torch.sin(self._rate * (1 - t)) / math.cos(self._rate * self.offset)

    def sigma(self, t: Tensor) -> Tensor:
        """σ² = 1 − α² = sin(φ(t) − φ(0)) sin(φ(t) + φ(0))/cos²(φ(0))."""
        product = torch.sin(self._rate * t) * torch.sin(self._rate * (t + 2 * self.offset))
        return torch.sqrt(product) / math.cos(self._rate * self.offset)


@dataclass(frozen=True, kw_only=True)
class EDMSchedule(Schedule):
    """Karras et al.: α = 1, σ = t; training draws log σ from N(−1.2, 1.2²), t clipped."""

    t_min: float = 0.002
    t_max: float = 80.0
    log_mean: float = -1.2
    log_std: float = 1.2

    def alpha(self, t: Tensor) -> Tensor:
        """α = 1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """σ = t."""
        return t.clone()

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂: t = σ̂."""
        return as_time(log_sigma_hat).exp()

    def drift(self, t: Tensor | float) -> Tensor:
        """f = 0."""
        return torch.zeros_like(as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = 2 t."""
        return 2 * as_time(t)

    def sample_time(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw (batch,) times: log t normal, t clipped to [t_min, t_max]."""
        device = generator.device if device is None and generator is not None else device
        normal = torch.randn((batch,), generator=generator, device=device, dtype=dtype)
        return (self.log_mean + self.log_std * normal).exp().clamp(self.t_min, self.t_max)

    def time_density(self, t: Tensor) -> Tensor:
        """Log-normal density (the clipped tails, 2e-5 of the mass, are left out)."""
        t = as_time(t)
        standard = (t.log() - self.log_mean) / self.log_std
        return torch.exp(-0.5 * standard.square()) / (t * self.log_std * math.sqrt(2 * math.pi))


@dataclass(frozen=True, kw_only=True)
class LinearFlowSchedule(Schedule):
    """Linear flow (rectified flow, flow matching): α = 1 − t, σ = t, up to t_max = 0.999."""

    t_min: float = 1e-4
    t_max: float = 0.999

    @property
    def prior_std(self) -> float:
        """1, the noise end of the path."""
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """α = 1 − t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """σ = t."""
        return t.clone()

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂: t = σ̂/(1 + σ̂)."""
        return torch.sigmoid(as_time(log_sigma_hat))

    def drift(self, t: Tensor | float) -> Tensor:
        """f = −1/(1 − t)."""
        return -1 / (1 - as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = 2 t/(1 − t)."""
        t = as_time(t)
        return 2 * t / (1 - t)

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(dα/dt, dσ/dt) = (−1, 1)."""
        ones = torch.ones_like(as_time(t))
        return -ones, ones
