r"""What a noise schedule is, and what follows from α and σ alone.

What:
    A schedule is x_t = α(t) x₀ + σ(t) ε on [t_min, t_max], t_min the data end. Everything else
    follows from α and σ, above all σ̂ = σ/α, the noise in units of the data: in log σ̂ every
    schedule is the same diffusion.

Formula:
    drift f = d log α/dt            dx = f x dt + g dw
    squared diffusion g² = 2 σ² d log σ̂/dt, for every schedule

Source:
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
    arXiv 2011.13456; Kingma et al., "Variational Diffusion Models", arXiv 2107.00630, for log σ̂
    (their −½ log SNR) as the time of every schedule.
"""

__all__ = ["Schedule", "as_time"]

import math
from typing import ClassVar

import torch
from torch import Tensor

from hosm_losses.derivatives import time_derivative


class Schedule:
    """A noise schedule; subclass it with alpha, sigma, t_min and t_max, and the rest follows.

    σ/α must grow with t. The inverse `time` is then found by bisection and the derivatives by
    `torch.func`; the schedules of this module give both in closed form. t is a floating-point
    tensor of any shape, or a number.

    Example:
        >>> class Linear(Schedule):
        ...     t_min, t_max = 0.01, 1.0
        ...     def alpha(self, t): return torch.ones_like(t)
        ...     def sigma(self, t): return t
        >>> round(float(Linear().squared_diffusion(torch.tensor(0.5))), 6)
        1.0
    """

    t_min: float
    t_max: float
    integer_time: ClassVar[bool] = False

    def alpha(self, t: Tensor) -> Tensor:
        """α(t), the factor of the data."""
        raise NotImplementedError(
            f"{type(self).__name__}: a schedule defines alpha(t) and sigma(t)."
        )

    def sigma(self, t: Tensor) -> Tensor:
        """σ(t), the standard deviation of the noise."""
        raise NotImplementedError(
            f"{type(self).__name__}: a schedule defines alpha(t) and sigma(t)."
        )

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (α(t), σ(t)), of the shape and dtype of t."""
        t = as_time(t)
        return self.alpha(t), self.sigma(t)

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior at t_max, σ(t_max) unless a schedule says better."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂(t) = log σ(t) − log α(t)."""
        alpha, sigma = self(t)
        return sigma.log() - alpha.log()

    @property
    def log_sigma_hat_range(self) -> tuple[float, float]:
        """(log σ̂(t_min), log σ̂(t_max)), as numbers."""
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64)
        low, high = self.log_sigma_hat(ends).tolist()
        return low, high

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂, by bisection, clipped to [t_min, t_max]."""
        target = as_time(log_sigma_hat)
        low = torch.full_like(target, self.t_min)
        high = torch.full_like(target, self.t_max)
        for _ in range(2 * -int(math.log2(torch.finfo(target.dtype).eps))):
            middle = (low + high) / 2
            below = self.log_sigma_hat(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def drift(self, t: Tensor | float) -> Tensor:
        """f(t) = d log α/dt."""
        t = as_time(t)
        return time_derivative(self.alpha, t) / self.alpha(t)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """g²(t) = 2 σ² d log σ̂/dt."""
        t = as_time(t)
        return 2 * self.sigma(t).square() * time_derivative(self.log_sigma_hat, t)

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (dα/dt, dσ/dt)."""
        t = as_time(t)
        return time_derivative(self.alpha, t), time_derivative(self.sigma, t)

    def sample_time(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw (batch,) times as training does: uniform unless a schedule says otherwise."""
        device = generator.device if device is None and generator is not None else device
        unit = torch.rand((batch,), generator=generator, device=device, dtype=dtype)
        return self.t_min + (self.t_max - self.t_min) * unit

    def time_density(self, t: Tensor) -> Tensor:
        """Density of `sample_time` at t, per unit of t."""
        return torch.full_like(as_time(t), 1 / (self.t_max - self.t_min))


def as_time(t: Tensor | float) -> Tensor:
    """Return t in a dtype to compute in: float32 at least; integers take the default dtype."""
    t = torch.as_tensor(t)
    if not t.is_floating_point():
        return t.to(torch.get_default_dtype())
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
