r"""The base class of noise schedules, and the checks that every schedule must pass.

Formula:
    x_t = α(t) x₀ + σ(t) ε for t in [t_min, t_max], with the data at t_min; σ̂ is σ/α. A schedule
    defines a diffusion dx = f x dt + g dw. If log σ̂ is used as the time, x/α follows the same
    diffusion for every schedule.

Checks made when a ScoreModel is built:
    α and σ must be positive. log σ̂ must increase from t_min, the data end, to t_max, the noise
    end. The derivative of log σ̂ must also be positive. `time` must be the inverse of log σ̂.
    All of this is checked in float64, at fixed points in [t_min, t_max]. The checks always run on
    the CPU, so that no values are read from an accelerator.

Source:
    Song et al., arXiv 2011.13456. Kingma et al., "Variational Diffusion Models", arXiv 2107.00630,
    use log σ̂ (their −½ log SNR) as the time of every schedule.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hosm_losses._checks import (
    at_least_float32,
    check_number,
    describe_value,
    error_message,
    generator_kwargs,
)
from hosm_losses._torch_internals import forward_mode, outside_inference_mode

UNDEFINED = "{}: a schedule must define alpha(t) and sigma(t)."

# The points at which a schedule is checked, as fractions of [t_min, t_max], and the tolerance.
NEAR = (1e-4, 1e-3, 1e-2)
PLACES = (0.0, *NEAR, *(k / 64 for k in range(1, 64)), *(1 - p for p in reversed(NEAR)), 1.0)
INNER = (math.pi / 16, math.pi / 6, math.pi / 4)  # between the entries of any table
TOLERANCE = 1e-2

RANGE = (
    "Correct the formula or the range. At t_min, the data end, there must be some noise: start at "
    "1e-5, for example. At t_max, the noise end, alpha must be above 0: end at 0.999 for a flow, "
    "0.9946 for a cosine, 1 for VPSchedule. For a network that uses another time, set "
    "ScoreModel(..., time=999.0), or time=lambda t: 1 - t if its data are at 1."
)
FOLLOW = (
    "Write alpha and sigma with PyTorch operators on t (linear between the entries of a table), "
    "without .detach(), NumPy or Python numbers; or override drift, squared_diffusion and rates."
)


def time_derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Return the derivative of an elementwise function of time, in the dtype of t."""
    t = t.contiguous()  # torch.func rejects tensors whose elements share memory
    with forward_mode():
        slope = torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]
    # In forward mode, a number times a 0-dim tensor has a tangent in the default dtype.
    return slope.to(t.dtype)


class Schedule:
    """A noise schedule; a subclass only has to define alpha, sigma, t_min and t_max.

    σ/α must increase with t, since the data are at t_min. By default, `time`, the inverse of
    log σ̂, is computed by bisection, and derivatives with respect to t are computed using
    `torch.func`. Losses and likelihoods call `time` and `squared_diffusion`, which the schedules
    in this package compute in closed form.

    t may be a tensor of any shape, a number or an array. Methods return tensors with the shape,
    device and dtype of t, except that dtypes narrower than float32 become float32. Integers are
    converted to the default dtype. Numbers and arrays become CPU tensors, whatever the default
    device is.

    The `alpha` and `sigma` of a subclass are called only with floating-point tensors. Both must
    use PyTorch operators, must return tensors with the shape, dtype and device of t, and must not
    use tensors on other devices. These rules are checked, on the CPU, when a ScoreModel is built.
    The check also tests that `squared_diffusion` and `rates` agree with each other. `drift` is not
    checked.

    The check runs in float64, but losses call `alpha` and `sigma` in float32. In float32, 1 − α²
    loses nearly all significant digits near t_min, as expm1 does if compiled on the CPU by PyTorch
    2.13 or earlier. If σ² = 1 − α² and α = exp(−B/2), compute σ as
    torch.sqrt(2 * alpha * torch.sinh(B / 2)).

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
        """Return the class name and the range; undefined ends of the range are shown as None."""
        low, high = (getattr(self, name, None) for name in ("t_min", "t_max"))
        return f"{type(self).__name__}(t_min={low!r}, t_max={high!r})"

    def alpha(self, t: Tensor) -> Tensor:
        """Return α(t), the factor by which the data are multiplied."""
        raise NotImplementedError(UNDEFINED.format(type(self).__name__))

    def sigma(self, t: Tensor) -> Tensor:
        """Return σ(t), the standard deviation of the noise."""
        raise NotImplementedError(UNDEFINED.format(type(self).__name__))

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (α(t), σ(t))."""
        t = as_time(t)
        return self.alpha(t), self.sigma(t)

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior.

        The value is 1 for schedules that end at σ ≈ 1 by design, and σ(t_max) for all others.
        """
        if self._prior_std is not None:
            return self._prior_std
        end = torch.tensor(self.t_max, dtype=torch.float64, device="cpu")
        return float(self.sigma(end).detach())

    def log_sigma_hat(self, t: Tensor | float) -> Tensor:
        """Return log σ̂(t) = log σ(t) − log α(t)."""
        alpha, sigma = self(t)
        return sigma.log() - alpha.log()

    @property
    def log_sigma_hat_range(self) -> tuple[float, float]:
        """The range of log σ̂ as two numbers, (log σ̂(t_min), log σ̂(t_max))."""
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64, device="cpu")
        low, high = self.log_sigma_hat(ends).detach()
        return float(low), float(high)  # under an older torch.func, tolist() fails

    def time(self, log_sigma_hat: Tensor | float) -> Tensor:
        """Return the time t, clipped to [t_min, t_max], at which log σ̂ has the given value.

        The base class computes t by bisection, so autograd returns a derivative of 0. The
        schedules in this package compute t by formulas that can be differentiated.
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
        """Return f(t) = d log α/dt."""
        t = as_time(t)
        return time_derivative(self.alpha, t) / self.alpha(t)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """Return g²(t) = 2 σ² d log σ̂/dt."""
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
        """Draw `batch` times for training, by default uniformly in [t_min, t_max].

        `EDMSchedule` draws log σ from a normal distribution, and `DiscreteSchedule` draws integer
        indices.

        If `device` is None, the times are on the generator's device or, if there is no generator,
        on the default device.
        """
        if device is None and generator is not None:
            device = generator.device
        return self._draw((batch,), device=device, dtype=dtype, **generator_kwargs(generator))

    def _draw(self, shape: tuple[int], **options: Any) -> Tensor:
        unit = torch.rand(shape, **options)
        return self.clip(self.t_min + (self.t_max - self.t_min) * unit)

    def clip(self, t: Tensor) -> Tensor:
        """Clamp t to [t_min, t_max], with both ends rounded to the dtype of t."""
        return t.clamp(float(self.t_min), float(self.t_max))

    def _training_time(self, log_sigma_hat: Tensor) -> Tensor:
        """Return the time at the given log σ̂, or the nearest index if the schedule is a table."""
        t = self.time(log_sigma_hat)
        return t.round().long() if self.integer_time else t

    def time_density(self, t: Tensor | float) -> Tensor:
        """Return the density at t, per unit of t, of the times that `sample_time` draws.

        A subclass must override both `sample_time` and `time_density`, or neither.
        """
        if type(self).sample_time is not Schedule.sample_time:
            expected = f"{type(self).__name__} to have the density of its own sample_time"
            got = "the time_density that it inherits"
            remedy = (
                "Define time_density(t), per unit of t, in the class too; or keep the inherited "
                "sample_time and pass time_sampler=lambda batch, generator: ... to the loss."
            )
            raise ValueError(error_message("schedule", expected, self, remedy, got=got))
        return self._density(as_time(t))

    def _density(self, t: Tensor) -> Tensor:
        """Return the density of the times that `_draw` draws."""
        return torch.full_like(t, 1 / (self.t_max - self.t_min))


def as_time(t: Tensor | float) -> Tensor:
    """Return t as a tensor in float32 or wider; numbers, arrays and lists become CPU tensors."""
    time = t if isinstance(t, Tensor) else torch.as_tensor(t, device="cpu")
    if not time.is_floating_point():  # a default dtype in half precision would round indices
        return time.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
    if time.itemsize < 4 and not (isinstance(t, Tensor) or hasattr(t, "__array__")):
        return torch.as_tensor(t, dtype=torch.float32, device="cpu")
    return at_least_float32(time)


def check_schedule(schedule: object) -> Schedule:
    """Return `schedule` if it is valid; otherwise, raise TypeError or ValueError.

    Values are not checked while `torch.compile` traces, or under a fake tensor mode.
    """
    if not isinstance(schedule, Schedule):
        remedy = "For a scheduler of diffusers, use from_diffusers(network, scheduler)."
        expected = "a schedule such as VPSchedule(), or a subclass of Schedule"
        raise TypeError(error_message("schedule", expected, schedule, remedy))
    name = type(schedule).__name__
    low, high = (
        check_number("schedule", getattr(schedule, end, None), f"{end} of {name} to be a number")
        for end in ("t_min", "t_max")
    )
    if low >= high:
        expected, got = f"{name} to have t_min < t_max", f"t_min = {low:g} and t_max = {high:g}"
        raise ValueError(error_message("schedule", expected, schedule, RANGE, got=got))
    places = torch.tensor(PLACES, dtype=torch.float64, device="cpu")
    if not torch.compiler.is_compiling() and type(places) is Tensor:
        with outside_inference_mode(), torch.no_grad():
            _check_values(schedule, (1 - places) * low + places * high)
    return schedule


def _check_values(schedule: Schedule, t: Tensor) -> None:
    """Check a schedule at the increasing times t; raise an error for the first broken rule."""
    name = type(schedule).__name__
    alpha, sigma = (_positive(schedule, part, t) for part in ("alpha", "sigma"))
    u = sigma.log() - alpha.log()
    if (i := _first_broken(u.diff() > 0)) is not None:
        expected = f"log(sigma/alpha) of {name} to grow with t"
        got = f"one that does not grow from t = {t[i]:g} to t = {t[i + 1]:g}"
        raise ValueError(error_message("schedule", expected, schedule, RANGE, got=got))

    # `time` must be the inverse of log σ̂, clipped beyond both ends.
    times = _values(schedule, "time", torch.cat([u[:1] - 1, u, u[-1:] + 1]))
    sigma, alpha = (_positive(schedule, part, times[1:-1]) for part in ("sigma", "alpha"))
    atol = TOLERANCE * float(u.abs().mean())
    inverse = torch.isclose(sigma.log() - alpha.log(), u, rtol=TOLERANCE, atol=atol).all()
    if not bool(inverse and times.min() >= t[0] and times.max() <= t[-1]):
        expected = f"time of {name} to be the inverse of its log(sigma/alpha), in [t_min, t_max]"
        remedy = (
            "Return self.clip(t) from time and override log_sigma_hat too, or subclass "
            "Schedule, where both follow from alpha and sigma."
        )
        raise ValueError(
            error_message("schedule", expected, schedule, remedy, got="another function")
        )

    # g² = 2 σ² d log σ̂/dt > 0
    inner = t[0] + (t[-1] - t[0]) * torch.tensor(INNER, dtype=t.dtype, device=t.device)
    diffusion = _values(schedule, "squared_diffusion", inner)
    (alpha, sigma), (alpha_rate, sigma_rate) = schedule(inner), schedule.rates(inner)
    for part, values, rate in (("alpha", alpha, alpha_rate), ("sigma", sigma, sigma_rate)):
        if not rate.any() and values.amax() > values.amin():  # detached, or computed in NumPy
            expected = f"{part} of {name}, which varies with t, to agree with its rates"
            got = "rates of 0"
            raise ValueError(error_message("schedule", expected, schedule, FOLLOW, got=got))
    by_rates = 2 * sigma.square() * (sigma_rate / sigma - alpha_rate / alpha)
    holds = (by_rates > 0) & torch.isclose(diffusion, by_rates, rtol=TOLERANCE)
    if (i := _first_broken(holds)) is not None:
        expected = f"squared_diffusion of {name} to be positive and to agree with its rates"
        got = f"{diffusion[i]:g}, and {by_rates[i]:g} by its rates, at t = {inner[i]:g}"
        raise ValueError(error_message("schedule", expected, schedule, FOLLOW, got=got))


def _positive(schedule: Schedule, part: str, t: Tensor) -> Tensor:
    """Return the values of alpha or sigma, which must be positive and finite."""
    values = _values(schedule, part, t)
    # Below rounding error, a value counts as 0: cos(π/2) is 6e-17.
    if (i := _first_broken((values > 2e-16) & values.isfinite())) is not None:
        name, got = type(schedule).__name__, f"{values[i]:g} at t = {t[i]:g}"
        expected = f"{name} to have a positive and finite {part}, for a finite log(sigma/alpha)"
        raise ValueError(error_message("schedule", expected, schedule, RANGE, got=got))
    return values


def _first_broken(holds: Tensor) -> int | None:
    """Return the first index at which a condition is False, or None if it holds everywhere."""
    return None if holds.all() else int(holds.int().argmin())


def _values(schedule: Schedule, method: str, t: Tensor) -> Tensor:
    """Return a method's values at t, which must have the shape, dtype and device of t."""
    value = getattr(schedule, method)(t.clone())
    like = isinstance(value, Tensor) and value.dtype == t.dtype and value.device == t.device
    if not like or value.shape != t.shape:
        where = f"{type(schedule).__name__}.{method}"
        expected = f"{where} to return a tensor like its argument, {describe_value(t)}"
        remedy = "Compute it from the argument: torch.ones_like(t) for a constant."
        raise TypeError(error_message("schedule", expected, value, remedy))
    return value
