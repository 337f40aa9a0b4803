"""Samples of the probability-flow ODE, with the density of each.

What:
    The paths of `ode` from a latent at t_max to a point at t_min. The log-density is integrated on
    the way by the same quadrature, so it is that of `ode_nll` at the sample, at no second solve.
    Without a divergence a node is one evaluation of the network, and nothing is differentiated.

Source:
    Song et al., arXiv 2011.13456, for the sampler; the density is that of `ode`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses._checks import check_generator, check_whole, complaint
from hosm_losses.likelihood.inputs import Call, LogPrior
from hosm_losses.likelihood.paths import Batch, Divergence, check_divergence, follow_paths
from hosm_losses.likelihood.result import NLLResult, SampleResult
from hosm_losses.likelihood.solvers import Adaptive, FixedGrid, ToTolerance, check_solver
from hosm_losses.model import ScoreModel, check_model
from hosm_losses.probes import Hutchinson


def ode_sample(
    model: ScoreModel,
    latent: Tensor | Sequence[int],
    *,
    solver: FixedGrid | ToTolerance | Adaptive = FixedGrid(),  # noqa: B008, it is frozen
    divergence: Divergence | None = Hutchinson(),  # noqa: B008
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
        divergence: `Hutchinson(count, distribution)` or "exact", or None for samples without their
            density, which differentiates nothing.
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
    if check_solver(solver).companion:
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

    moments, rest = (solver.data_mean, solver.data_std), (batch_size, progress, generator)
    call = Call(
        model, start, *moments, log_prior, *rest, model_kwargs, divergence, enable_grad=enable_grad
    )
    found = vars(call.evaluate(sampled, name="latent", of_prior=drawn))
    known = {} if divergence is not None else {"nll": None, "solver_error": None}
    return SampleResult(**{**found, **known, "x": found["latent"], "latent": start})


def _draw(model: ScoreModel, shape: object, generator: torch.Generator | None) -> Tensor:
    """Latents of a shape, of the prior."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        expected = "a tensor (B, *) at t_max, or its shape, which begins with B"
        raise TypeError(complaint("latent", expected, shape))
    sizes = [check_whole("latent's shape", size, 1) for size in shape]
    parameters = model.network.parameters() if isinstance(model.network, nn.Module) else ()
    like = next((each for each in parameters if each.is_floating_point()), torch.empty(0))
    source = check_generator(generator, like.device)
    noise = torch.randn(sizes, generator=source, dtype=like.dtype, device=like.device)
    return model.schedule.prior_std * noise
