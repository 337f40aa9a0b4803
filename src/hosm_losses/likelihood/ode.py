r"""The likelihood of a diffusion ODE.

What:
    The probability-flow ODE carries data to noise, and its density with it: the log-density of x
    is that of its image under the prior plus an integral of the divergence along the path.

Formula:
    In `coordinates`. x is a point at t_min and its image one at t_max; a mismatch
    between the prior and q at t_max is part of the answer.

Noise:
    With divergence="hutchinson" the error of the trace estimate is far larger than the solver's
    in high dimension. method="fixed" draws fresh probes at every node, whose errors average out
    along the path; the path itself does not depend on them. method="adaptive" needs a smooth
    integrand, so it keeps its probes along the path, and their errors do not average out: use it
    with divergence="exact" on sharp low-dimensional densities.

Source:
    Chen et al., arXiv 1806.07366, for the change of variables; Song et al., arXiv 2011.13456,
    appendix D.2, for the likelihood of the probability-flow ODE.
"""

__all__ = ["ode_nll"]

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import (
    check_choice,
    check_flag,
    check_model_kwargs,
    check_number,
    check_whole,
)
from hosm_losses._progress import progress_bar
from hosm_losses._torch_internals import normal, outside_inference_mode
from hosm_losses.likelihood.dequantize import check_dequantization, dequantize, importance_weighted
from hosm_losses.likelihood.divergence import DIVERGENCES, accumulator
from hosm_losses.likelihood.inputs import (
    check_options,
    chunks,
    data_coordinates,
    log_prior_at,
    network_dtype,
)
from hosm_losses.likelihood.paths import Paths, Solved, solve_adaptive, solve_fixed
from hosm_losses.likelihood.result import NLLResult, mark_failed
from hosm_losses.model import ScoreModel, check_model, condition
from hosm_losses.probes import DISTRIBUTIONS

METHODS = ("fixed", "adaptive")
MINIMUM_STEPS = 4


def ode_nll(
    model: ScoreModel,
    x: Tensor,
    *,
    method: str = "fixed",
    steps: int = 64,
    divergence: str = "hutchinson",
    probes: int = 1,
    distribution: str = "rademacher",
    tolerance: float = 3e-4,
    data_mean: float | Tensor = 0.0,
    data_std: float | Tensor = 0.5,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    dequantization: str | None = None,
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
        x: data (B, *), taken as points at the schedule's t_min; uint8 with a dequantization.
        method: "fixed", a uniform grid in log σ̂ with steps + 10 evaluations; or "adaptive", steps
            of each sample's own.
        steps: of the fixed grid, 4 or more.
        divergence: "hutchinson", one vector-Jacobian product a probe; or "exact", d of them, in
            bounded memory.
        probes: K, the number of probes a sample. Two or more give a standard error on the fixed
            grid, four or more with the adaptive method.
        distribution: "rademacher", "gaussian", "sphere", or "dct", which on images often has less
            variance.
        tolerance: of the adaptive method, nats a step.
        data_mean: mean of the data, a number or a tensor that broadcasts to a sample. With
            `data_std` it sets coordinates in which Gaussian data does not move; no result depends
            on it but through the solver's error.
        data_std: standard deviation of the data, likewise.
        log_prior: log-density at t_max, latent (B, *) → (B,); N(0, prior_std² I) if None.
        dequantization: "uniform" for uint8 images: x becomes −1 + 2 (x + u)/256 with u uniform,
            and `bits_per_dim` of the result counts the bits of the integers. None for continuous
            data.
        dequantization_draws: K draws of u, whose densities are averaged for a tighter bound, at K
            times the cost; above 1 with divergence="exact" alone.
        batch_size: samples solved at a time, all if None.
        progress: whether to show a progress bar, for which tqdm has to be installed.
        enable_grad: whether the result carries a graph, for gradients through it.
        generator: the source of the probes, on the device of x; the global one if None.
        model_kwargs: keyword arguments of the network.

    Returns:
        The result, in nats; `bits_per_dim` converts. A sample that failed has NaN: its number was
        not finite, its path did not arrive, or the solver error is above max(1000, 0.1 d) nats.

    Raises:
        TypeError: for an argument of a wrong type or dtype, integer images included.
        ValueError: for a wrong shape, name or number.
        DerivativeError: where the network's output does not depend on its input differentiably.
        ImportError: for a progress bar without tqdm.

    Example:
        >>> from hosm_losses import VESchedule
        >>> schedule = VESchedule(sigma_max=2.0)
        >>> def standard_normal(x, t):
        ...     return schedule.sigma(t)[:, None] * x / (1 + schedule.sigma(t)[:, None] ** 2)
        >>> model = ScoreModel(standard_normal, schedule)
        >>> result = ode_nll(
        ...     model, torch.zeros(1, 2), divergence="exact", data_std=1.0,
        ...     log_prior=lambda x: -torch.log(torch.tensor(2 * torch.pi * 5.0)).expand(1),
        ... )
        >>> print(f"{result.nll.item():.3f} nats, {result.nfe.item()} evaluations")
        1.838 nats, 74 evaluations
    """
    check_choice("method", method, METHODS)
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    steps, probes, tolerance = _numbers(steps, probes, tolerance, divergence)
    check_flag("enable_grad", enable_grad)
    check_model(model)
    dequantization_draws = check_dequantization(
        x, dequantization, dequantization_draws, divergence
    )
    batch_size, generator = check_options(batch_size, log_prior, progress, generator, x)
    kwargs = check_model_kwargs(model_kwargs)
    coordinates = data_coordinates(model, x, data_mean, data_std)
    dtype = network_dtype(model, x)
    with (
        outside_inference_mode(),
        torch.set_grad_enabled(enable_grad),
        progress_bar(progress, len(x) * dequantization_draws, "sample") as advance,
    ):
        paths = Paths(
            condition(model, len(x), kwargs, primitives=model.primitives and enable_grad),
            coordinates,
            dtype,
            0 if divergence == "exact" else probes,
            distribution,
            generator,
            advance,
        )
        solve = partial(solve_fixed, steps=steps)
        if method == "adaptive":
            solve = partial(solve_adaptive, tolerance=tolerance)
        draws = []
        for _ in range(dequantization_draws):
            point = dequantize(x, generator) if dequantization else normal(x)
            parts = [
                _nll(paths.rows(rows), point[rows].to(accumulator(x)), solve, log_prior)
                for rows in chunks(x, batch_size)
            ]
            draws.append(NLLResult.cat(parts))
        return importance_weighted(draws) if dequantization else draws[0]


def _nll(
    paths: Paths,
    x: Tensor,
    solve: Callable[[Paths, Tensor, tuple[float, float]], Solved],
    log_prior: Callable[[Tensor], Tensor] | None,
) -> NLLResult:
    coordinates = paths.coordinates
    schedule = coordinates.schedule
    span = schedule.log_sigma_hat_range
    data, noise = (coordinates.at(u) for u in span)
    solved = solve(paths, coordinates.to_z(x, data), span)
    latent = coordinates.to_x(solved.z, noise)
    log_density = (
        log_prior_at(log_prior, latent, paths.dtype, schedule.prior_std)
        + coordinates.log_volume(noise)
        - coordinates.log_volume(data)
        + solved.integral
    )
    return mark_failed(
        NLLResult(
            -log_density,
            latent.to(paths.dtype),
            solved.nfe,
            solved.standard_error,
            solved.solver_error,
            solved.failed,
        )
    )


def _numbers(
    steps: object, probes: object, tolerance: object, divergence: str
) -> tuple[int, int, float]:
    if probes == "exact":
        raise ValueError(
            "probes: expected a whole number; got 'exact'. All unit vectors are "
            "divergence='exact'."
        )
    count = check_whole("probes", probes, 1)
    if divergence == "exact" and count != 1:
        raise ValueError(
            f"probes: expected 1 with divergence='exact', which draws none; got {count}."
        )
    return (
        check_whole("steps", steps, MINIMUM_STEPS),
        count,
        check_number("tolerance", tolerance, "a positive number of nats", above=0.0),
    )
