r"""The paths of the probability-flow ODE, and the log-density along them.

Purpose:
    The paths of a batch are computed in coordinates in which the ODE is the same for every
    schedule and the paths are nearly constant. The log-density of x is the log-density of its
    latent under the prior, plus an integral of the divergence along the path. The result includes
    the effect of any mismatch between the prior and q at t_max.

Coordinates:
    Let σ̂ = σ/α and u = log σ̂. Then y = x/α obeys dy/du = σ̂ ε̂ under every schedule. The state is
    z = (y − m)/c with c² = s² + σ̂². If the data follow N(m, s²), then y has mean m and standard
    deviation c at every noise level, and z is constant along each path.

Formula:
    dz/du = (σ̂/c) ε̂ − (σ̂²/c²) z
    log p_x(x₀) = log p_T(x_T) + Σ_i log(α₁ c₁/(α₀ c₀)) + ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du
    Index 0 denotes the data end, and index 1 denotes the noise end. The sums run over the
    elements of a sample.

Source:
    Kingma et al., "Variational Diffusion Models", arXiv 2107.00630; Karras et al.,
    arXiv 2206.00364, for y and the scaling; Zheng et al., ICML 2023, for log SNR as the time
    variable; Chen et al., arXiv 1806.07366, for the change of variables; Song et al.,
    arXiv 2011.13456, appendix D.2, for the likelihood of this ODE.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import (
    can_read_values,
    check_like,
    error_message,
    expand_right,
    sum_elements,
    widest_dtype,
)
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations
from hosm_losses.likelihood.coordinates import Coordinates, NoiseLevel
from hosm_losses.likelihood.divergence import NO_DIVERGENCE, DivergenceEstimator
from hosm_losses.likelihood.watch import FirstEvaluation
from hosm_losses.model import BoundModel


def all_finite(samples: Tensor) -> Tensor:
    """Return a mask (B,) of the samples (B, *) whose elements are all finite."""
    return torch.isfinite(samples).reshape(len(samples), -1).all(1)


@dataclass(frozen=True)
class Paths:
    """Samples at one end of their paths, with everything needed to solve the ODE from that end."""

    x: Tensor  # (B, *), in the precision of sums
    model: BoundModel
    coordinates: Coordinates
    dtype: torch.dtype  # the network's
    log_prior: Callable[[Tensor], Tensor] | None  # None for N(0, prior_std² I)
    generator: torch.Generator | None
    advance: Callable[[float], object]  # advances the progress bar by a number of samples
    watch: FirstEvaluation
    divergence: DivergenceEstimator  # NO_DIVERGENCE if only the ends of the paths are wanted
    evaluations: RecomputedEvaluations
    nll_offset: Tensor | None = None  # to be added to the nll of x, (B,); None for zero

    def rows(self, x: Tensor, rows: Tensor, nll_offset: Tensor | None) -> "Paths":
        """Return the paths of the given rows; x and `nll_offset` cover all samples."""
        points, model = x[rows].to(widest_dtype(x)), self.model.rows(rows)
        offset = None if nll_offset is None else nll_offset[rows]
        return replace(self, x=points, model=model, nll_offset=offset)

    @property
    def dimensions(self) -> int:
        """The dimension d of a sample."""
        return self.x[0].numel()

    def add_noise(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Draw noise ε, and return the pair (α x + σ ε, ε) at a noise level."""
        x = self.x
        noise = torch.randn(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
        return level.alpha * x + level.sigma * noise, noise

    def model_at(self, level: NoiseLevel, rows: Tensor | None = None) -> BoundModel:
        """Bind the model to a noise level, for the given rows (n,) of the batch (all if None)."""
        model = self.model if rows is None else self.model.rows(rows)
        t = level.t.to(torch.promote_types(self.dtype, torch.float32))
        return model.at(t.expand(len(self.x) if rows is None else len(rows)))

    def draw_probes(self, z: Tensor) -> Tensor | None:
        """Draw the probes of an evaluation at states z (B, *), in the network's dtype."""
        return self.divergence.draw(torch.empty_like(z, dtype=self.dtype), self.generator)

    def noise_at(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Return ε̂ at points (B, *), in the precision of the points."""
        if self.evaluations.applies():
            return self.evaluations.evaluate(partial(self.noise_at, x, level), x)
        model, points = self.model_at(level), x.to(self.dtype)
        if torch.is_grad_enabled() or self.watch.due:
            f, _ = self._evaluate(model, points, NO_DIVERGENCE, None)
        else:
            f = model.f(points)
        return -f.to(x.dtype)

    def slope_at(
        self, z: Tensor, level: NoiseLevel, probes: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ε̂ and dz/du for `rows` (all if None), and each probe's integrand, (K, n)."""
        if self.evaluations.applies():
            return self.evaluations.evaluate(partial(self.slope_at, z, level, probes, rows), z)
        x = self.coordinates.to_x(z, level).to(self.dtype)
        model, divergence = self.model_at(level, rows), self.divergence
        if torch.is_grad_enabled() or self.watch.due:
            f, divergences = self._evaluate(model, x, divergence, probes)
        else:
            f, divergences = divergence.estimate(model, x, probes)
        noise = -f.to(z.dtype)
        slope = self.coordinates.slope(z, noise, level)
        if divergences is None:
            return noise, slope, z.new_zeros(1, len(z))
        if divergences.shape[1:] != z.shape[:1]:
            expected = f"n estimates (n, {len(z)}) for {len(z)} samples"
            raise ValueError(error_message("divergence.estimate(...)[1]", expected, divergences))
        return noise, slope, self.coordinates.integrand(-divergences, level)

    def _evaluate(
        self,
        model: BoundModel,
        x: Tensor,
        divergence: DivergenceEstimator,
        probes: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return f and ∇·f, with the checks that a first evaluation or a graph requires.

        In the first evaluation of a call, `watch` looks for random draws and for operators without
        a derivative.

        With a graph, one non-finite sample would make the gradients of all parameters NaN, because
        0 · NaN is NaN. The network therefore receives ones in place of a non-finite sample, and
        the results for that sample are set to NaN. If a finite sample leads to a non-finite
        result, the batch is evaluated again without that sample. On an accelerator, f is first
        evaluated alone and without a graph, to find non-finite samples without synchronisation.
        """
        generator_states = self.watch.before(x)
        if not torch.is_grad_enabled():
            with self.watch.refusing_constants(divergence.products > 0):
                f, divergences = divergence.estimate(model, x, probes)
            self.watch.compare(generator_states, x)
            return f, divergences
        nonfinite, readable = ~all_finite(x), can_read_values(x)
        if not readable:
            with torch.no_grad():
                points = torch.where(expand_right(nonfinite, x), 1.0, x)
                nonfinite = nonfinite | ~all_finite(model.f(points))
        while True:
            points = torch.where(expand_right(nonfinite, x), 1.0, x)
            with self.watch.refusing_constants(divergence.products > 0):
                f, divergences = divergence.estimate(model, points, probes)
            finite = all_finite(f.detach())
            if divergences is not None:
                finite = finite & torch.isfinite(divergences.detach()).all(0)
            if not readable or bool((finite | nonfinite).all()):
                break
            nonfinite = nonfinite | ~finite
        self.watch.compare(generator_states, x)
        f = f.masked_fill(expand_right(nonfinite, f), math.nan)
        return f, None if divergences is None else divergences.masked_fill(nonfinite, math.nan)

    def log_prior_at(self, latent: Tensor) -> Tensor:
        """The log-density (B,) of the prior at latents (B, *), in the precision of the latents.

        The log-density of a non-finite latent is NaN. The prior receives zeros in place of a
        non-finite latent, because a prior may reject non-finite arguments. These zeros pass no
        gradient.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        points = latent if self.log_prior is None else latent.to(wide)
        finite = all_finite(points)
        points = torch.where(expand_right(finite, points), points, 0.0)
        if self.log_prior is None:
            std = self.coordinates.schedule.prior_std
            normalisation = self.dimensions * math.log(2 * math.pi * std**2)
            value = -0.5 * (sum_elements(points.square(), 1) / std**2 + normalisation)
        else:
            value = self.log_prior(points)
            own = value.dtype if isinstance(value, Tensor) else wide
            is_wide = own.is_floating_point and torch.promote_types(own, self.dtype) == own
            dtype = own if is_wide else wide
            check_like("log_prior(latent)", value, (len(points),), dtype, points.device, "x")
        return value.to(latent.dtype).masked_fill(~finite, math.nan)


class ODESolution(NamedTuple):
    """The end states of the paths, the integrals along the paths, and diagnostics."""

    z: Tensor  # the states at the other end, (B, *)
    integral: Tensor  # ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du from the start to the other end, (B,)
    nfe: Tensor  # network evaluations, (B,)
    products: Tensor  # products with the network's Jacobian, (B,)
    standard_error: Tensor | None  # error of the integral due to the probes, (B,); None if unknown
    solver_error: Tensor  # estimate, (B,)
    cause: Tensor  # why the solver gave up on a path, (B,); 0 if it did not, see `result`
    steps: int | None = None  # number of steps of a grid that the batch shares
    widening: float = 1.0  # Student's factor in standard_error
    kinks: Tensor | None = None  # whether the path seems to have kinks, (B,); None if unknown
