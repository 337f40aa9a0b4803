r"""The likelihood of the probability-flow ODE.

What:
    The log-density of x is that of its image under the prior plus an integral of the divergence
    along the path, see `coordinates`. A mismatch of prior and q at t_max is part of the answer.

Formula:
    exact        ∇·f = tr ∂f/∂x = Σ_i e_iᵀ ∂f/∂x e_i
    hutchinson   ∇·f = E[vᵀ ∂f/∂x v], the mean of K probes with variance Var[vᵀ ∂f/∂x v]/K
    The forward pass is shared; every direction costs one vector-Jacobian product.

Noise:
    In high dimension the error of the probes is far larger than the solver's. method="fixed" draws
    them afresh at every node, so it averages out along the path. The adaptive method needs a
    smooth integrand, so it keeps its probes and their error.

Source:
    Chen et al., arXiv 1806.07366, for the change of variables; Song et al., arXiv 2011.13456,
    appendix D.2, for the likelihood of the probability-flow ODE; Grathwohl et al., arXiv
    1810.01367, for the estimator in a likelihood; Abramowitz and Stegun, "Handbook of Mathematical
    Functions", 26.7.5, for Student's law.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hosm_losses._checks import check_choice, check_flag, check_number, check_whole
from hosm_losses.likelihood.adaptive import adaptive
from hosm_losses.likelihood.coordinates import NoiseLevel, accumulator
from hosm_losses.likelihood.inputs import (
    Batch,
    Dequantization,
    check_draws,
    check_probes,
    evaluate,
    noised,
)
from hosm_losses.likelihood.multistep import EXTRA_EVALUATIONS, MINIMUM_STEPS, Node, multistep
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.model import NoiseField, ScoreModel
from hosm_losses.probes import DISTRIBUTIONS, Distribution, draw_probes, unit_vector_chunks

Method = Literal["fixed", "adaptive"]
Divergence = Literal["exact", "hutchinson"]
CHUNK_ELEMENTS = 2**22
MAX_EVALUATIONS = 10_000
STATE_TOLERANCE = 0.03
MINIMUM_PATHS = 4
# Of t/2 − 1 in powers of 1/ν, t the quantile of Student's law where the normal law has 2.
STUDENT = (5 / 4, 49 / 32, 183 / 128, 5665 / 6144)


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
        clean: whether x is data without noise. One draw of noise then brings it to t_min, and nll
            bounds that of x from above as in `variational_nll`, with which it compares.
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
    check_choice("divergence", divergence, get_args(Divergence))
    solve = solver(method, steps, distribution, tolerance)
    kind = check_probes(probes, divergence)
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
    return evaluate(likelihood, model, x, *shared, model_kwargs, draws, enable_grad)


def solver(method: Method, steps: int, distribution: str, tolerance: float) -> "Solver":
    """The solver that checked options choose."""
    check_choice("method", method, get_args(Method))
    check_choice("distribution", distribution, DISTRIBUTIONS)
    steps = check_whole("steps", steps, MINIMUM_STEPS)
    tolerance = check_number("tolerance", tolerance, "a positive number of nats", above=0.0)
    if method == "adaptive":
        return partial(solve_adaptive, tolerance=tolerance)
    return partial(solve_fixed, steps=steps)


class Solved(NamedTuple):
    """Where the paths end, and what was gathered on the way."""

    z: Tensor  # the states at the other end, (B, *)
    integral: Tensor  # ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du in the direction that was solved, (B,)
    nfe: Tensor  # network evaluations, (B,)
    standard_error: Tensor | None  # of the integral, from the probes, (B,); None if not known
    solver_error: Tensor  # estimate, (B,)
    failed: Tensor  # (B,)


@dataclass(frozen=True)
class Paths:
    """The paths of a batch."""

    batch: Batch
    probes: int | None  # K random probes; 0 for the exact divergence, None for no divergence
    distribution: Distribution

    def draw(self, z: Tensor) -> Tensor | None:
        """Fresh probes (K, B, *), or None where there are none."""
        if not self.probes:
            return None
        like = torch.empty_like(z, dtype=self.batch.dtype)
        return draw_probes(like, self.probes, self.distribution, self.batch.generator)

    def slope_and_integrand(
        self, z: Tensor, level: NoiseLevel, probes: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ε̂ of the rows (all if None), dz/du, and samples (K, n) of what is integrated over u."""
        coordinates = self.batch.coordinates
        x = coordinates.to_x(z, level).to(self.batch.dtype)
        if self.probes is None:
            noise = -self.batch.field(level, rows)(x).to(z.dtype)
            return noise, coordinates.slope(z, noise, level), z.new_zeros(1, len(z))
        value, divergence = with_divergence(self.batch.field(level, rows), x, probes)
        noise, integrand = -value.to(z.dtype), coordinates.integrand(-divergence, level)
        return noise, coordinates.slope(z, noise, level), integrand


Solver = Callable[[Paths, Tensor, tuple[float, float]], Solved]


def followed(paths: Paths, solve: Solver, *, backwards: bool = False) -> NLLResult:
    """Follow the paths from the data of a batch to its latents, or back from latents to data.

    `latent` is the other end: the data, if `backwards`.
    """
    batch, coordinates = paths.batch, paths.batch.coordinates
    span = coordinates.schedule.log_sigma_hat_range
    data, noise = coordinates.ends(span)
    near, far = (noise, data) if backwards else (data, noise)
    z = coordinates.to_z(batch.x, near)
    span = (span[1], span[0]) if backwards else span
    z, integral, nfe, standard_error, solver_error, failed = solve(paths, z, span)
    end = coordinates.to_x(z, far)
    latent, integral = (batch.x, -integral) if backwards else (end, integral)
    volume = coordinates.log_volume(noise) - coordinates.log_volume(data)
    prior = volume * 0 if paths.probes is None else batch.log_prior_at(latent)
    nll = -(prior + volume + integral)
    return NLLResult(nll, end.to(batch.dtype), nfe, standard_error, solver_error, failed)


def with_divergence(field: NoiseField, x: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """f at x (B, *), and an estimate of ∇·f for each of the probes (K, B, *), as (K, B).

    Without probes it is one without error, by passes back of CHUNK_ELEMENTS elements.
    """
    chunk = max(1, CHUNK_ELEMENTS // x.numel())
    directions = unit_vector_chunks(x, chunk) if probes is None else [probes]
    value, forms = field.quadratic_forms(x, directions)
    forms = forms.to(accumulator(x))
    return value, forms.sum(0, keepdim=True) if probes is None else forms


def solve_fixed(paths: Paths, z: Tensor, span: tuple[float, float], steps: int) -> Solved:
    """Solve from z at the start of a span of u = log σ̂ on a uniform grid, with fresh probes."""
    batch, coordinates = paths.batch, paths.batch.coordinates
    grid = torch.linspace(*span, 2 * steps + 1, dtype=z.dtype, device=z.device)
    level = coordinates.levels(grid)  # of the nodes, and of the midpoints between them

    def slope(place: int, z: Tensor) -> Tensor:
        here = level(place)
        return coordinates.slope(z, batch.noise(coordinates.to_x(z, here), here), here)

    def node(place: int, z: Tensor) -> Node:
        batch.advance(len(z) / (steps + 1))
        here = level(place)
        noise, moved, integrand = paths.slope_and_integrand(z, here, paths.draw(z))
        seen = integrand.detach()
        variance = seen.var(0) / len(seen) if len(seen) > 1 else torch.zeros_like(seen[0])
        covector = coordinates.covector(noise.detach(), here)
        return Node(moved, integrand.mean(0), variance, covector)

    h = (span[1] - span[0]) / steps
    end, integral, variance, path_error, quadrature_error = multistep(slope, node, z, h, steps)
    nfe = torch.full((len(z),), steps + EXTRA_EVALUATIONS, device=z.device)
    exact = paths.probes == 0
    standard_error = variance.sqrt() if exact or (paths.probes or 0) > 1 else None
    solver_error = path_error + quadrature_error if exact else path_error
    return Solved(end, integral, nfe, standard_error, solver_error, torch.zeros_like(nfe).bool())


def solve_adaptive(paths: Paths, z: Tensor, span: tuple[float, float], tolerance: float) -> Solved:
    """Solve from the start of a span, at either end, with steps of each sample's own.

    They are steps in r = σ̂/(σ̂ + s), du = dr/(r (1 − r)), s the data's standard deviation: neither
    end is at infinity, and the noise end is no farther than the data end. A step may err by
    `tolerance` nats in the log-density, and in the state by 0.03 of it in root mean square.
    """
    batch, coordinates = paths.batch, paths.batch.coordinates
    count, elements = len(z), z[0].numel()
    probes = paths.draw(z)
    on_their_way = count
    reference = float(coordinates.std.log().mean())

    low, high = (1 / (1 + math.exp(reference - u)) for u in span)
    sign = 1.0 if high > low else -1.0  # the solver goes up, in −r where r goes down

    def slope(s: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        nonlocal on_their_way
        r = sign * s
        batch.advance(on_their_way - len(rows))
        on_their_way = len(rows)
        here = coordinates.level(torch.logit(r) + reference)
        state = y[:, :elements].reshape(len(y), *z.shape[1:])
        chosen = None if probes is None else probes[:, rows]
        _, moved, integrand = paths.slope_and_integrand(state, here, chosen, rows)
        moved = torch.cat([moved.reshape(len(y), -1), integrand.T], 1)
        return sign * moved / (r * (1 - r))[:, None]

    def norm(error: Tensor) -> Tensor:
        state = error[:, :elements].square().mean(1).sqrt()
        return torch.maximum(error[:, elements:].mean(1), state / STATE_TOLERANCE) / tolerance

    start = torch.cat([z.reshape(count, elements), z.new_zeros(count, paths.probes or 1)], 1)
    ends = (sign * low, sign * high)
    end, nfe, error, failed = adaptive(slope, start, ends, norm, MAX_EVALUATIONS)
    batch.advance(on_their_way)
    integrals = end[:, elements:]
    standard_error = None
    if paths.probes == 0:
        standard_error = torch.zeros_like(integrals[:, 0])
    elif paths.probes is not None and paths.probes >= MINIMUM_PATHS:
        spread = integrals.detach().std(1) / paths.probes**0.5
        standard_error = spread * student_factor(paths.probes - 1)
    end, solver_error = end[:, :elements].reshape(z.shape), error[:, elements:].mean(1)
    return Solved(end, integrals.mean(1), nfe, standard_error, solver_error, failed)


def student_factor(freedom: int) -> float:
    """The factor that makes ±2 standard errors from ν degrees of freedom cover 95.45 %.

    Without it they cover 86 % for ν = 3, where the expansion is short by 0.2 %.
    """
    return 1 + sum(term / freedom**power for power, term in enumerate(STUDENT, 1))
