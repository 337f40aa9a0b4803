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

from hosm_losses.schedules.base import Schedule, as_time, check_parameters, drawing_device


class _Parametric(Schedule):
    """Schedules of a few numbers, which are finite and in order."""

    _rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_parameters(self, "t_min < t_max", *self._rules)


@dataclass(frozen=True, kw_only=True)
class _LinearBeta(_Parametric):
    """What VP and sub-VP share: β(t) = β₀ + (β₁ − β₀) t and its integral B(t)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    _rules = ("0 <= beta_min", "0 < beta_max", "beta_min <= beta_max")

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

    def alpha(self, t: Tensor | float) -> Tensor:
        """α = exp(−B/2)."""
        return torch.exp(-0.5 * self.integrated_beta(t))

    def drift(self, t: Tensor | float) -> Tensor:
        """f = −β/2."""
        return -0.5 * self.beta(t)

    def _time_of(self, integrated_beta: Tensor) -> Tensor:
        # Between bounds at which no quotient is 0/0 or inf/inf; they lie outside every range.
        b = integrated_beta.clamp(torch.finfo(integrated_beta.dtype).tiny, 1e30)
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * b)
        return self.clip(2 * b / (self.beta_min + root))


@dataclass(frozen=True, kw_only=True)
class VPSchedule(_LinearBeta):
    """Variance preserving, β linear: α = exp(−B/2), σ² = 1 − α², B = β₀ t + ½ (β₁ − β₀) t².

    Example:
        >>> alpha, sigma = VPSchedule()(torch.tensor([1e-5, 1.0]))
        >>> bool(torch.allclose(alpha**2 + sigma**2, torch.ones(2)))
        True
    """

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ = (1 − e^{−B})^½."""
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂ = ½ log(e^B − 1)."""
        b = self.integrated_beta(t)
        return 0.5 * (b + torch.log(-torch.expm1(-b)))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂, clipped: B = log(1 + σ̂²), solved for t."""
        twice = 2 * as_time(log_sigma_hat)
        return self._time_of(torch.logaddexp(twice, torch.zeros_like(twice)))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = β."""
        return self.beta(t)


@dataclass(frozen=True, kw_only=True)
class SubVPSchedule(_LinearBeta):
    """Sub-VP, β linear: α = exp(−B/2), σ = 1 − e^{−B}."""

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ = 1 − e^{−B}."""
        return -torch.expm1(-self.integrated_beta(t))

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂ = log(2 sinh(B/2))."""
        b = self.integrated_beta(t)
        return 0.5 * b + torch.log(-torch.expm1(-b))

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂, clipped: B = 2 asinh(σ̂/2), solved for t."""
        return self._time_of(2 * torch.asinh(0.5 * torch.exp(as_time(log_sigma_hat))))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = β (1 − e^{−2B})."""
        return -self.beta(t) * torch.expm1(-2 * self.integrated_beta(t))


@dataclass(frozen=True, kw_only=True)
class VESchedule(_Parametric):
    """Variance exploding, geometric: α = 1, σ = σ_min (σ_max/σ_min)^t; log σ̂ is linear in t."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    _rules = ("0 < sigma_min", "sigma_min < sigma_max")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def _log_middle(self) -> float:
        return 0.5 * math.log(self.sigma_min * self.sigma_max)

    def alpha(self, t: Tensor | float) -> Tensor:
        """α = 1."""
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ = σ_min (σ_max/σ_min)^t, from the geometric middle, where float32 errs least."""
        return math.exp(self._log_middle) * torch.exp(self._log_ratio * (as_time(t) - 0.5))

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂ = log σ_min + t log(σ_max/σ_min)."""
        return self._log_middle + self._log_ratio * (as_time(t) - 0.5)

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂, clipped."""
        return self.clip((as_time(log_sigma_hat) - math.log(self.sigma_min)) / self._log_ratio)

    def drift(self, t: Tensor | float) -> Tensor:
        """f = 0."""
        return torch.zeros_like(as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = 2 σ² log(σ_max/σ_min)."""
        return 2 * self._log_ratio * self.sigma(t).square()


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_Parametric):
    """Cosine: α = cos(φ(t))/cos(φ(0)) with φ(t) = π/2 (t + s)/(1 + s), σ² = 1 − α².

    It ends at t_max = 0.9946, before α reaches 0, so that σ̂ is finite (about 119).
    """

    offset: float = 0.008
    t_min: float = 1e-5
    t_max: float = 0.9946

    _rules = ("0 <= offset",)

    @property
    def prior_std(self) -> float:
        """1, as the schedule preserves variance."""
        return 1.0

    @property
    def _rate(self) -> float:
        return 0.5 * math.pi / (1 + self.offset)

    def alpha(self, t: Tensor | float) -> Tensor:
        """α = sin(π/2 (1 − t)/(1 + s))/cos(φ(0)): the sine keeps the digits the cosine loses."""
        return torch.sin(self._rate * (1 - as_time(t))) / math.cos(self._rate * self.offset)

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ² = 1 − α² = sin(φ(t) − φ(0)) sin(φ(t) + φ(0))/cos²(φ(0))."""
        t = as_time(t)
        product = torch.sin(self._rate * t) * torch.sin(self._rate * (t + 2 * self.offset))
        return torch.sqrt(product) / math.cos(self._rate * self.offset)

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        r"""Return the t of this log σ̂, clipped: cos²φ = cos²φ(0)/(1 + σ̂²), solved for t.

        With s = sin φ(0), c = cos φ(0) and r = √(s² + σ̂²) = √(1 + σ̂²) sin φ, the angle comes
        from √(1 + σ̂²) times its sine and its cosine, in both of which no digits cancel:
        φ(t) − φ(0) = atan2(c σ̂²/(r + s), c² + s r).
        """
        sine, cosine = math.sin(self._rate * self.offset), math.cos(self._rate * self.offset)
        # Beyond the range of any schedule in use, and no square overflows.
        square = (2 * as_time(log_sigma_hat).clamp(-40, 40)).exp()
        root = torch.sqrt(sine**2 + square)
        angle = torch.atan2(cosine * square / (root + sine), cosine**2 + sine * root)
        return self.clip(angle / self._rate)

    def drift(self, t: Tensor | float) -> Tensor:
        """f = −φ′ tan φ."""
        return -self._rate / torch.tan(self._rate * (1 - as_time(t)))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g² = −2 f, as the schedule preserves variance."""
        return -2 * self.drift(t)


@dataclass(frozen=True, kw_only=True)
class EDMSchedule(_Parametric):
    """Karras et al.: α = 1, σ = t; training draws log σ from N(−1.2, 1.2²), t clipped."""

    t_min: float = 0.002
    t_max: float = 80.0
    log_mean: float = -1.2
    log_std: float = 1.2

    _rules = ("log_mean < inf", "0 < log_std")

    def alpha(self, t: Tensor | float) -> Tensor:
        """α = 1."""
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ = t."""
        return as_time(t).clone()

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂, clipped: t = σ̂."""
        return self.clip(as_time(log_sigma_hat).exp())

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
        device = drawing_device(device, generator)
        normal = torch.randn((batch,), generator=generator, device=device, dtype=dtype)
        return self.clip((self.log_mean + self.log_std * normal).exp())

    def time_density(self, t: Tensor | float) -> Tensor:
        """Log-normal density (the clipped tails, 2e-5 of the mass, are left out)."""
        t = as_time(t)
        standard = (t.log() - self.log_mean) / self.log_std
        return torch.exp(-0.5 * standard.square()) / (t * self.log_std * math.sqrt(2 * math.pi))


@dataclass(frozen=True, kw_only=True)
class LinearFlowSchedule(_Parametric):
    """Linear flow (rectified flow, flow matching): α = 1 − t, σ = t, up to t_max = 0.999."""

    t_min: float = 1e-4
    t_max: float = 0.999

    @property
    def prior_std(self) -> float:
        """1, the noise end of the path."""
        return 1.0

    def alpha(self, t: Tensor | float) -> Tensor:
        """α = 1 − t."""
        return 1 - as_time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ = t."""
        return as_time(t).clone()

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂, clipped: t = σ̂/(1 + σ̂)."""
        return self.clip(torch.sigmoid(as_time(log_sigma_hat)))

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
