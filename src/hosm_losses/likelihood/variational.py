r"""The variational bound of a diffusion model's SDE.

What:
    The model's reverse SDE has a likelihood of its own, which no ODE gives. It is bounded by the
    loss on the noise, integrated over all noise levels. The bound costs one network evaluation a
    draw and no derivative, and it is not the likelihood of the ODE.

Formula:
    −log p(x) ≤ KL(q(x_T|x) ‖ π) + ∫_{u₀}^{u₁} E‖ε̂ − ε‖² du − E log p(x|x_tmin),
    with x_t = α x + σ ε, u = log σ̂ and d log σ̂ = g²/(2σ²) dt. The last term corrects for the
    start at t_min: a normal decoder with the denoised mean and standard deviation σ̂(t_min),
    −log p(x|x_tmin) = (d/2) log(2π σ̂²) + ½‖ε̂ − ε‖².

Noise:
    u is drawn uniformly, two draws in each of `samples`/2 equal strata, which also give the
    standard error. For data N(m, s²) the error ε̂ − ε would be r = (σ̂ (x − m) − s² ε)/c² with
    c² = s² + σ̂², and its part of the bound is known:
    ∫ E‖r‖² du = ½ Σ_i [(x − m)²/c₀² − (x − m)²/c₁² + F(σ̂₁²) − F(σ̂₀²)],
    F(w) = log(w/(s² + w)) + s²/(s² + w). Only the difference ‖ε̂ − ε‖² − ‖r‖² is left to chance.

Source:
    Song et al., arXiv 2101.09258, theorem 3, and appendix B for the correction at t_min; Kingma et
    al., arXiv 2107.00630, equation 13, for the integral over log σ̂.
"""

__all__ = ["variational_nll"]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import check_model_kwargs, check_whole
from hosm_losses._progress import progress_bar
from hosm_losses._torch_internals import normal, outside_inference_mode
from hosm_losses.likelihood.coordinates import Coordinates, Place
from hosm_losses.likelihood.dequantize import check_dequantization, dequantize, importance_weighted
from hosm_losses.likelihood.divergence import accumulator
from hosm_losses.likelihood.inputs import (
    check_options,
    chunks,
    data_coordinates,
    log_prior_at,
    network_dtype,
)
from hosm_losses.likelihood.result import NLLResult, mark_failed
from hosm_losses.model import NoiseField, ScoreModel, check_model, noise_field


def variational_nll(
    model: ScoreModel,
    x: Tensor,
    *,
    samples: int = 64,
    data_mean: float | Tensor = 0.0,
    data_std: float | Tensor = 0.5,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    dequantization: str | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> NLLResult:
    """Upper bound on the negative log-likelihood of x under the model's reverse SDE.

    An unbiased estimate, for clean data: unlike `ode_nll`, which takes x as a point at t_min, it
    starts at t = 0. Sums are kept in float64. No gradient is computed, and no training mode is
    changed: call `model.eval()` first if the network has dropout or batch norm.

    Args:
        model: the score model.
        x: data (B, *); uint8 with a dequantization.
        samples: noise levels drawn for each x, an even number. One eighth as many evaluations are
            added at t_min.
        data_mean: mean of the data, a number or a tensor that broadcasts to a sample.
        data_std: standard deviation of the data, likewise. With the mean it sets a control
            variate: no expectation depends on it, but the standard error does.
        log_prior: log-density at t_max, (n, *) → (n,), averaged over the draws; if None that of
            N(0, prior_std² I), integrated exactly.
        dequantization: "uniform" for uint8 images, as in `ode_nll`.
        batch_size: samples of x evaluated at a time, all if None.
        progress: whether to show a progress bar, for which tqdm has to be installed.
        generator: the source of randomness, on the device of x; the global one if None.
        model_kwargs: keyword arguments of the network.

    Returns:
        The bound as `nll`, in nats, with its standard error; `latent` is one draw of x at t_max,
        and `solver_error` is zero.

    Raises:
        TypeError: for an argument of a wrong type or dtype, integer images included.
        ValueError: for a wrong shape, name or number.
        ImportError: for a progress bar without tqdm.

    Example:
        >>> from hosm_losses import VESchedule
        >>> schedule = VESchedule(sigma_max=20.0)
        >>> def standard_normal(x, t):
        ...     return schedule.sigma(t)[:, None] * x / (1 + schedule.sigma(t)[:, None] ** 2)
        >>> model = ScoreModel(standard_normal, schedule)
        >>> bound = variational_nll(model, torch.zeros(1, 2), data_std=1.0)
        >>> print(f"{bound.nll.item():.3f} nats, exactly {math.log(2 * math.pi):.3f}")
        1.838 nats, exactly 1.838
    """
    samples = check_whole("samples", samples, 2)
    if samples % 2:
        raise ValueError(f"samples: expected an even number; got {samples}.")
    check_model(model)
    check_dequantization(x, dequantization, 1)
    batch_size, generator = check_options(batch_size, log_prior, progress, generator, x)
    kwargs = check_model_kwargs(model_kwargs)
    coordinates = data_coordinates(model, x, data_mean, data_std)
    dtype = network_dtype(model, x)
    with (
        outside_inference_mode(),
        torch.no_grad(),
        progress_bar(progress, len(x), "sample") as advance,
    ):
        times = x.new_zeros(len(x), dtype=torch.promote_types(dtype, torch.float32))
        field = noise_field(model, times, kwargs, primitives=False)
        point = dequantize(x, generator) if dequantization else normal(x)
        parts = []
        for rows in chunks(x, batch_size):
            clean = point[rows].to(accumulator(x))
            errors = _Errors(field.rows(rows), coordinates, clean, dtype, generator)
            parts.append(_bound(errors, samples, log_prior, advance))
        result = NLLResult.cat(parts)
        return importance_weighted([result]) if dequantization else result


@dataclass(frozen=True)
class _Errors:
    """Errors of the network at noised copies of x, against those of Gaussian data."""

    field: NoiseField
    coordinates: Coordinates
    x: Tensor
    dtype: torch.dtype
    generator: torch.Generator | None

    def noise(self) -> Tensor:
        return torch.randn(
            self.x.shape, generator=self.generator, device=self.x.device, dtype=self.x.dtype
        )

    def excess(self, place: Place) -> Tensor:
        """‖ε̂ − ε‖² − ‖r‖² for one draw of ε, (B,)."""
        noise, centred = self.noise(), self.x - self.coordinates.mean
        noised = (place.alpha * self.x + place.sigma * noise).to(self.dtype)
        t = place.t.to(self.field.t.dtype).expand(len(self.x))
        error = -replace(self.field, t=t)(noised).to(noise.dtype) - noise
        gaussian = place.sigma_hat * centred - self.coordinates.std.square() * noise
        return _sum(error.square() - (gaussian / place.scale.square()).square())

    def gaussian(self, place: Place) -> Tensor:
        """E‖r‖², (B,)."""
        centred = self.x - self.coordinates.mean
        second = place.sigma_hat.square() * centred.square() + self.coordinates.std**4
        return _sum(second / place.scale**4)

    def gaussian_integral(self, low: Place, high: Place) -> Tensor:
        """∫ E‖r‖² du, (B,)."""
        centred = (self.x - self.coordinates.mean).square()
        variance = self.coordinates.std.square()

        def antiderivative(place: Place) -> Tensor:
            total = place.scale.square()
            logarithm = 2 * (place.sigma_hat.log() - place.scale.log())
            return logarithm + (variance - centred) / total

        return _sum(antiderivative(high) - antiderivative(low)) / 2


def _bound(
    errors: _Errors,
    samples: int,
    log_prior: Callable[[Tensor], Tensor] | None,
    advance: Callable[[float], object],
) -> NLLResult:
    x = errors.x
    batch, elements = len(x), x[0].numel()
    schedule = errors.coordinates.schedule
    low, high = schedule.log_sigma_hat_range
    start, end = errors.coordinates.at(low), errors.coordinates.at(high)
    strata, at_start = samples // 2, max(2, samples // 8)
    evaluations = samples + at_start

    def level(stratum: int) -> Place:
        unit = torch.rand((batch,), generator=errors.generator, device=x.device, dtype=x.dtype)
        return errors.coordinates.place(low + (stratum + unit) * ((high - low) / strata))

    def draws(places: list[Place]) -> Tensor:
        found = []
        for place in places:
            advance(batch / evaluations)
            found.append(errors.excess(place))
        return torch.stack(found)

    mean = variance = x.new_zeros(batch)
    for stratum in range(strata):
        pair = draws([level(stratum), level(stratum)]) * ((high - low) / strata)
        mean, variance = mean + pair.mean(0), variance + pair.var(0) / 2
    ends = draws([start] * at_start) / 2
    mean, variance = mean + ends.mean(0), variance + ends.var(0) / at_start
    decoder = elements / 2 * math.log(2 * math.pi) + elements * low
    known = errors.gaussian_integral(start, end) + errors.gaussian(start) / 2 + decoder

    prior, prior_variance, latent = _prior(errors, end, samples, log_prior)
    nll = mean + known + prior
    zero = torch.zeros_like(nll)
    return mark_failed(
        NLLResult(
            nll,
            latent.to(errors.dtype),
            torch.full((batch,), evaluations, device=x.device),
            (variance + prior_variance).sqrt(),
            zero,
            zero > 0,
        )
    )


def _prior(
    errors: _Errors, end: Place, samples: int, log_prior: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q(x_T|x) ‖ π), the variance of its estimate, and a draw of x_T."""
    x = errors.x
    latent = end.alpha * x + end.sigma * errors.noise()
    elements, sigma = x[0].numel(), end.sigma.reshape(())
    entropy = elements / 2 * (math.log(2 * math.pi) + 1) + elements * sigma.log()
    std = errors.coordinates.schedule.prior_std
    if log_prior is None:  # its mean over the noise: at the mean of x_T, and what its spread adds
        at_mean = log_prior_at(None, end.alpha * x, errors.dtype, std)
        cross = elements / 2 * (sigma / std).square() - at_mean
        return cross - entropy, torch.zeros_like(cross), latent
    drawn = [latent, *(end.alpha * x + end.sigma * errors.noise() for _ in range(samples - 1))]
    values = torch.stack([log_prior_at(log_prior, each, errors.dtype, std) for each in drawn])
    return -values.mean(0) - entropy, values.var(0) / samples, latent


def _sum(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).sum(1)
