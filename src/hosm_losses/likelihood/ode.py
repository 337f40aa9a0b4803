r"""The likelihood of the probability-flow ODE.

What:
    The log-density of x is that of its image under the prior plus an integral of the divergence
    along the path, see `coordinates`. A mismatch of prior and q at t_max is part of the answer.

Noise:
    In high dimension the error of divergence="hutchinson" is far larger than the solver's.
    method="fixed" draws fresh probes at every node, so it averages out along the path. The
    adaptive method needs a smooth integrand, so it keeps its probes and their error: use it with
    divergence="exact" on sharp low-dimensional densities.

Source:
    Chen et al., arXiv 1806.07366, for the change of variables; Song et al., arXiv 2011.13456,
    appendix D.2, for the likelihood of the probability-flow ODE.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hosm_losses._checks import check_choice, check_flag, check_number, check_whole
from hosm_losses.likelihood.dequantize import Dequantization, check_draws
from hosm_losses.likelihood.inputs import Batch, evaluate, whole_batch
from hosm_losses.likelihood.multistep import MINIMUM_STEPS
from hosm_losses.likelihood.paths import Paths, Solved, solve_adaptive, solve_fixed
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.model import ScoreModel
from hosm_losses.probes import DISTRIBUTIONS, Distribution

Method = Literal["fixed", "adaptive"]
Divergence = Literal["exact", "hutchinson"]


def ode_nll(
    model: ScoreModel,
    x: Tensor,
    *,
    method: Method = "fixed",
    steps: int = 64,
    divergence: Divergence = "hutchinson",
    probes: int = 1,
    distribution: Distribution = "rademacher",
    tolerance: float = 3e-4,
    data_mean: float | Tensor = 0.0,
    data_std: float | Tensor = 0.5,
    log_prior: Callable[[Tensor], Tensor] | None = None,
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
        x: data (B, *), taken as points at the schedule's t_min; uint8 with a dequantization.
        method: "fixed", a uniform grid in log σ̂ with steps + 10 evaluations; or "adaptive", steps
            of each sample's own.
        steps: of the fixed grid, 4 or more.
        divergence: "hutchinson", one vector-Jacobian product a probe; or "exact", d of them.
        probes: K, the number of probes a sample. Two or more give a standard error on the fixed
            grid, four or more with the adaptive method.
        distribution: "rademacher", "gaussian", "sphere", or "dct", often best on images.
        tolerance: of the adaptive method, nats a step.
        data_mean: mean of the data, a number or a tensor that broadcasts to a sample. With
            `data_std` it sets coordinates in which Gaussian data does not move. It changes the
            solver's error alone.
        data_std: standard deviation of the data, likewise.
        log_prior: log-density at t_max, latent (B, *) → (B,); N(0, prior_std² I) if None.
        dequantization: "uniform" for uint8 images: x becomes −1 + 2 (x + u)/256 with u uniform,
            and `bits_per_dim` counts the bits of the integers. None for continuous data.
        dequantization_draws: K draws of u, whose densities are averaged for a tighter bound, at K
            times the cost; above 1 with divergence="exact" alone.
        batch_size: samples solved at a time, all if None.
        progress: whether to show a progress bar, for which tqdm has to be installed.
        enable_grad: whether the result carries a graph, for gradients through it.
        generator: the source of the probes, on the device of x; the global one if None.
        model_kwargs: keyword arguments of the network.

    Returns:
        The result, in nats; `bits_per_dim` converts. A sample that failed has NaN.

    Raises:
        TypeError: for an argument of a wrong type or dtype, integer images included.
        ValueError: for a wrong shape, name or number.
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
    check_choice("method", method, get_args(Method))
    check_choice("divergence", divergence, get_args(Divergence))
    check_choice("distribution", distribution, DISTRIBUTIONS)
    steps = check_whole("steps", steps, MINIMUM_STEPS)
    probes = _check_probes(probes, divergence)
    tolerance = check_number("tolerance", tolerance, "a positive number of nats", above=0.0)
    check_flag("enable_grad", enable_grad)
    draws = check_whole("dequantization_draws", dequantization_draws, 1)
    if draws > 1:
        check_draws(draws, dequantization, divergence)
    solve = partial(solve_fixed, steps=steps)
    if method == "adaptive":
        solve = partial(solve_adaptive, tolerance=tolerance)

    def likelihood(batch: Batch) -> NLLResult:
        return _nll(Paths(batch, 0 if divergence == "exact" else probes, distribution), solve)

    batch = whole_batch(
        model, x, data_mean, data_std, log_prior, dequantization, generator, model_kwargs
    )
    return evaluate(likelihood, batch, dequantization, batch_size, progress, draws, enable_grad)


def _nll(paths: Paths, solve: Callable[[Paths, Tensor, tuple[float, float]], Solved]) -> NLLResult:
    batch, coordinates = paths.batch, paths.batch.coordinates
    span = coordinates.schedule.log_sigma_hat_range
    data, noise = coordinates.ends(span)
    z = coordinates.to_z(batch.x, data)
    z, integral, nfe, standard_error, solver_error, failed = solve(paths, z, span)
    latent = coordinates.to_x(z, noise)
    volume = coordinates.log_volume(noise) - coordinates.log_volume(data)
    nll = -(batch.log_prior_at(latent) + volume + integral)
    return NLLResult(nll, latent.to(batch.dtype), nfe, standard_error, solver_error, failed)


def _check_probes(probes: object, divergence: str) -> int:
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
    return count
