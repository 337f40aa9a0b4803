"""`ode_nll` computes log-densities under the probability-flow ODE; `ode_sample` draws samples.

Purpose:
    The ODE is solved from x at t_min to a latent at t_max, or from a latent back to x. The
    log-density is integrated along the same path. The density of a sample can therefore be
    computed without solving the ODE a second time. If no density is wanted, the network is
    evaluated along the path but not differentiated.

Source:
    Song et al., arXiv 2011.13456, appendix D.2; see also `paths`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import check_shape, sum_elements
from hosm_losses.likelihood.dequantize import Dequantization, check_dequantization
from hosm_losses.likelihood.divergence import Divergence, check_divergence
from hosm_losses.likelihood.job import CallOptions, Ends, Job, LogPrior, network_options
from hosm_losses.likelihood.paths import Paths
from hosm_losses.likelihood.result import NLLResult, SampleResult
from hosm_losses.likelihood.solvers import FixedGrid, Solver
from hosm_losses.model import ScoreModel, check_model


def ode_nll(
    model: ScoreModel,
    x: Tensor,
    *,
    solver: Solver = FixedGrid(),  # noqa: B008, it is frozen
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
    """Compute the negative log-likelihood of x under the model's probability-flow ODE.

    The solver keeps its states and sums in float64 (float32 on MPS), whatever the network's dtype.
    This function does not switch the network to evaluation mode: call `model.eval()` first if the
    network has dropout or batch norm.

    Args:
        model: the score model.
        x: data (B, *), which must be uint8 if `dequantization` is not None. Unless `clean` is
            True, x is treated as a point at the schedule's t_min.
        solver: `FixedGrid(steps)` usually evaluates the network `steps + 2` times, and once more
            if `clean` is True. `ToTolerance(nats)` doubles the number of steps until
            `solver_error` is within this tolerance. `Adaptive()` chooses the step sizes of each
            sample separately.
        divergence: "exact" computes d vector-Jacobian products per node for samples of d elements,
            and `Hutchinson(count, distribution)` computes one product per probe and node. "auto"
            means "exact" for samples of at most 16 elements and `Hutchinson()` for larger samples.
            On a fixed grid, each of these options yields a standard error. With `Adaptive`, random
            probes yield a standard error only if there are at least four probes. For images,
            "dct" probes often yield the estimates with the smallest variance. If you have a
            function that computes the network's divergence, pass this function:
            `(x, t, **model_kwargs)` → (prediction, its divergence (B,)). It is called with the
            same arguments as the network.
        log_prior: the log-density at t_max; that of N(0, prior_std² I) if None. Pass a callable
            that maps latents (B, *) to log-densities (B,), or a torch distribution whose event
            shape is the shape of a sample. A callable receives latents in the network's dtype or
            float32, whichever is wider. It may return log-densities in the network's dtype or a
            wider dtype.
        clean: whether x is data without noise. If True, noise is drawn once and added to x, to
            obtain a point at t_min. The mean of the nll over this noise is an upper bound on
            −log p(x), and can be compared with the result of `variational_nll`. The nll varies
            with this noise, although only slightly if the model is good. `standard_error` does not
            include this variation.
        dequantization: `Uniform()`, for uint8 images, maps x to −1 + 2 (x + u)/256 with u uniform
            on [0, 1). Pass `TruncatedNormal()`, even for uint8 images, if the network was trained
            on the quantized levels themselves. With either dequantization, `bits_per_dim` returns
            the bits per dimension of the integers. Pass None for continuous data. If x is on the
            CPU and contains only the levels of 8-bit images, None causes a warning.
        batch_size: the number of samples per batch; None to process all samples in one batch.
        progress: whether to show a progress bar, which requires tqdm.
        enable_grad: whether to record an autograd graph, so that you can backpropagate through the
            result. The graph stores only the states; the backward pass evaluates the network
            again. A failed sample contributes no gradient and does not affect the gradients of
            other samples. On an accelerator, every evaluation calls the network once more, without
            a graph, to detect failing samples.
        generator: the random generator, which must be on the device of x; the global generator if
            None.
        model_kwargs: keyword arguments for the network.

    Returns:
        The result, in nats. Its method `bits_per_dim` converts the nll to bits per dimension. The
        nll of a failed sample is NaN. If a KeyboardInterrupt stops the call, the exception's
        attribute `result` is the result of the finished batches, or None if no batch has finished.

    Raises:
        TypeError: if x or the return value of a callable has an invalid dtype, for example if
            images have an integer dtype and `dequantization` is None.
        ValueError: if an argument has an invalid shape, device, name or value, or if `enable_grad`
            is True and the schedule has trainable parameters, whose gradients would be wrong.
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
    check_divergence(divergence)
    check_dequantization(dequantization, clean=clean)
    job = Job(
        model,
        x,
        solver.moments,
        Ends("x", at_t_min=not clean),
        CallOptions(log_prior, batch_size, progress, generator, model_kwargs, enable_grad),
        divergence,
        dequantization,
    )

    def solve_batch(batch: Paths, steps: Tensor | None) -> NLLResult:
        solver.check(batch.dtype)  # before `_from_clean` calls the network
        result = solver.solve(_from_clean(batch) if clean else batch, steps)
        prior_error = _prior_error(batch, result) if solver.knows_data else None
        return replace(result, nfe=result.nfe + clean, prior_error=prior_error)

    return job.run(solve_batch)


def ode_sample(
    model: ScoreModel,
    latent: Tensor | Sequence[int],
    *,
    solver: Solver = FixedGrid(),  # noqa: B008, it is frozen
    divergence: Divergence | None = "auto",
    log_prior: LogPrior | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    enable_grad: bool = False,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> SampleResult:
    """Solve the probability-flow ODE from noise to data; return samples with their densities.

    This function does not switch the network to evaluation mode: call `model.eval()` first if the
    network has dropout or batch norm. To sample with guidance, wrap your network in a module that
    applies the guidance. The densities are then densities under the guided ODE.

    Args:
        model: the score model.
        latent: the points at t_max, as a tensor (B, *) in the coordinates of x. If you pass a
            shape (B, *) instead, latents are drawn from N(0, prior_std² I). Their dtype and device
            are those of the network's first floating-point parameter.
        solver: `FixedGrid(steps)`, `ToTolerance(nats)` or `Adaptive()`. If the solver's
            `companion` is True and `divergence` is not None, the ODE is also solved from the
            samples back to latents. This yields a second value of the density at each sample.
        divergence: as in `ode_nll`, or None to compute neither densities nor derivatives.
        log_prior: the log-density of the distribution from which you drew the latents, as in
            `ode_nll`.
        batch_size: the number of samples per batch; None to process all samples in one batch.
        progress: whether to show a progress bar, which requires tqdm.
        enable_grad: whether to record an autograd graph, as in `ode_nll`.
        generator: the random generator for latents and probes; the global generator if None.
        model_kwargs: keyword arguments for the network.

    Returns:
        The samples at the schedule's t_min. They contain noise with standard deviation σ(t_min).
        If a KeyboardInterrupt stops the call, the exception's attribute `result` contains the
        samples of the finished batches, as in `ode_nll`.

    Raises:
        TypeError: if `latent` or the return value of a callable has an invalid dtype.
        ValueError: if an argument has an invalid shape, device, name or value, or if `enable_grad`
            is True and the schedule has trainable parameters, whose gradients would be wrong.
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
        Ends("latent", of_prior=drawn),
        CallOptions(log_prior, batch_size, progress, generator, model_kwargs, enable_grad),
        divergence,
    )

    def solve_batch(batch: Paths, steps: Tensor | None) -> NLLResult:
        solver.check(batch.dtype)
        return solver.solve(batch, steps, backwards=True)

    return job.run(solve_batch, lambda result: _samples(result, start, divergence))


def _samples(result: NLLResult, latent: Tensor, divergence: Divergence | None) -> SampleResult:
    """Turn a result whose `latent` contains samples into a `SampleResult`.

    After an interrupt, the result contains samples only for the latents of the finished batches.
    """
    fields = {**vars(result), "x": result.latent, "latent": latent[: len(result.latent)]}
    if divergence is None:
        fields |= {"nll": None, "solver_error": None}
    return SampleResult(**fields)


@torch.no_grad()
def _prior_error(paths: Paths, result: NLLResult) -> Tensor | None:
    """Return how much log p would change if the prior had the mean and variance of diffused data.

    This prior is the marginal distribution at t_max for data that follow N(data_mean, data_std²).
    The result is None if the caller passed a `log_prior`.
    """
    if paths.log_prior is not None:
        return None
    coordinates, latent = paths.coordinates, result.latent.to(paths.x.dtype)
    _, end = coordinates.ends(coordinates.span)
    return coordinates.log_gaussian(latent, end) - paths.log_prior_at(latent)


def _from_clean(paths: Paths) -> Paths:
    """Add random noise to clean x, and return paths that start at t_min and include `nll_offset`.

    −log p(x) ≤ E[−log p(x_tmin) + log q(x_tmin|x) − log p(x|x_tmin)], where p(x|x_tmin) is the
    decoder in `variational`. The sum of the last two terms is
    ½ (‖ε̂ − ε‖² − ‖ε‖²) − d log α(t_min). This sum contains ‖ε‖² for the drawn noise instead of
    the mean of ‖ε‖², which is d. The variation of p(x_tmin) with ε therefore cancels in the nll.
    For the same reason, the mean of exp(−nll) over draws of ε is a probability density of x.
    """
    start, _ = paths.coordinates.ends(paths.coordinates.span)
    points, noise = paths.add_noise(start)
    error = paths.noise_at(points, start) - noise
    offset = sum_elements(error.square() - noise.square(), 1) / 2
    offset = offset - paths.dimensions * start.alpha.log().reshape(())
    return replace(paths, x=points, nll_offset=offset)


def _draw(model: ScoreModel, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    shape = check_shape("latent", shape, "latents, or a shape such as (64, *sample shape)")
    normal = torch.randn(shape, generator=generator, **network_options(model))
    return model.schedule.prior_std * normal
