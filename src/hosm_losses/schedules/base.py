r"""What a noise schedule is, and what follows from α and σ alone.

Formula:
    x_t = α(t) x₀ + σ(t) ε on [t_min, t_max], t_min the data end; σ̂ = σ/α. In log σ̂ every schedule
    is the same diffusion dx = f x dt + g dw.

Source:
    Song et al., arXiv 2011.13456; Kingma et al., "Variational Diffusion Models", arXiv
    2107.00630, for log σ̂ (their −½ log SNR) as the time of every schedule.
"""

import math
from collections.abc import Callable
from numbers import Number
from typing import Any, ClassVar

import torch
from torch import Tensor

from hosm_losses._checks import at_least_float32, describe_value, error_message, generator_kwargs
from hosm_losses._torch_internals import forward_mode

UNDEFINED = "{}: a schedule defines alpha(t) and sigma(t)."


def time_derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Derivative of an elementwise function of time, of the dtype of t."""
    t = t.contiguous()  # torch.func takes no tensor whose elements share their memory
    with forward_mode():
        slope = torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]
    # A number times a 0-dim tensor has a tangent of the default dtype in forward mode.
    return slope.to(t.dtype)


class Schedule:
    """A noise schedule; subclass it with alpha, sigma, t_min and t_max, and the rest follows.

    σ/α must grow with t: the data are at t_min. The inverse `time` is then found by bisection and
    the derivatives by `torch.func`. The schedules of this package have closed forms of `time` and
    `squared_diffusion`, which losses and likelihoods call.

    t is a tensor of any shape, a number or an array. What is returned has its shape, its device
    and its dtype, float32 at least; integers take the default dtype, and numbers and arrays
    become CPU tensors whatever the default device.

    `alpha` and `sigma` of your own are called with floating-point tensors only. They return a
    tensor like t and hold no tensor of another device. A ScoreModel checks all this when it is
    built.

    The check is in float64, but losses call them in float32, where 1 − α² has few digits left near
    t_min: with α = exp(−B/2) write σ as torch.sqrt(-torch.expm1(-B)).

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
    _prior_std: ClassVar[float | None] = None
    _starts_at_data: ClassVar[bool] = True

    def __repr__(self) -> str:
        """The name and the range, which a class may lack."""
        low, high = (getattr(self, name, None) for name in ("t_min", "t_max"))
        return f"{type(self).__name__}(t_min={low!r}, t_max={high!r})"

    def alpha(self, t: Tensor) -> Tensor:
        """α(t), the factor of the data."""
        raise NotImplementedError(UNDEFINED.format(type(self).__name__))

    def sigma(self, t: Tensor) -> Tensor:
        """σ(t), the standard deviation of the noise."""
        raise NotImplementedError(UNDEFINED.format(type(self).__name__))

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (α(t), σ(t))."""
        t = as_time(t)
        return self.alpha(t), self.sigma(t)

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior, 1 if σ ends near 1 by design, else σ(t_max)."""
        if self._prior_std is not None:
            return self._prior_std
        end = torch.tensor(self.t_max, dtype=torch.float64, device="cpu")
        return float(self.sigma(end).detach())

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Log σ̂(t) = log σ(t) − log α(t)."""
        alpha, sigma = self(t)
        return sigma.log() - alpha.log()

    @property
    def log_sigma_hat_range(self) -> tuple[float, float]:
        """(log σ̂(t_min), log σ̂(t_max)), as numbers."""
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64, device="cpu")
        low, high = self.log_sigma_hat(ends).detach()
        return float(low), float(high)  # an older torch.func has no tolist()

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the t of this log σ̂, clipped to [t_min, t_max].

        A subclass with a closed form returns that, and it can be differentiated. Without one
        bisection finds t, which then has no derivative.
        """
        target = as_time(log_sigma_hat)
        low = torch.full_like(target, self.t_min)
        high = torch.full_like(target, self.t_max)
        for _ in range(2 * -int(math.log2(torch.finfo(target.dtype).eps))):
            middle = (low + high) / 2
            below = self.log_sigma_hat(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(target.isnan(), target, (low + high) / 2)

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
        """Draw (batch,) times for training: uniform in [t_min, t_max], but for `EDMSchedule`.

        Without a device they are on the generator's, or the default one.
        """
        if device is None and generator is not None:
            device = generator.device
        return self._draw((batch,), device=device, dtype=dtype, **generator_kwargs(generator))

    def _draw(self, shape: tuple[int], **options: Any) -> Tensor:
        unit = torch.rand(shape, **options)
        return self.clip(self.t_min + (self.t_max - self.t_min) * unit)

    def clip(self, t: Tensor) -> Tensor:
        """Return t, no smaller than t_min and no larger than t_max, both rounded to its dtype."""
        return t.clamp(float(self.t_min), float(self.t_max))

    def _training_time(self, log_sigma_hat: Tensor) -> Tensor:
        """The time at a log σ̂, as a network may be given it: of a table a whole index."""
        t = self.time(log_sigma_hat)
        return t.round().long() if self.integer_time else t

    def time_density(self, t: Tensor | float) -> Tensor:
        """Density of `sample_time` at t, per unit of t. A subclass overrides both or neither."""
        if type(self).sample_time is not Schedule.sample_time:
            expected = f"{type(self).__name__} to have the density of its own sample_time"
            got = "the time_density that it inherits"
            remedy = (
                "Write time_density(t), per unit of t, in the class as well; or leave sample_time "
                "as it is and give time_sampler=lambda batch, generator: ... to the loss."
            )
            raise ValueError(error_message("schedule", expected, self, remedy, got=got))
        return self._density(as_time(t))

    def _density(self, t: Tensor) -> Tensor:
        """The density of `_draw`."""
        return torch.full_like(t, 1 / (self.t_max - self.t_min))


def as_time(t: Tensor | float) -> Tensor:
    """Return t as a tensor, float32 at least; numbers, arrays and lists become CPU tensors."""
    if not (isinstance(t, (Tensor, Number, list, tuple)) or hasattr(t, "__array__")):
        raise TypeError(error_message("t", "times as a tensor, a number, an array or a list", t))
    time = t if isinstance(t, Tensor) else torch.as_tensor(t, device="cpu")
    if time.is_complex():
        raise TypeError(f"t: expected real times; got {describe_value(t)}.")
    if not time.is_floating_point():  # nor by way of a half default dtype, which rounds indices
        return time.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
    if time.itemsize < 4 and not (isinstance(t, Tensor) or hasattr(t, "__array__")):
        return torch.as_tensor(t, dtype=torch.float32, device="cpu")
    return at_least_float32(time)
