"""`ode_nll`, the log-density under the probability-flow ODE, and `ode_sample`, its samples.

Purpose:
    The ODE is solved from x at t_min to a latent at t_max, or from a latent back to x. The
    log-density is integrated along the same solution, so a sample's density needs no second solve.
    If no density is wanted, each node takes one evaluation of the network, without any derivative.

Source:
    Song et al., arXiv 2011.13456, appendix D.2; see also `paths`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import (
    check_flag,
    check_generator,
    check_whole,
    error_message,
    sum_elements,
)
from hosm_losses.likelihood.adaptive import solve_adaptive
from hosm_losses.likelihood.dequantize import Dequantization, check_dequantization
from hosm_losses.likelihood.divergence import NO_DIVERGENCE, Divergence, check_divergence
from hosm_losses.likelihood.job import Job, LogPrior, keep_finished, mark_failed, network_options
from hosm_losses.likelihood.multistep import fewest_steps, solve_on_grid
from hosm_losses.likelihood.paths import Paths, all_finite
from hosm_losses.likelihood.result import Cause, NLLResult, SampleResult
from hosm_losses.likelihood.solvers import Adaptive, FixedGrid, ToTolerance, check_solver
from hosm_losses.model import ScoreModel, check_model


def ode_nll(
    model: ScoreModel,
    x: Tensor,
    *,
    solver: FixedGrid | ToTolerance | Adaptive = FixedGrid(),  # noqa: B008, it is frozen
    divergence: Divergence = "auto",
    log_prior: LogPrior | None = None,
    clean: bool = False,
    dequantization: Dequantization | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    enable_grad: bool = False,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> NLLResult:
    """Negative log-likelihood of x under the model's probability-flow ODE.

    Sums and states are kept in float64, whatever the network's dtype. The training mode is not
    changed: call `model.eval()` first if the network has dropout or batch norm.

    Args:
        model: the score model.
        x: data (B, *), taken as points at the schedule's t_min unless `clean` is True; uint8 with
            a dequantization.
        solver: `FixedGrid(steps)`, which usually takes steps + 2 evaluations, plus one with
            `clean`; `ToTolerance(nats)`, with the fewest steps that meet a tolerance; or
            `Adaptive()`, with a step size for each sample.
        divergence: "exact", with d vector-Jacobian products per node; `Hutchinson(count,
            distribution)`, with one product per probe; or `ToStandardError(nats)`, with as many
            probes as each sample needs. "auto" is exact for samples of at most 16 elements, and
            otherwise `Hutchinson()`. On the fixed grid, each of these gives a standard error;
            `Adaptive` needs at least four probes to give a standard error. On images, "dct" is
            often the best distribution of probes. If the divergence of the network is known, pass
            a function `(x, t, **model_kwargs)` → (prediction, its divergence (B,)), which receives
            x and t as the network does. On a subspace, this function returns the divergence within
            the subspace.
        log_prior: the log-density at t_max, as a callable latent (B, *) → (B,), or as a torch
            distribution of samples; N(0, prior_std² I) if None. A callable receives latents in the
            network's dtype, but at least float32, and may return that dtype or a wider dtype.
        clean: whether x is data without noise. If it is, one draw of noise takes x to t_min. The
            mean nll is then an upper bound on the nll of x, comparable with `variational_nll`.
            `standard_error` does not include the noise of this draw. This noise is small for a
            good model.
        dequantization: `Uniform()` for uint8 images: x becomes −1 + 2 (x + u)/256 with u uniform,
            and `bits_per_dim` counts the bits of the integers. `TruncatedNormal()` is for networks
            that were trained on the levels themselves, and None is for continuous data.
        batch_size: the number of samples solved at a time; None for all.
        progress: whether to show a progress bar, which requires tqdm.
        enable_grad: whether the result carries a graph, so that gradients can pass through it. The
            graph stores only the states; the backward pass evaluates the network again. A sample
            that fails has no gradient and does not affect the gradients of other samples. To
            detect failing samples on an accelerator, the network is called once more per
            evaluation, without a graph.
        generator: the random generator, on the device of x; the global one if None.
        model_kwargs: keyword arguments of the network.

    Returns:
        The result, in nats; `bits_per_dim` converts it. The nll of a failed sample is NaN. A
        KeyboardInterrupt carries the result of the finished batches as `.result`, which is None if
        no batch is finished.

    Raises:
        TypeError: if an argument has an invalid type or dtype, for example if integer images come
            without a `dequantization`.
        ValueError: if an argument has an invalid shape, device, name or value.
        DerivativeError: if the network's output has no derivative with respect to its input.
        ImportError: if `progress` is True and tqdm is not installed.

    Example:
        >>> from hosm_losses import VESchedule
        >>> schedule = VESchedule(sigma_max=200.0)
        >>> def standard_normal(x, t):
        ...     return schedule.sigma(t)[:, None] * x / (1 + schedule.sigma(t)[:, None] ** 2)
        >>> model = ScoreModel(standard_normal, schedule)
        >>> solver = FixedGrid(data_std=1.0)
        >>> result = ode_nll(model, torch.zeros(1, 2), solver=solver, divergence="exact")
        >>> print(f"{result.nll.item():.3f} nats, {result.nfe.item()} evaluations")
        1.838 nats, 66 evaluations
    """
    check_solver(solver)
    check_divergence(divergence)
    check_flag("clean", clean)
    check_dequantization(dequantization, clean=clean)
    job = Job(
        model,
        x,
        solver.moments,
        log_prior=log_prior,
        batch_size=batch_size,
        progress=progress,
        generator=generator,
        model_kwargs=model_kwargs,
        divergence=divergence,
        dequantization=dequantization,
        enable_grad=enable_grad,
        at_start=not clean,
    )
    results = list[NLLResult]()
    with job.running() as paths:
        try:
            for batch in job.batches(paths):
                noisy = _from_clean(batch) if clean else batch
                result = solve(noisy, solver, _steps_of(results))
                prior_error = _prior_error(batch, result) if solver.knows_data else None
                nfe = result.nfe + clean
                results.append(replace(result, nfe=nfe, prior_error=prior_error))
        except KeyboardInterrupt as interrupt:
            keep_finished(interrupt, job.result(results) if results else None)
            raise
        return job.result(results)


def ode_sample(
    model: ScoreModel,
    latent: Tensor | Sequence[int],
    *,
    solver: FixedGrid | ToTolerance | Adaptive = FixedGrid(),  # noqa: B008, it is frozen
    divergence: Divergence | None = "auto",
    log_prior: LogPrior | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    enable_grad: bool = False,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> SampleResult:
    """Solve the probability-flow ODE from noise to data, and return samples with their density.

    The training mode is not changed: call `model.eval()` first if the network has dropout. For
    guidance, pass a network that wraps yours; the density then belongs to the guided ODE.

    Args:
        model: the score model.
        latent: points at t_max, (B, *), in the coordinates of x; or a shape (B, *). For a shape,
            latents are drawn from N(0, prior_std² I) in the dtype and on the device of the
            network's first parameter.
        solver: `FixedGrid(steps)`, `ToTolerance(nats)` or `Adaptive()`. A companion compares two
            densities of the same latent, so it needs a divergence.
        divergence: as in `ode_nll`, or None for samples without their density, which need no
            derivatives.
        log_prior: the log-density at t_max of the latents that you pass, as in `ode_nll`.
        batch_size: the number of samples solved at a time; None for all.
        progress: whether to show a progress bar, which requires tqdm.
        enable_grad: whether the result carries a graph, as in `ode_nll`.
        generator: the random generator for latents and probes; the global one if None.
        model_kwargs: keyword arguments of the network.

    Returns:
        The samples at the schedule's t_min, where they carry noise of σ(t_min). A
        KeyboardInterrupt carries the samples of the finished batches, as in `ode_nll`.

    Raises:
        TypeError: if an argument has an invalid type or dtype.
        ValueError: if an argument has an invalid shape, device, name or value.
        DerivativeError: if the network's output has no derivative with respect to its input.
        ImportError: if `progress` is True and tqdm is not installed.

    Example:
        >>> from hosm_losses import VESchedule
        >>> schedule = VESchedule(sigma_max=200.0)
        >>> def standard_normal(x, t):
        ...     return schedule.sigma(t)[:, None] * x / (1 + schedule.sigma(t)[:, None] ** 2)
        >>> model, solver = ScoreModel(standard_normal, schedule), FixedGrid(data_std=1.0)
        >>> drawn = ode_sample(model, torch.zeros(1, 2), solver=solver, divergence="exact")
        >>> print(drawn.x, f"{drawn.nll.item():.3f} nats")
        tensor([[0., 0.]]) 1.838 nats
    """
    check_solver(solver)
    check_divergence(divergence, optional=True)
    drawn = not isinstance(latent, Tensor)
    if drawn and log_prior is not None:
        raise ValueError(
            "latent: expected latents drawn from the prior of log_prior; got a shape, for which "
            "they would be drawn from N(0, prior_std²)."
        )
    start: Any = _draw(check_model(model), latent, generator) if drawn else latent
    job = Job(
        model,
        start,
        solver.moments,
        log_prior=log_prior,
        batch_size=batch_size,
        progress=progress,
        generator=generator,
        model_kwargs=model_kwargs,
        divergence=divergence,
        enable_grad=enable_grad,
        name="latent",
        of_prior=drawn,
    )
    results = list[NLLResult]()
    with job.running() as paths:
        try:
            for batch in job.batches(paths):
                results.append(solve(batch, solver, _steps_of(results), backwards=True))
        except KeyboardInterrupt as interrupt:
            samples = _samples(job.result(results), start, divergence) if results else None
            keep_finished(interrupt, samples)
            raise
        return _samples(job.result(results), start, divergence)


def _samples(result: NLLResult, latent: Tensor, divergence: Divergence | None) -> SampleResult:
    """Convert a result whose `latent` contains samples, perhaps for the first latents only."""
    fields = {**vars(result), "x": result.latent, "latent": latent[: len(result.latent)]}
    if divergence is None:
        fields |= {"nll": None, "solver_error": None}
    return SampleResult(**fields)


def solve(
    paths: Paths,
    solver: FixedGrid | ToTolerance | Adaptive,
    steps: int | None = None,
    *,
    backwards: bool = False,
) -> NLLResult:
    """Solve from data to latents, or backwards; the result's `latent` contains the end points.

    `steps` is the number of steps that `ToTolerance` chose for an earlier batch.
    """
    coordinates = paths.coordinates
    low, high = coordinates.span
    data, noise = coordinates.ends((low, high))
    start, end, span = (noise, data, (high, low)) if backwards else (data, noise, (low, high))
    z = coordinates.to_z(paths.x, start)
    if isinstance(solver, Adaptive):
        solution = solve_adaptive(paths, z, span, tolerance=solver.step_tolerance)
    else:
        companion = solver.companion and paths.divergence != NO_DIVERGENCE
        if isinstance(solver, FixedGrid):
            steps = solver.steps
        elif steps is None:
            options = {"tolerance": solver.tolerance, "group": solver.group}
            steps = fewest_steps(paths, z, span, companion, **options)
        solution = solve_on_grid(paths, z, span, steps, companion)
    cause = solution.cause.masked_fill(~all_finite(paths.x), Cause.START)
    fields: dict[str, Any] = solution._asdict() | {"cause": cause, "failed": cause > 0}
    x, integral = coordinates.to_x(fields.pop("z"), end), fields.pop("integral")
    latent, integral = (paths.x, -integral) if backwards else (x, integral)
    # log p_x(x₀) − log p_T(x_T), see `paths`
    log_density = coordinates.log_volume(noise) - coordinates.log_volume(data) + integral
    at_end = x.to(torch.promote_types(paths.dtype, torch.float32))
    causes = [
        (Cause.OUTPUT, ~all_finite(x)),  # NaN stays in the state
        (Cause.DIVERGENCE, ~integral.isfinite()),
        (Cause.RANGE, ~all_finite(at_end)),
    ]
    if paths.divergence != NO_DIVERGENCE:
        log_prior = paths.log_prior_at(latent)
        log_density = log_density + log_prior
        causes.append((Cause.PRIOR, ~log_prior.isfinite()))
    nll = -log_density if paths.nll_offset is None else paths.nll_offset - log_density
    fields["dimensions"] = coordinates.dimensions
    return mark_failed(NLLResult(nll, x.to(paths.dtype), **fields), *causes)


@torch.no_grad()
def _prior_error(paths: Paths, result: NLLResult) -> Tensor | None:
    """The change in log p if the prior were the diffused Gaussian; None with `log_prior`."""
    if paths.log_prior is not None:
        return None
    coordinates, latent = paths.coordinates, result.latent.to(paths.x.dtype)
    _, end = coordinates.ends(coordinates.span)
    return coordinates.log_gaussian(latent, end) - paths.log_prior_at(latent)


def _steps_of(results: Sequence[NLLResult]) -> int | None:
    return results[0].steps if results else None


def _from_clean(paths: Paths) -> Paths:
    """Add a draw of noise to clean x, and return the paths from t_min with their `nll_offset`.

    −log p(x) ≤ E[−log p(x_tmin) + log q(x_tmin|x) − log p(x|x_tmin)], with the decoder of
    `variational`. The last two terms of this bound are ½ (‖ε̂ − ε‖² − ‖ε‖²) − d log α(t_min). These
    terms contain ‖ε‖² of the drawn noise instead of its mean d. The variation of p(x_tmin) with ε
    therefore cancels, and the mean of exp(−nll) over draws is a density of x.
    """
    start, _ = paths.coordinates.ends(paths.coordinates.span)
    points, noise = paths.add_noise(start)
    error = paths.noise_at(points, start) - noise
    offset = sum_elements(error.square() - noise.square(), 1) / 2
    offset = offset - paths.dimensions * start.alpha.log().reshape(())
    return replace(paths, x=points, nll_offset=offset)


def _draw(model: ScoreModel, shape: object, generator: torch.Generator | None) -> Tensor:
    """Draw latents of this shape from N(0, prior_std²)."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        expected = "a tensor (B, *) at t_max, or its shape, which begins with B"
        kind = ValueError if isinstance(shape, list | tuple) else TypeError
        raise kind(error_message("latent", expected, shape))
    sizes = [check_whole("latent's shape", size, 1) for size in shape]
    options = network_options(model)
    rng = check_generator(generator, options["device"])
    return model.project(model.schedule.prior_std * torch.randn(sizes, generator=rng, **options))
