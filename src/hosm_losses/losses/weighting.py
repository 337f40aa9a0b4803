r"""Sampling of t for a loss, and the factors by which the terms are multiplied at each t.

Formula for the factor of the first term (the factor of the higher-order terms is 1):
    "noise"        1
    "native"       1/p² for ε̂ = p · prediction + q x. The term is then the squared error of the
                   network's own prediction, as in trainers that apply no other weighting.
    EDMWeighting   1 + (σ̂/σ_d)². The term is then the loss of EDM's trainer divided by d, i.e.
                   λ(σ̂) ‖x̂₀ − x₀‖²/d with λ(σ̂) = (σ̂² + σ_d²)/(σ̂ σ_d)².
    "likelihood"   ½ (g²/σ²) d divided by the density of t. The first term is then an unbiased
                   estimate of ½ ∫ g² E‖s − ∇ log q_0t‖² dt. If the caller chooses the times, they
                   are assumed to be uniformly distributed.
    a callable W(t), which also multiplies the higher-order terms.

    The sampler "log_sigma_hat" draws u = log σ̂ uniformly from [u₀, u₁]. Every factor is then
    multiplied by p(t) (u₁ − u₀)/(du/dt), where p is the schedule's own density of t. The only
    exception is the factor of the first term with "likelihood". The choice between the samplers
    "schedule" and "log_sigma_hat" therefore changes the variance of a loss but not its mean.

    For "likelihood", the default sampler is "log_sigma_hat", and the factor of the first term is
    then the constant (u₁ − u₀) d. With either sampler, the factor of the first term is
    d g²/(2σ² p) times the factor with "noise". If you change from "noise" to "likelihood", you
    must therefore tune the term weights again.

    If the schedule is a table, t is an index i, which "log_sigma_hat" draws with probability
    w_i/(u₁ − u₀). The values of log σ̂ that are closer to u_i than to any other entry of the table
    form an interval of length w_i. In the formulas above, w_i replaces du/dt and 1/N replaces p.
    Integrals over u thereby become trapezoidal sums.

    `AdaptiveTimes` replaces 1/(u₁ − u₀) with its own density of u; see `times`.

Source:
    Song et al., "Maximum Likelihood Training of Score-Based Diffusion Models", arXiv 2101.09258,
    theorem 1 and appendix B. Since g²/σ² = 2 d log σ̂/dt, their importance-sampling density is
    uniform in log σ̂ for every schedule. λ is from Karras et al., "Elucidating the Design Space of
    Diffusion-Based Generative Models", arXiv 2206.00364, table 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hosm_losses._checks import (
    can_read_values,
    check_choice,
    check_finite,
    check_like,
    check_number,
    error_message,
    generator_kwargs,
)
from hosm_losses.losses.times import AdaptiveTimes, ends_of, rate_of
from hosm_losses.model import ScoreModel, check_time


@dataclass(frozen=True)
class EDMWeighting:
    """A weighting that turns the first term into EDM's training loss, averaged over elements.

    The first term is then λ(σ) ‖D(x, σ) − x₀‖²/d, with λ(σ) = (σ² + σ_d²)/(σ σ_d)². Here, D is
    the denoiser implied by the network, whatever the network predicts. EDM's σ corresponds to
    σ̂ = σ/α in this package.

    Args:
        sigma_data: σ_d, the standard deviation that the trainer assumes for the data.

    Raises:
        TypeError: if sigma_data is not a number.
        ValueError: unless sigma_data is finite and above 0.

    Example:
        >>> EDMWeighting()
        EDMWeighting(sigma_data=0.5)
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        """Check `sigma_data`, and convert a NumPy number to a Python number."""
        what = "a finite number above 0"
        number = check_number("EDMWeighting.sigma_data", self.sigma_data, what, above=0)
        object.__setattr__(self, "sigma_data", number)


Name = Literal["noise", "native", "likelihood"]
Weighting = Name | EDMWeighting | Callable[[Tensor], Tensor]
"""The weighting over t, as a name, `EDMWeighting()` or a callable t → (B,)."""
Sampler = Literal["schedule", "log_sigma_hat"]
DrawTime = Callable[[int, torch.Generator | None], Tensor]
TimeSampler = Sampler | AdaptiveTimes | DrawTime | None
"""The sampler of t, as a name, `AdaptiveTimes()` or a callable (batch, generator) → t (B,)."""


def check_weighting(weighting: Any) -> None:
    """Raise an error unless the weighting is valid."""
    if not (callable(weighting) or isinstance(weighting, EDMWeighting)):
        expected = "weighting (or EDMWeighting(), or a callable of t)"
        check_choice(expected, weighting, get_args(Name))


def check_time_sampler(time_sampler: object) -> None:
    """Raise an error unless the time sampler is valid."""
    if time_sampler is not None and not callable(time_sampler):
        name = "time_sampler (or AdaptiveTimes(), or a callable of the batch size and a generator)"
        check_choice(name, time_sampler, get_args(Sampler))


def draw_time(
    model: ScoreModel,
    x0: Tensor,
    weighting: Weighting,
    generator: torch.Generator | None,
    time_sampler: TimeSampler = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw times t (B,), one for every sample of x0, on the device of x0.

    The second result, of shape (B,) or (), is 1 divided by the density of log σ̂ at t. It is None
    if t was drawn by the schedule or by a callable. `time_factors` uses this second result to
    reweight the terms.
    """
    schedule, sampler = model.schedule, time_sampler
    if sampler is None:
        sampler = "log_sigma_hat" if weighting == "likelihood" else "schedule"
    if isinstance(sampler, AdaptiveTimes):
        return sampler.draw(schedule, x0, generator, uniform=weighting == "likelihood")
    if callable(sampler):
        return check_time(model, x0, sampler(len(x0), generator)), None
    dtype = torch.promote_types(x0.dtype, torch.float32)
    if sampler == "schedule":
        return schedule.sample_time(len(x0), generator, device=x0.device, dtype=dtype), None
    low, span = ends_of(schedule)
    unit = torch.rand((len(x0),), device=x0.device, dtype=dtype, **generator_kwargs(generator))
    return schedule._training_time(low + span * unit), span


def time_factors(
    model: ScoreModel,
    x0: Tensor,
    t: Tensor,
    weighting: Weighting,
    spread: Tensor | None = None,
    *,
    from_schedule: bool = False,
    order: int = 3,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the factors (B,) of the first term and of the higher-order terms at t; None means 1.

    `spread` is the second result of `draw_time`. If `spread` is None, `from_schedule` says whether
    t was drawn from the schedule's own distribution. If `from_schedule` is False, t is assumed to
    be uniformly distributed.
    """
    if weighting == "noise" and spread is None:
        return None, None
    schedule, time = model.schedule, model.time_in(t, x0)
    elements, indices = x0[0].numel(), not t.is_floating_point()
    ratio = 1.0
    # The factor of the first term with "likelihood" needs no density.
    if spread is not None and not (weighting == "likelihood" and order == 1):
        rate = rate_of(schedule, time, indices=indices)
        ratio = schedule.time_density(time) * spread / rate

    first = higher = ratio if isinstance(ratio, Tensor) else None
    if callable(weighting):
        first = higher = _call_weighting(weighting, model, x0, t) * ratio
    elif isinstance(weighting, EDMWeighting):
        sigma_hat = schedule.log_sigma_hat(time).exp()
        first = (1 + (sigma_hat / weighting.sigma_data).square()) * ratio
    elif weighting == "native":
        first = model.native_weight(t, x0) * ratio
    elif weighting == "likelihood" and spread is not None:
        first = torch.ones_like(time) * (spread * elements)
    elif weighting == "likelihood":
        rate = rate_of(schedule, time, indices=indices)
        first = (schedule.t_max - schedule.t_min + indices) * rate * elements
        if from_schedule:
            first = rate * elements / schedule.time_density(time)
    return first, higher


def _call_weighting(
    weighting: Callable[[Tensor], Tensor], model: ScoreModel, x0: Tensor, t: Tensor
) -> Tensor:
    factor = weighting(t.clone())  # a copy, since it may write to its argument
    like = model.coefficients(t, x0)[1]
    check_like("weighting(t)", factor, tuple(like.shape), like.dtype, like.device, "t")
    check_finite("weighting(t)", factor)
    if can_read_values(factor) and bool((factor < 0).any()):
        got = f"{factor.min().item():g}"
        raise ValueError(error_message("weighting(t)", "factors of 0 or more", factor, got=got))
    return factor
