"""`ode_nll`, the log-density along the probability-flow ODE.

Source:
    Song et al., arXiv 2011.13456, appendix D.2, and see `paths`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import check_flag
from hosm_losses.likelihood.inputs import Call, LogPrior, add_noise
from hosm_losses.likelihood.integers import Uniform, check_dequantization
from hosm_losses.likelihood.paths import Batch, Divergence, check_divergence, follow_paths
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.likelihood.solvers import Adaptive, FixedGrid, ToTolerance, check_solver
from hosm_losses.model import ScoreModel
from hosm_losses.probes import Hutchinson


def ode_nll(
    model: ScoreModel,
    x: Tensor,
    *,
    solver: FixedGrid | ToTolerance | Adaptive = FixedGrid(),  # noqa: B008, it is frozen
    divergence: Divergence = Hutchinson(),  # noqa: B008
    log_prior: LogPrior | None = None,
    clean: bool = False,
    dequantization: Uniform | None = None,
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
        divergence: `Hutchinson(count, distribution)`, a vector-Jacobian product for each probe;
            or "exact", d of them. Two probes or more give a standard error on the fixed grid, four
            or more with `Adaptive`. On images "dct" is often the best distribution.
        log_prior: log-density at t_max, latent (B, *) → (B,), or a distribution of samples;
            N(0, prior_std² I) if None. It is given latents in the network's dtype, float32 at
            least, and may return that or more.
        clean: whether x is data without noise. One draw of noise then brings it to t_min, and nll
            bounds that of x from above in its mean, as in `variational_nll`, with which it
            compares. The noise of this draw is not in `standard_error`; it is small for a good
            model.
        dequantization: `Uniform()` for uint8 images: x becomes −1 + 2 (x + u)/256 with u uniform,
            and `bits_per_dim` counts the bits of the integers. None for continuous data.
        batch_size: samples solved at a time, all if None.
        progress: whether to show a progress bar, for which tqdm has to be installed.
        enable_grad: whether the result carries a graph, for gradients through it. A sample that
            fails has none, and leaves those of the others; on an accelerator the network is
            called once more for each evaluation, without a graph, to find it.
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
    check_dequantization(dequantization, divergence)

    def likelihood(batch: Batch) -> NLLResult:
        batch, correction = add_noise(batch) if clean else (batch, 0)
        result = follow_paths(batch, solve)
        return replace(result, nll=result.nll + correction, nfe=result.nfe + clean)

    moments, rest = (solver.data_mean, solver.data_std), (batch_size, progress, generator)
    call = Call(
        model, x, *moments, log_prior, *rest, model_kwargs, divergence, dequantization, enable_grad
    )
    return call.evaluate(likelihood, at_start=not clean)
