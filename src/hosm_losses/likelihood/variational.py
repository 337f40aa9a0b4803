r"""The variational bound on the likelihood under a diffusion model's reverse SDE.

Purpose:
    The reverse SDE and the ODE of the same network define two different models, each with its own
    likelihood. The integral of the noise-prediction loss over all noise levels yields a bound on
    the SDE's likelihood. The network is not differentiated.

Formula:
    −log p(x) ≤ KL(q(x_T|x) ‖ π) + ∫_{u₀}^{u₁} E‖ε̂ − ε‖² du − E log p(x|x_tmin),
    with x_t = α x + σ ε, u = log σ̂ and d log σ̂ = g²/(2σ²) dt. The last term is needed because
    the integral starts at t_min instead of t = 0. The decoder p(x|x_tmin) is a normal distribution
    whose mean is the denoised x_tmin and whose standard deviation is σ̂(t_min):
    −log p(x|x_tmin) = (d/2) log(2π σ̂²) + ½‖ε̂ − ε‖².

Noise:
    The range of u is divided into `samples`/2 equal strata, and two values of u are drawn
    uniformly from each stratum. The standard error is computed from the spread within these pairs
    and the spread of the draws at t_min. If `log_prior` is set, the spread of `log_prior` over
    draws of the latent is also included.

    A control variate reduces the variance. If the data followed N(m, s²), the error ε̂ − ε of an
    exact network would be
        r = (σ̂ (x − m) − s² ε)/c² with c² = s² + σ̂².
    The integral of E‖r‖² is known in closed form:
        ∫ E‖r‖² du = ½ Σ_i [(x − m)²/c₀² − (x − m)²/c₁² + F(σ̂₁²) − F(σ̂₀²)],
        F(w) = log(w/(s² + w)) + s²/(s² + w).
    In the integral and in the last term of the bound, random draws are therefore needed only for
    the difference ‖ε̂ − ε‖² − ‖r‖².

Source:
    Song et al., arXiv 2101.09258, theorem 3, and appendix B for the correction at t_min; Kingma et
    al., arXiv 2107.00630, equation 13, for the integral over log σ̂.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import error_message, sum_elements
from hosm_losses.likelihood.dequantize import Uniform, check_dequantization
from hosm_losses.likelihood.job import CallOptions, Ends, Job, LogPrior
from hosm_losses.likelihood.paths import NoiseLevel, Paths
from hosm_losses.likelihood.result import Cause, NLLResult, all_finite, mark_failed
from hosm_losses.likelihood.solvers import Moment, plain_moment
from hosm_losses.model import ScoreModel


def variational_nll(
    model: ScoreModel,
    x: Tensor,
    *,
    samples: int = 64,
    data_mean: Moment | None = None,
    data_std: Moment | None = None,
    log_prior: LogPrior | None = None,
    dequantization: Uniform | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> NLLResult:
    """Estimate an upper bound on the negative log-likelihood of x under the model's reverse SDE.

    The estimate is unbiased. The argument x is clean data, at t = 0, as in `ode_nll` with
    clean=True. No gradient is computed. The options work as in `ode_nll`, except for the
    following:

    - `samples`, an even number, is the number of noise levels drawn for each x. At t_min, the
      network is evaluated an additional `samples`/8 times (rounded down), but at least twice.
    - `data_mean` and `data_std` (0 and 0.5 if None) define a control variate. They affect the
      standard error, but not the expected value of the estimate.
    - `log_prior` is averaged over draws of the latent. For the default, N(0, prior_std² I), the
      average is computed exactly.

    Returns:
        The result, whose `nll` is the estimated bound in nats. `latent` is one draw of the noisy x
        at t_max, and `solver_error` is zero.

    Raises:
        TypeError: as in `ode_nll`.
        ValueError: as in `ode_nll`, or if `samples` is odd or below 2.

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
    if samples < 2 or samples % 2:
        raise ValueError(error_message("samples", "an even number of 2 or more", samples))
    check_dequantization(dequantization, clean=True)
    mean = 0.0 if data_mean is None else plain_moment("data_mean", data_mean, "data_mean")
    std = 0.5 if data_std is None else plain_moment("data_std", data_std, "data_std")
    job = Job(
        model,
        x,
        (mean, std),
        Ends("x", at_t_min=False),
        CallOptions(log_prior, batch_size, progress, generator, model_kwargs),
        dequantization=dequantization,
    )
    return job.run(lambda batch, _: _bound(batch, samples))


def _bound(paths: Paths, samples: int) -> NLLResult:
    x, coordinates = paths.x, paths.coordinates
    count, elements = len(x), paths.dimensions
    centred, variance = x - coordinates.mean, coordinates.std.square()
    low, high = span = coordinates.schedule.log_sigma_hat_range
    start, end = coordinates.ends(span)
    strata, at_start = samples // 2, max(2, samples // 8)
    width, evaluations = (high - low) / strata, samples + at_start

    def drawn_level(stratum: int) -> NoiseLevel:
        unit = torch.rand((count,), generator=paths.generator, device=x.device, dtype=x.dtype)
        return coordinates.level(low + (stratum + unit) * width)

    def excess(level: NoiseLevel) -> Tensor:
        """‖ε̂ − ε‖² − ‖r‖² for one draw of ε, (B,)."""
        paths.advance(count / evaluations)
        points, noise = paths.add_noise(level)
        error = paths.noise_at(points, level) - noise
        gaussian = (level.sigma_hat * centred - variance * noise) / level.scale.square()
        return sum_elements(error.square() - gaussian.square(), 1)

    def antiderivative(level: NoiseLevel) -> Tensor:
        """The antiderivative of E‖r‖² with respect to u, (B,)."""
        log_ratio = 2 * (level.sigma_hat.log() - level.scale.log())
        in_mean = sum_elements(log_ratio + variance / level.scale.square(), 1)
        return (in_mean - sum_elements((centred / level.scale).square(), 1)) / 2

    # The integral of ‖ε̂ − ε‖² − ‖r‖², with two levels drawn in each stratum, and its variance
    integral = integral_variance = x.new_zeros(count)
    for stratum in range(strata):
        levels = [drawn_level(stratum), drawn_level(stratum)]
        draws = torch.stack([excess(level) for level in levels]) * width
        integral = integral + draws.mean(0)
        integral_variance = integral_variance + draws.var(0) / 2
    # −log p(x|x_tmin), with the part due to r in closed form
    draws = torch.stack([excess(start) for _ in range(at_start)]) / 2
    integral = integral + draws.mean(0)
    integral_variance = integral_variance + draws.var(0) / at_start
    squares = sum_elements((start.sigma_hat * centred / start.scale.square()).square(), 1)
    squares = squares + sum_elements((variance / start.scale.square()).square(), 1)
    decoder = squares / 2 + elements * (math.log(2 * math.pi) / 2 + low)

    prior, prior_variance, latent = _prior(paths, end, samples)
    nll = integral + antiderivative(end) - antiderivative(start) + decoder + prior
    standard_error = (integral_variance + prior_variance).sqrt()
    nfe, zero = torch.full_like(nll, evaluations).long(), torch.zeros_like(nll)
    result = NLLResult(nll, latent.to(paths.dtype), nfe, standard_error, zero, zero > 0)
    start, output = (Cause.START, ~all_finite(x)), (Cause.OUTPUT, ~integral.isfinite())
    of_prior = Cause.RANGE if paths.log_prior is None else Cause.PRIOR
    return mark_failed(result, start, output, (of_prior, ~prior.isfinite()))


def _prior(paths: Paths, end: NoiseLevel, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an estimate of KL(q(x_T|x) ‖ π), the variance of the estimate, and a draw of x_T."""
    x, elements, sigma = paths.x, paths.dimensions, end.sigma.reshape(())
    latent, _ = paths.add_noise(end)
    entropy = elements / 2 * (math.log(2 * math.pi) + 1) + elements * sigma.log()
    if paths.log_prior is None:  # the mean of its log over x_T is known in closed form
        ratio = sigma / paths.coordinates.schedule.prior_std
        cross = elements / 2 * ratio.square() - paths.log_prior_at(end.alpha * x)
        return cross - entropy, torch.zeros_like(cross), latent
    values = [paths.log_prior_at(latent)]
    for _ in range(samples - 1):
        values.append(paths.log_prior_at(paths.add_noise(end)[0]))
    values = torch.stack(values)
    return -values.mean(0) - entropy, values.var(0) / samples, latent
