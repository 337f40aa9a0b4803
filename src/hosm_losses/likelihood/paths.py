r"""The paths of the probability-flow ODE, and the log-density along them.

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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import check_like, complaint, expand_right, may_look, over_elements
from hosm_losses.likelihood.checkpoints import Checkpoints
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.likelihood.watch import Watch
from hosm_losses.model import NoiseField
from hosm_losses.probes import Hutchinson, ToStandardError, draw_probes, unit_vector_chunks
from hosm_losses.schedules import Schedule

# Elements of a sample up to which "auto" is "exact": one probe errs by 0.6 nats at d = 8.
EXACT_UP_TO = 16
# A user's own: (x, t, **model_kwargs), as the network gets them, → (prediction, its divergence).
Function = Callable[..., tuple[Tensor, Tensor]]
Chosen = Literal["exact"] | Hutchinson | ToStandardError | Function
Divergence = Literal["auto"] | Chosen
Span = tuple[float, float]  # of u = log σ̂, from the start of a path to its end


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
    start: float | None = None  # log σ̂ of the data end, if not at t_min

    @property
    def span(self) -> Span:
        """log σ̂ at the data end and at the noise end."""
        low, high = self.schedule.log_sigma_hat_range
        return low if self.start is None else self.start, high

    def levels(self, log_sigma_hat: Tensor) -> Callable[[slice], NoiseLevel]:
        """A function that gives levels of a grid u (n,) to a batch; a slice of one for all of it.

        The schedule is asked once for all; the scale, as large as a sample, is made when due.
        """
        t = self.schedule.time(log_sigma_hat)
        alphas, sigmas = (expand_right(each, self.mean) for each in self.schedule(t))

        def chosen(rows: slice) -> NoiseLevel:
            sigma_hat = sigmas[rows] / alphas[rows]
            scale = torch.sqrt(self.std.square() + sigma_hat.square())
            return NoiseLevel(t[rows], alphas[rows], sigmas[rows], sigma_hat, scale)

        return chosen

    def level(self, log_sigma_hat: Tensor) -> NoiseLevel:
        """The noise level at u = log σ̂ (n,), in the precision of u."""
        return self.levels(log_sigma_hat)(slice(None))

    def ends(self, span: Span) -> tuple[NoiseLevel, NoiseLevel]:
        """The levels of a whole batch at both ends of a span of u."""
        level = self.levels(torch.tensor(span, dtype=self.std.dtype, device=self.std.device))
        return level(slice(0, 1)), level(slice(1, 2))

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


def check_divergence(divergence: object, *, optional: bool = False) -> None:
    """Raise ValueError unless this is a divergence, or None where that is an option."""
    known = isinstance(divergence, Hutchinson | ToStandardError)
    known = known or (callable(divergence) and not isinstance(divergence, type))
    known = known or (optional and divergence is None)
    if not (known or (isinstance(divergence, str) and divergence in ("auto", "exact"))):
        expected = "'auto', 'exact', Hutchinson(...)" + ", None" * optional + " or a callable"
        raise ValueError(complaint("divergence", expected, divergence))


def choose_divergence(divergence: Divergence | None, x: Tensor) -> Chosen | None:
    """The divergence for samples like those of x (B, *): what is given, or what "auto" takes."""
    if divergence == "auto":
        return "exact" if x[0].numel() <= EXACT_UP_TO else Hutchinson()
    return divergence


@dataclass(frozen=True)
class Batch:
    """Samples whose likelihood is asked for, and all that goes with them."""

    x: Tensor  # (B, *), in the precision of sums
    model: NoiseField
    coordinates: Coordinates
    dtype: torch.dtype  # the network's
    log_prior: Callable[[Tensor], Tensor] | None
    generator: torch.Generator | None
    advance: Callable[[float], object]  # told the samples' worth of work done
    watch: Watch
    divergence: Chosen | None
    checkpoints: Checkpoints

    @property
    def products(self) -> int:
        """Products with the Jacobian that a divergence takes."""
        if isinstance(self.divergence, Hutchinson):
            return self.divergence.count
        return self.x[0].numel() if self.divergence == "exact" else 0

    def rows(self, x: Tensor, rows: Tensor) -> "Batch":
        """Return the rows alone, at the points x of the whole batch."""
        points = x[rows].to(accumulator(x))
        return replace(self, x=points, model=self.model.rows(rows))

    def draw_probes(self, z: Tensor) -> Tensor | None:
        """Fresh probes (K, B, *), or None where the divergence takes none."""
        if not isinstance(self.divergence, Hutchinson):
            return None
        count, distribution = self.divergence.count, self.divergence.distribution
        like = torch.empty_like(z, dtype=self.dtype)
        return draw_probes(like, count, distribution, self.generator)

    def draw_noise(self) -> Tensor:
        """ε like x."""
        x = self.x
        return torch.randn(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)

    def field(self, level: NoiseLevel, rows: Tensor | None = None) -> NoiseField:
        """Return f = −ε̂ at a level, for the rows (n,) of the batch, all if None."""
        model = self.model if rows is None else self.model.rows(rows)
        t = level.t.to(torch.promote_types(self.dtype, torch.float32))
        return model.at(t.expand(len(self.x) if rows is None else len(rows)))

    def noise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """ε̂ at points (B, *), in their precision."""
        given = self.field(level), x.to(self.dtype), None, None
        (value,) = self.checkpoints(partial(self._evaluate, *given), x)
        return -value.to(x.dtype)

    def derivatives(
        self, z: Tensor, level: NoiseLevel, probes: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ε̂ of the rows (all if None), dz/du, and samples (K, n) of what is integrated over u."""
        return self.checkpoints(partial(self._derivatives, z, level, probes, rows), z)

    def _derivatives(
        self, z: Tensor, level: NoiseLevel, probes: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.coordinates.to_x(z, level).to(self.dtype)
        found = self._evaluate(self.field(level, rows), x, self.divergence, probes)
        noise = -found[0].to(z.dtype)
        slope = self.coordinates.slope(z, noise, level)
        if self.divergence is None:
            return noise, slope, z.new_zeros(1, len(z))
        return noise, slope, self.coordinates.integrand(-found[1].T, level)

    def _evaluate(
        self, field: NoiseField, x: Tensor, divergence: Chosen | None, probes: Tensor | None
    ) -> list[Tensor]:
        """f at x (n, *), and ∇·f (n, K) if asked.

        With a graph, samples that are not finite are kept apart, as 0 · NaN is NaN: one of them
        would take the gradients of all parameters with it. They are replaced by ones, and their
        values are NaN. Those that come out of finite x are found where that is free, and evaluated
        again; elsewhere the value alone is evaluated before, without a graph, so that nothing is
        read back from an accelerator.
        """
        before, look = self.watch.before(x), may_look(x)
        lost = ~all_finite(x) if torch.is_grad_enabled() else None

        def evaluate(value_alone: bool = divergence is None) -> list[Tensor]:
            points = x if lost is None else torch.where(expand_right(lost, x), 1.0, x)
            if value_alone:
                return [field(points)]
            with self.watch.derivative():
                value, forms = with_divergence(field, points, probes, divergence)
            return [value, forms.T]

        if lost is not None and not look:
            with torch.no_grad():
                lost = lost | ~all_finite(*evaluate(value_alone=True))
        found = evaluate()
        if lost is not None and look:
            good = torch.stack([all_finite(each.detach()) for each in found]).all(0)
            if not bool((good | lost).all()):
                lost = lost | ~good
                found = evaluate()
        self.watch.compare(before, x)
        if lost is None:
            return found
        return [each.masked_fill(expand_right(lost, each), math.nan) for each in found]

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
            own = value.dtype if isinstance(value, Tensor) else wide
            whole = own.is_floating_point and torch.promote_types(own, self.dtype) == own
            dtype = own if whole else wide
            check_like("log_prior(latent)", value, (len(given),), dtype, given.device, "x")
        return value.to(latent.dtype).masked_fill(~finite, math.nan)


class Solved(NamedTuple):
    """Where the paths end, what was integrated on the way, and fields of the result."""

    z: Tensor  # the states at the other end, (B, *)
    integral: Tensor  # ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du in the direction that was solved, (B,)
    nfe: Tensor  # network evaluations, (B,)
    products: Tensor  # with the network's Jacobian, (B,)
    standard_error: Tensor | None  # of the integral, from the probes, (B,); None if not known
    solver_error: Tensor  # estimate, (B,)
    failed: Tensor  # (B,)
    steps: int | None = None  # of a grid that the batch shares
    widening: float = 1.0  # Student's factor in standard_error
    kinks: Tensor | None = None  # whether the path seems to have some, (B,); None if not known


Solve = Callable[[Batch, Tensor, Span], Solved]


def follow_paths(batch: Batch, solve: Solve, *, backwards: bool = False) -> NLLResult:
    """Follow the paths from the data of a batch to its latents, or back from latents to data.

    `latent` is the other end: the data, if `backwards`.
    """
    coordinates = batch.coordinates
    low, high = coordinates.span
    data, noise = coordinates.ends((low, high))
    near, far = (noise, data) if backwards else (data, noise)
    span = (high, low) if backwards else (low, high)
    found = solve(batch, coordinates.to_z(batch.x, near), span)._asdict()
    end, integral = coordinates.to_x(found.pop("z"), far), found.pop("integral")
    latent, integral = (batch.x, -integral) if backwards else (end, integral)
    volume = coordinates.log_volume(noise) - coordinates.log_volume(data)
    prior = volume * 0 if batch.divergence is None else batch.log_prior_at(latent)
    return NLLResult(-(prior + volume + integral), end.to(batch.dtype), **found)


def with_divergence(
    field: NoiseField, x: Tensor, probes: Tensor | None, divergence: Chosen | None = None
) -> tuple[Tensor, Tensor]:
    """f at x (B, *), and an estimate of ∇·f for each of the probes (K, B, *), as (K, B).

    Without probes it is one without error, by passes back of `unit_vector_chunks`, or that of a
    function.
    """
    if callable(divergence):
        value, forms = field.with_divergence_of(divergence, x)
    elif (
        probes is not None and isinstance(divergence, Hutchinson) and divergence.mode == "forward"
    ):
        value, forms = field.forms_along(x, probes)
    else:
        directions = unit_vector_chunks(x) if probes is None else [probes]
        value, forms = field.quadratic_forms(x, directions)
    forms = forms.to(accumulator(x))
    return value, forms.sum(0, keepdim=True) if probes is None else forms
