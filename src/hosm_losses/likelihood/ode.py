"""`ode_nll`, the log-density along the probability-flow ODE, and the choice of a solver.

Source:
    Song et al., arXiv 2011.13456, appendix D.2, and see `paths`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from hosm_losses._checks import (
    check_choice,
    check_flag,
    check_idle,
    check_number,
    check_whole,
    complaint,
)
from hosm_losses.likelihood.adaptive import solve_adaptive
from hosm_losses.likelihood.inputs import evaluate, noised
from hosm_losses.likelihood.integers import Dequantization, check_draws
from hosm_losses.likelihood.multistep import MINIMUM_STEPS, ToTolerance, solve_fixed
from hosm_losses.likelihood.paths import Batch, Paths, Solver, followed
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.model import ScoreModel
from hosm_losses.probes import DISTRIBUTIONS, Distribution

Method = Literal["fixed", "adaptive"]
Divergence = Literal["exact", "hutchinson"]
TOLERANCES: dict[Method, float] = {"fixed": 0.01, "adaptive": 3e-4}  # nats of a path, of a step


def ode_nll(
    model: ScoreModel,
    x: Tensor,
    *,
    method: Method = "fixed",
    steps: int | None = 64,
    divergence: Divergence = "hutchinson",
    probes: int = 1,
    distribution: Distribution = "rademacher",
    tolerance: float | None = None,
    group: "dist.ProcessGroup | None" = None,
    companion: bool = False,
    data_mean: float | Tensor = 0.0,
    data_std: float | Tensor = 0.5,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    clean: bool = False,
    dequantization: Dequantization | None = None,
    dequantization_draws: int = 1,
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
        method: "fixed", a uniform grid in log σ̂ with steps + 10 evaluations, one more with
            `clean`; or "adaptive", steps of each sample's own.
        steps: of the fixed grid, 4 or more; the adaptive method ignores them. None takes the
            fewest of 32, 64, …, 1024 with which `solver_error` is within `tolerance` on the first
            batch, and keeps them; the trials take no probe and are not in `nfe`.
        divergence: "hutchinson", one vector-Jacobian product a probe; or "exact", d of them.
        probes: K, the number of probes a sample. Two or more give a standard error on the fixed
            grid, four or more with the adaptive method.
        distribution: "rademacher", "gaussian", "sphere", or "dct", often best on images. It and
            `probes` are errors where none are drawn.
        tolerance: of the adaptive method, nats a step, 3e-4 if None; with steps=None, nats of the
            `solver_error` of every sample, 0.01 if None. Ignored by a fixed grid of given steps.
        group: with steps=None, the processes that have to take the same steps; None where each
            may take its own.
        companion: whether to solve with half the steps as well, for a `solver_error` that covers
            networks whose paths stretch small errors too, at 57 % more evaluations for 64 steps.
            The method is "fixed", steps are given, even and 8 or more.
        data_mean: mean of the data, a number or a tensor that broadcasts to a sample. With
            `data_std` it sets coordinates in which Gaussian data does not move. It changes the
            solver's error alone.
        data_std: standard deviation of the data, likewise.
        log_prior: log-density at t_max, latent (B, *) → (B,); N(0, prior_std² I) if None. It is
            given latents in the network's dtype, float32 at least, and may return that or more.
        clean: whether x is data without noise. One draw of noise then brings it to t_min, and nll
            bounds that of x from above in its mean, as in `variational_nll`, with which it
            compares. The noise of this draw is not in `standard_error`; it is small for a good
            model.
        dequantization: "uniform" for uint8 images: x becomes −1 + 2 (x + u)/256 with u uniform,
            and `bits_per_dim` counts the bits of the integers. None for continuous data.
        dequantization_draws: K draws of u, and of the noise if `clean`, whose densities are
            averaged for a tighter bound, at K times the cost; above 1 with divergence="exact"
            alone.
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
        >>> result = ode_nll(model, torch.zeros(1, 2), divergence="exact", data_std=1.0)
        >>> print(f"{result.nll.item():.3f} nats, {result.nfe.item()} evaluations")
        1.838 nats, 74 evaluations
    """
    check_choice("divergence", divergence, get_args(Divergence))
    solve = solver(method, steps, tolerance, group, companion)
    kind = check_probes(probes, distribution, divergence)
    check_flag("enable_grad", enable_grad)
    check_flag("clean", clean)
    draws = check_whole("dequantization_draws", dequantization_draws, 1)
    if draws > 1:
        check_draws(draws, dequantization, divergence)

    def likelihood(batch: Batch) -> NLLResult:
        batch, correction = noised(batch) if clean else (batch, 0)
        result = followed(Paths(batch, kind, distribution), solve)
        return replace(result, nll=result.nll + correction, nfe=result.nfe + clean)

    shared = (data_mean, data_std, log_prior, dequantization, batch_size, progress, generator)
    given: dict[str, Any] = {"enable_grad": enable_grad, "at_start": not clean}
    return evaluate(likelihood, model, x, *shared, model_kwargs, draws, **given)


def check_probes(probes: object, distribution: str, divergence: str | None) -> int | None:
    """Return what `Paths` takes: K random probes, 0 for the exact divergence, None for none."""
    check_choice("distribution", distribution, DISTRIBUTIONS)
    if isinstance(probes, str) and probes == "exact":
        remedy = "All unit vectors are divergence='exact'."
        raise ValueError(complaint("probes", "a whole number", probes, remedy))
    count = check_whole("probes", probes, 1)
    if divergence != "hutchinson":
        where = f"divergence={divergence!r}"
        check_idle("probes", count, 1, where)
        check_idle("distribution", distribution, "rademacher", where)
    return {"exact": 0, None: None}.get(divergence, count)


def solver(
    method: Method,
    steps: int | None,
    tolerance: float | None,
    group: "dist.ProcessGroup | None",
    companion: bool = False,
) -> Solver:
    """The solver that checked options choose."""
    check_flag("companion", companion)
    check_choice("method", method, get_args(Method))
    if steps is not None:
        steps = check_whole("steps", steps, MINIMUM_STEPS)
    if tolerance is None:
        tolerance = TOLERANCES[method]
    tolerance = check_number("tolerance", tolerance, "a positive number of nats", above=0.0)
    chosen = method == "fixed" and steps is None
    if group is not None and not (chosen and isinstance(group, dist.ProcessGroup)):
        expected = "None, or a process group with method='fixed' and steps=None"
        raise ValueError(complaint("group", expected, group))
    halves = steps is not None and steps % 2 == 0 and steps >= 2 * MINIMUM_STEPS
    if companion and not (method == "fixed" and halves):
        expected = f"False, or method='fixed' with even steps of {2 * MINIMUM_STEPS} or more"
        got = f"True with method={method!r}, steps={steps}"
        raise ValueError(f"companion: expected {expected}; got {got}.")
    if method == "adaptive":
        return partial(solve_adaptive, tolerance=tolerance)
    if steps is None:
        return ToTolerance(tolerance, group)
    return partial(solve_fixed, steps=steps, companion=companion)
