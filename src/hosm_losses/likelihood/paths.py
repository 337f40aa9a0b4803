r"""The paths of the probability-flow ODE, and what is gathered along them.

What:
    The paths of a batch in coordinates where every schedule is one ODE, and nearly flat. The
    log-density of x is that of its image under the prior plus an integral of the divergence along
    the path. A mismatch of prior and q at t_max is part of the answer.

Coordinates:
    With σ̂ = σ/α and u = log σ̂, y = x/α moves with dy/du = σ̂ ε̂ whatever the schedule. Centred
    and scaled by what the data's Gaussian would have at that noise, z = (y − m)/c with c² = s² +
    σ̂², it does not move at all for data N(m, s²).

Formula:
    dz/du = (σ̂/c) ε̂ − (σ̂²/c²) z
    log p_x(x₀) = log p_T(x_T) + Σ_i log(α₁ c₁/(α₀ c₀)) + ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du
    0 the data end, 1 the noise end; the sums run over the elements of a sample.

    exact        ∇·f = tr ∂f/∂x = Σ_i e_iᵀ ∂f/∂x e_i
    hutchinson   ∇·f = E[vᵀ ∂f/∂x v], the mean of K probes with variance Var[vᵀ ∂f/∂x v]/K
    The forward pass is shared; every direction costs one vector-Jacobian product.

Source:
    Kingma et al., "Variational Diffusion Models", arXiv 2107.00630; Karras et al.,
    arXiv 2206.00364, for y and the scaling; Zheng et al., ICML 2023, for log SNR as time; Chen et
    al., arXiv 1806.07366, for the change of variables; Song et al., arXiv 2011.13456, appendix
    D.2, for the likelihood of this ODE; Grathwohl et al., arXiv 1810.01367, for the estimator in
    a likelihood.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import check_like, expand_right, may_look, over_elements
from hosm_losses.likelihood.result import SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT, NLLResult
from hosm_losses.model import ConditionedModel, NoiseField
from hosm_losses.probes import Distribution, draw_probes, unit_vector_chunks
from hosm_losses.schedules import Schedule

CHUNK_ELEMENTS = 2**22


class NoiseLevel(NamedTuple):
    """What α, σ and the scale are at some u; all but t are expanded to multiply a batch."""

    t: Tensor  # the schedule's time (n,), never outside [t_min, t_max]
    alpha: Tensor
    sigma: Tensor
    sigma_hat: Tensor  # σ/α
    scale: Tensor  # c, by element where the data's std is


@dataclass(frozen=True)
class Coordinates:
    """z = (x/α − mean)/c with c² = std² + σ̂²."""

    schedule: Schedule
    mean: Tensor  # of the data, broadcast to (1, *)
    std: Tensor  # of the data, broadcast to (1, *)

    def level(self, log_sigma_hat: Tensor) -> NoiseLevel:
        """The noise level at u = log σ̂ (n,), in the precision of u."""
        return self._scaled(*self._asked(log_sigma_hat))

    def levels(self, log_sigma_hat: Tensor) -> Callable[[int], NoiseLevel]:
        """A function of i that gives a whole batch the level u_i of a grid (n,)."""
        # The schedule is asked once for all; the scale, as large as a sample, is made when due.
        parts = self._asked(log_sigma_hat)
        return lambda index: self._scaled(*(part[index : index + 1] for part in parts))

    def ends(self, span: tuple[float, float]) -> tuple[NoiseLevel, NoiseLevel]:
        """The levels of a whole batch at both ends of a span of u."""
        level = self.levels(torch.tensor(span, dtype=self.std.dtype, device=self.std.device))
        return level(0), level(1)

    def _asked(self, log_sigma_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = self.schedule.time(log_sigma_hat)
        alpha, sigma = self.schedule(t)
        return t, expand_right(alpha, self.mean), expand_right(sigma, self.mean)

    def _scaled(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> NoiseLevel:
        sigma_hat = sigma / alpha
        scale = torch.sqrt(self.std.square() + sigma_hat.square())
        return NoiseLevel(t, alpha, sigma, sigma_hat, scale)

    def to_z(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Data coordinates to z."""
        return (x / level.alpha - self.mean) / level.scale

    def to_x(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Z to data coordinates."""
        return level.alpha * (level.scale * z + self.mean)

    def slope(self, z: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """dz/du for the predicted noise ε̂."""
        ratio = level.sigma_hat / level.scale
        return ratio * (noise - ratio * z)

    def integrand(self, divergence: Tensor, level: NoiseLevel) -> Tensor:
        """σ ∇·ε̂ − Σ_i σ̂²/c² from the divergence ∇·ε̂ (K, n)."""
        shrinking = over_elements((level.sigma_hat / level.scale).square(), 1)
        return level.sigma.reshape(-1) * divergence - shrinking

    def log_volume(self, level: NoiseLevel) -> Tensor:
        """Σ_i log(α c), (n,)."""
        return over_elements((level.alpha * level.scale).log(), 1)

    def covector(self, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The gradient in z of the log-density, where the model's score is that of its ODE."""
        return -(level.scale / level.sigma_hat) * noise


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64, but float32 on devices that have no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def all_finite(samples: Tensor) -> Tensor:
    """Whether all elements of each sample (B, *) are finite, (B,)."""
    return torch.isfinite(samples).reshape(len(samples), -1).all(1)


def solver_limit(elements: int) -> float:
    """The solver_error in nats above which a sample of so many elements has failed."""
    return max(SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT * elements)


@dataclass(frozen=True)
class Batch:
    """Samples whose likelihood is asked for, and all that goes with them."""

    x: Tensor  # (B, *), in the precision of sums
    model: ConditionedModel
    coordinates: Coordinates
    dtype: torch.dtype  # the network's
    log_prior: Callable[[Tensor], Tensor] | None = None
    generator: torch.Generator | None = None
    advance: Callable[[float], object] = lambda _: None  # told the samples' worth of work done
    # What evaluates, given the value alone as a function of x, x, and what is to be called.
    watch: Callable[..., tuple[Tensor, ...]] = lambda _value, _x, evaluate: evaluate()

    def rows(self, x: Tensor, rows: Tensor) -> "Batch":
        """Return the rows alone, at the points x of the whole batch."""
        points = x[rows].to(accumulator(x))
        return replace(self, x=points, model=self.model.rows(rows))

    def field(self, level: NoiseLevel, rows: Tensor | None = None) -> NoiseField:
        """Return f = −ε̂ at a level, for the rows (n,) of the batch, all if None."""
        model = self.model if rows is None else self.model.rows(rows)
        t = level.t.to(torch.promote_types(self.dtype, torch.float32))
        return model.at(t.expand(len(self.x) if rows is None else len(rows)))

    def noise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """ε̂ at other points (B, *) of the batch, in their precision."""

        def evaluated(x: Tensor) -> Tensor:
            return self.field(level)(x)

        given = x.to(self.dtype)
        one = partial(apart, evaluated, lambda points: (evaluated(points),), given)
        (value,) = self.watch(evaluated, given, one)
        return -value.to(x.dtype)

    def log_prior_at(self, latent: Tensor) -> Tensor:
        """Log-density (B,) of the prior at latents (B, *), in their precision.

        It is NaN where a latent is not finite. A prior that looks at its argument is shown zeros
        there, and no gradient comes from them.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        given = latent if self.log_prior is None else latent.to(wide)
        finite = all_finite(given)
        given = torch.where(expand_right(finite, given), given, 0.0)
        if self.log_prior is None:
            std = self.coordinates.schedule.prior_std
            normalisation = latent[0].numel() * math.log(2 * math.pi * std**2)
            value = -0.5 * (over_elements(given.square(), 1) / std**2 + normalisation)
        else:
            value = self.log_prior(given)
            shape, dtype = (len(given),), wide
            if isinstance(value, Tensor) and value.is_floating_point():
                whole = torch.promote_types(value.dtype, self.dtype) == value.dtype
                dtype = value.dtype if whole else wide
            check_like("log_prior(latent)", value, shape, dtype, given.device, "x")
        return value.to(latent.dtype).masked_fill(~finite, math.nan)


class Solved(NamedTuple):
    """Where the paths end, and what was gathered on the way."""

    z: Tensor  # the states at the other end, (B, *)
    integral: Tensor  # ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du in the direction that was solved, (B,)
    nfe: Tensor  # network evaluations, (B,)
    standard_error: Tensor | None  # of the integral, from the probes, (B,); None if not known
    solver_error: Tensor  # estimate, (B,)
    failed: Tensor  # (B,)
    steps: int | None = None  # of a grid that the batch shares
    widening: float = 1.0  # Student's factor in standard_error


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

        def value_at(x: Tensor) -> Tensor:
            return self.batch.field(level, rows)(x)

        def evaluated(x: Tensor) -> tuple[Tensor, ...]:
            if self.probes is None:
                return (value_at(x),)
            value, divergence = with_divergence(self.batch.field(level, rows), x, probes)
            return value, divergence.T  # samples first

        all_parts = partial(apart, value_at, evaluated, x)
        value, *divergences = self.batch.watch(value_at, x, all_parts)
        noise = -value.to(z.dtype)
        slope = coordinates.slope(z, noise, level)
        if not divergences:
            return noise, slope, z.new_zeros(1, len(z))
        return noise, slope, coordinates.integrand(-divergences[0].T, level)


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
    solved = solve(paths, z, span)
    end = coordinates.to_x(solved.z, far)
    latent, integral = (batch.x, -solved.integral) if backwards else (end, solved.integral)
    volume = coordinates.log_volume(noise) - coordinates.log_volume(data)
    prior = volume * 0 if paths.probes is None else batch.log_prior_at(latent)
    nll = -(prior + volume + integral)
    return NLLResult(
        nll=nll,
        latent=end.to(batch.dtype),
        nfe=solved.nfe,
        standard_error=solved.standard_error,
        solver_error=solved.solver_error,
        failed=solved.failed,
        steps=solved.steps,
        widening=solved.widening,
    )


def apart(
    value: Callable[[Tensor], Tensor], evaluate: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
) -> tuple[Tensor, ...]:
    """What is evaluated at x (B, *), kept free of samples that are not finite if it has a graph.

    0 · NaN is NaN: one of them would take the gradients of all parameters with it. They are
    replaced by ones, and their values are NaN. Those that come out of finite x are found where
    that is free, and evaluated again; elsewhere the value alone is evaluated before, without a
    graph, so that nothing is read back from an accelerator.
    """
    if not torch.is_grad_enabled():
        return evaluate(x)
    lost, look, found = ~all_finite(x), may_look(x), ()
    points = torch.where(expand_right(lost, x), 1.0, x)
    if look:
        found = evaluate(points)
        good = torch.stack([all_finite(each.detach()) for each in found]).all(0)
    else:
        with torch.no_grad():
            good = all_finite(value(points))
    if not look or not bool((good | lost).all()):
        lost = lost | ~good
        found = evaluate(torch.where(expand_right(lost, x), 1.0, x))
    return tuple(each.masked_fill(expand_right(lost, each), math.nan) for each in found)


def with_divergence(field: NoiseField, x: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """f at x (B, *), and an estimate of ∇·f for each of the probes (K, B, *), as (K, B).

    Without probes it is one without error, by passes back of CHUNK_ELEMENTS elements.
    """
    chunk = max(1, CHUNK_ELEMENTS // x.numel())
    directions = unit_vector_chunks(x, chunk) if probes is None else [probes]
    value, forms = field.quadratic_forms(x, directions)
    forms = forms.to(accumulator(x))
    return value, forms.sum(0, keepdim=True) if probes is None else forms
