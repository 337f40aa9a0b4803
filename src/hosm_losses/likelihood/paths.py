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
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hosm_losses._checks import (
    DerivativeError,
    can_read_values,
    check_like,
    check_prediction,
    error_message,
    expand_right,
    sum_elements,
)
from hosm_losses.derivatives import derive, quadratic_forms
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations
from hosm_losses.likelihood.coordinates import Coordinates, NoiseLevel, accumulator
from hosm_losses.likelihood.watch import FirstEvaluation
from hosm_losses.model import BoundModel, apply_affine
from hosm_losses.probes import Hutchinson, ToStandardError, draw_probes, unit_vector_chunks

# Elements of a sample up to which "auto" is "exact": one probe errs by 0.6 nats at d = 8.
EXACT_UP_TO = 16
# A user's own: (x, t, **model_kwargs), as the network gets them, → (prediction, its divergence).
Function = Callable[..., tuple[Tensor, Tensor]]
Chosen = Literal["exact"] | Hutchinson | ToStandardError | Function
Divergence = Literal["auto"] | Chosen


def all_finite(samples: Tensor) -> Tensor:
    """Whether all elements of each sample (B, *) are finite, (B,)."""
    return torch.isfinite(samples).reshape(len(samples), -1).all(1)


def check_divergence(divergence: object, *, optional: bool = False) -> None:
    """Raise unless this is a divergence, or None where that is an option."""
    known = isinstance(divergence, Hutchinson | ToStandardError)
    known = known or (callable(divergence) and not isinstance(divergence, type))
    known = known or (optional and divergence is None)
    if not (known or (isinstance(divergence, str) and divergence in ("auto", "exact"))):
        expected = "'auto', 'exact', Hutchinson(...)" + ", None" * optional + " or a callable"
        kind = ValueError if isinstance(divergence, str) else TypeError
        raise kind(error_message("divergence", expected, divergence))


def choose_divergence(divergence: Divergence | None, x: Tensor) -> Chosen | None:
    """The divergence for samples like those of x (B, *): what is given, or what "auto" takes."""
    if isinstance(divergence, str):
        small = x[0].numel() <= EXACT_UP_TO
        return "exact" if divergence == "exact" or small else Hutchinson()
    return divergence


@dataclass(frozen=True)
class Paths:
    """Samples whose likelihood is asked for, and all that goes with them."""

    x: Tensor  # (B, *), in the precision of sums
    model: BoundModel
    coordinates: Coordinates
    dtype: torch.dtype  # the network's
    log_prior: Callable[[Tensor], Tensor] | None
    generator: torch.Generator | None
    advance: Callable[[float], object]  # told the samples' worth of work done
    watch: FirstEvaluation
    divergence: Chosen | None
    checkpoints: RecomputedEvaluations

    @property
    def products(self) -> int:
        """Products with the Jacobian that a divergence takes."""
        if isinstance(self.divergence, Hutchinson):
            return self.divergence.count
        return self.x[0].numel() if self.divergence == "exact" else 0

    def rows(self, x: Tensor, rows: Tensor) -> "Paths":
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

    def model_at(self, level: NoiseLevel, rows: Tensor | None = None) -> BoundModel:
        """The model at a level, for the rows (n,) of the batch, all if None."""
        model = self.model if rows is None else self.model.rows(rows)
        t = level.t.to(torch.promote_types(self.dtype, torch.float32))
        return model.at(t.expand(len(self.x) if rows is None else len(rows)))

    def noise_at(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """ε̂ at points (B, *), in their precision."""
        if self.checkpoints.due():
            return self.checkpoints(partial(self.noise_at, x, level), x)
        value, _ = self._evaluate(self.model_at(level), x.to(self.dtype), None, None)
        return -value.to(x.dtype)

    def slope_at(
        self, z: Tensor, level: NoiseLevel, probes: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ε̂ of the rows (all if None), dz/du, and samples (K, n) of what is integrated over u."""
        if self.checkpoints.due():  # the state z alone is kept
            return self.checkpoints(partial(self.slope_at, z, level, probes, rows), z)
        x = self.coordinates.to_x(z, level).to(self.dtype)
        model, divergence = self.model_at(level, rows), self.divergence
        if torch.is_grad_enabled() or self.watch.due:
            value, forms = self._evaluate(model, x, divergence, probes)
        else:
            value, forms = value_and_divergence(model, x, divergence, probes)
        noise = -value.to(z.dtype)
        slope = self.coordinates.slope(z, noise, level)
        if forms is None:
            return noise, slope, z.new_zeros(1, len(z))
        return noise, slope, self.coordinates.integrand(-forms, level)

    def _evaluate(
        self, model: BoundModel, x: Tensor, divergence: Chosen | None, probes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """f and ∇·f, with a look at what the network draws and at samples that are lost.

        With a graph, samples that are not finite are kept apart, as 0 · NaN is NaN: one of them
        would take the gradients of all parameters with it. They are replaced by ones, and their
        values are NaN. Those that come out of finite x are found where that is free, and evaluated
        again; elsewhere the value alone is evaluated before, without a graph, so that nothing is
        read back from an accelerator.
        """
        before = self.watch.before(x)
        if not torch.is_grad_enabled():
            with self.watch.with_divergence() if divergence is not None else nullcontext():
                value, forms = value_and_divergence(model, x, divergence, probes)
            self.watch.compare(before, x)
            return value, forms
        lost, look = ~all_finite(x), can_read_values(x)
        if not look:
            with torch.no_grad():
                points = torch.where(expand_right(lost, x), 1.0, x)
                lost = lost | ~all_finite(model.f(points))
        while True:
            points = torch.where(expand_right(lost, x), 1.0, x)
            with self.watch.with_divergence() if divergence is not None else nullcontext():
                value, forms = value_and_divergence(model, points, divergence, probes)
            good = all_finite(value.detach())
            good = good if forms is None else good & torch.isfinite(forms.detach()).all(0)
            if not look or bool((good | lost).all()):
                break
            lost = lost | ~good
        self.watch.compare(before, x)
        value = value.masked_fill(expand_right(lost, value), math.nan)
        return value, None if forms is None else forms.masked_fill(lost, math.nan)

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
            value = -0.5 * (sum_elements(given.square(), 1) / std**2 + normalisation)
        else:
            value = self.log_prior(given)
            own = value.dtype if isinstance(value, Tensor) else wide
            whole = own.is_floating_point and torch.promote_types(own, self.dtype) == own
            dtype = own if whole else wide
            check_like("log_prior(latent)", value, (len(given),), dtype, given.device, "x")
        return value.to(latent.dtype).masked_fill(~finite, math.nan)


class ODESolution(NamedTuple):
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


def value_and_divergence(
    model: BoundModel, x: Tensor, divergence: Chosen | None, probes: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """f = −ε̂ at x (B, *), and an estimate of ∇·f for each of the probes (K, B, *), as (K, B).

    Without probes there is one without error, by passes back of all unit vectors, or that of a
    user's function; without a divergence None.
    """
    if divergence is None:
        return model.f(x), None
    p, q = model.model.affine(model.t, x)
    dtype = accumulator(x)
    elements = x.new_full((1, len(x)), x[0].numel(), dtype=dtype)
    if callable(divergence):
        prediction, forms = _of_function(divergence, model, x)
        squares = elements
    elif probes is None:
        prediction, forms = quadratic_forms(model, x, unit_vector_chunks(x))
        forms, squares = forms.to(dtype).sum(0, keepdim=True), elements
    else:
        squares = sum_elements(probes.square())
        if isinstance(divergence, Hutchinson) and divergence.mode == "forward":
            prediction, forms = _forward(model, x, probes)
        else:
            prediction, forms = quadratic_forms(model, x, [probes])
    scale = None if p is None else p.flatten()
    shift = None if q is None else q.flatten()
    divergences = -apply_affine(forms.to(dtype), squares, scale, shift)
    return -apply_affine(prediction, x, p, q), divergences


def _forward(model: BoundModel, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction and its forms, in one evaluation with its derivatives; no activation stays.

    A DerivativeError where the taylor engine cannot take the network.
    """
    # The engine makes a graph whatever the mode; it holds nothing here unless one is wanted.
    empty = saved_tensors_hooks(lambda _: None, _refuse_a_pass_back)
    try:
        with nullcontext() if torch.is_grad_enabled() else empty:
            value, along, _ = derive(model, x, probes, order=2, engine="taylor")
    except DerivativeError as error:
        raise DerivativeError(
            f"divergence: expected mode='reverse' for this network; got 'forward'. {error}"
        ) from error
    return value[0], sum_elements(along * probes)


def _refuse_a_pass_back(_: object) -> Tensor:
    raise DerivativeError("It takes a gradient itself.")


def _of_function(function: Function, model: BoundModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction and its divergence (1, B) by a user's function."""
    *arguments, kwargs = model.model.network_arguments(x, model.t, model.kwargs)
    found: Any = function(*arguments, **kwargs)
    if not isinstance(found, tuple) or len(found) != 2:
        expected = "two tensors, the prediction (B, *) and its divergence (B,)"
        raise TypeError(error_message("divergence(x, t)", expected, found))
    prediction, divergence = found
    check_prediction(prediction, x)
    dtype = getattr(divergence, "dtype", x.dtype)
    check_like("divergence(x, t)[1]", divergence, (len(x),), dtype, x.device, "x")
    return prediction, divergence[None]
