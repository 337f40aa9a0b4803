"""`ode_nll`, the log-density along the probability-flow ODE, and `ode_sample`, its samples.

What:
    The paths are followed from x at t_min to a latent at t_max, or back. The log-density is
    integrated on the way by the same quadrature, so that of a sample needs no second solve.
    Without a divergence a node is one evaluation of the network, and nothing is differentiated.

Source:
    Song et al., arXiv 2011.13456, appendix D.2, and see `paths`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import check_flag, check_generator, check_whole, complaint
from hosm_losses.likelihood.inputs import Call, LogPrior, add_noise, like_network
from hosm_losses.likelihood.integers import Dequantization, check_dequantization
from hosm_losses.likelihood.paths import Batch, Divergence, check_divergence, follow_paths
from hosm_losses.likelihood.result import NLLResult, SampleResult
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

    Sums and states are kept in float64 whatever the network's dtype. No training mode is changed:
    call `model.eval()` first if the network has dropout or batch norm.

    Args:
        model: the score model.
        x: data (B, *), taken as points at the schedule's t_min unless `clean`; uint8 with a
            dequantization.
        solver: `FixedGrid(steps)`, with steps + 10 evaluations, one more with `clean`;
            `ToTolerance(nats)`, the fewest steps that meet it; or `Adaptive()`, steps of each
            sample's own.
        divergence: "exact", d vector-Jacobian products a node; `Hutchinson(count, distribution)`,
            one for each probe; or `ToStandardError(nats)`, as many as each sample needs. "auto" is
            exact for samples of at most 16 elements, else `Hutchinson()`. All give a standard
            error on the fixed grid, four probes or more with `Adaptive`. On images "dct" is often
            the best distribution. Or a function `(x, t, **model_kwargs)` → (prediction, its
            divergence (B,)), x and t as the network gets them, for one that knows its divergence.
        log_prior: log-density at t_max, latent (B, *) → (B,), or a distribution of samples;
            N(0, prior_std² I) if None. It is given latents in the network's dtype, float32 at
            least, and may return that or more.
        clean: whether x is data without noise. One draw of noise then brings it to t_min, and nll
            bounds that of x from above in its mean, as in `variational_nll`, with which it
            compares. The noise of this draw is not in `standard_error`; it is small for a good
            model.
        dequantization: `Uniform()` for uint8 images: x becomes −1 + 2 (x + u)/256 with u uniform,
            and `bits_per_dim` counts the bits of the integers. `TruncatedNormal()` for networks
            that were trained on the levels themselves. None for continuous data.
        batch_size: samples solved at a time, all if None.
        progress: whether to show a progress bar, for which tqdm has to be installed.
        enable_grad: whether the result carries a graph, for gradients through it. Of an evaluation
            the state alone is kept, and the network is called again in the pass back. A sample
            that fails has no gradient, and leaves those of the others; on an accelerator the
            network is called once more for each evaluation, without a graph, to find it.
        generator: the source of all that is drawn, on the device of x; the global one if None.
        model_kwargs: keyword arguments of the network.

    Returns:
        The result, in nats; `bits_per_dim` converts. A sample that failed has NaN.

    Raises:
        TypeError: for tensors, containers, flags and other objects of a wrong type or dtype,
            integer images included.
        ValueError: for a wrong shape, device, name or number, also one of a wrong type.
        DerivativeError: where the network's output does not depend on its input differentiably.
        ImportError: for a progress bar without tqdm.

    Example:
        >>> from hosm_losses import VESchedule
        >>> schedule = VESchedule(sigma_max=200.0)
        >>> def standard_normal(x, t):
        ...     return schedule.sigma(t)[:, None] * x / (1 + schedule.sigma(t)[:, None] ** 2)
        >>> model = ScoreModel(standard_normal, schedule)
        >>> solver = FixedGrid(data_std=1.0)
        >>> result = ode_nll(model, torch.zeros(1, 2), solver=solver, divergence="exact")
        >>> print(f"{result.nll.item():.3f} nats, {result.nfe.item()} evaluations")
        1.838 nats, 74 evaluations
    """
    solve = check_solver(solver).start()
    check_divergence(divergence)
    check_flag("clean", clean)
    check_dequantization(dequantization, clean=clean)

    def likelihood(batch: Batch) -> NLLResult:
        batch, correction = add_noise(batch) if clean else (batch, 0)
        result = follow_paths(batch, solve)
        return replace(result, nll=result.nll + correction, nfe=result.nfe + clean)

    how = divergence, dequantization, enable_grad
    given = (batch_size, progress, generator, model_kwargs, *how)
    call = Call(model, x, solver.moments, log_prior, *given)
    return call.evaluate(likelihood, at_start=not clean)


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
    """Solve the probability-flow ODE from noise to data, with the density of what comes out.

    No training mode is changed: call `model.eval()` first if the network has dropout. For guidance
    give a network that wraps yours; the density is then that of the guided ODE.

    Args:
        model: the score model.
        latent: points at t_max, (B, *), in the coordinates of x; or a shape (B, *), for which they
            are drawn from N(0, prior_std² I) in the dtype and on the device of the network's first
            parameter.
        solver: `FixedGrid(steps)`, `ToTolerance(nats)` or `Adaptive()`, without a companion.
        divergence: as in `ode_nll`, or None for samples without their density, which
            differentiates nothing.
        log_prior: log-density at t_max of the latents that are given, as in `ode_nll`.
        batch_size: samples solved at a time, all if None.
        progress: whether to show a progress bar, for which tqdm has to be installed.
        enable_grad: whether the result carries a graph, for gradients through it; as in `ode_nll`.
        generator: the source of the latents and the probes; the global one if None.
        model_kwargs: keyword arguments of the network.

    Returns:
        The samples, at the schedule's t_min, where they carry noise of σ(t_min).

    Raises:
        TypeError: for tensors, containers, flags and other objects of a wrong type or dtype.
        ValueError: for a wrong shape, device, name or number, also one of a wrong type.
        DerivativeError: where the network's output does not depend on its input differentiably.
        ImportError: for a progress bar without tqdm.

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
    if isinstance(check_solver(solver), FixedGrid) and solver.companion:
        expected = "one without a companion, which compares densities of the prior at t_max"
        raise ValueError(complaint("solver", expected, solver, got=repr(solver)))
    check_divergence(divergence, optional=True)
    solve, drawn = solver.start(), not isinstance(latent, Tensor)
    if drawn and log_prior is not None:
        raise ValueError(
            "latent: expected latents drawn from the prior of log_prior; got a shape, for which "
            "they would be drawn from N(0, prior_std²)."
        )
    start = latent
    if not isinstance(start, Tensor):
        start = _draw(check_model(model), start, generator)

    def sampled(batch: Batch) -> NLLResult:
        return follow_paths(batch, solve, backwards=True)

    given = (batch_size, progress, generator, model_kwargs, divergence, None, enable_grad)
    call = Call(model, start, solver.moments, log_prior, *given)
    found = vars(call.evaluate(sampled, name="latent", of_prior=drawn))
    known = {} if divergence is not None else {"nll": None, "solver_error": None}
    return SampleResult(**{**found, **known, "x": found["latent"], "latent": start})


def _draw(model: ScoreModel, shape: object, generator: torch.Generator | None) -> Tensor:
    """Latents of a shape, of the prior."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        expected = "a tensor (B, *) at t_max, or its shape, which begins with B"
        raise TypeError(complaint("latent", expected, shape))
    sizes = [check_whole("latent's shape", size, 1) for size in shape]
    like = like_network(model)
    source = check_generator(generator, like.device)
    noise = torch.randn(sizes, generator=source, dtype=like.dtype, device=like.device)
    return model.schedule.prior_std * noise
