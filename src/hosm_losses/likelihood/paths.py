r"""The paths of the probability-flow ODE, and the log-density along them.

Purpose:
    The coordinates are chosen so that the ODE is the same for every schedule and its solutions are
    nearly constant. The log-density of x is the log-density of its latent under the prior, plus
    the integral of the ODE's divergence along the path. If the prior differs from the distribution
    of the noisy data at t_max, this log-density includes the effect of the difference. In a call's
    first network evaluation, `FirstEvaluation` checks whether the network's output is random.

Coordinates:
    Let σ̂ = σ/α and u = log σ̂. Then y = x/α obeys dy/du = σ̂ ε̂ under every schedule. The state is
    z = (y − m)/c with c² = s² + σ̂². If the data follow N(m, s²), then y has mean m and standard
    deviation c at every noise level, and z is constant along each path.

Formula:
    dz/du = (σ̂/c) ε̂ − (σ̂²/c²) z
    log p_x(x₀) = log p_T(x_T) + Σ_i log(α₁ c₁/(α₀ c₀)) + ∫ (σ ∇·ε̂ − Σ_i σ̂²/c²) du
    Index 0 denotes the data end, and index 1 denotes the noise end. The sums run over the
    elements of a sample.

Rounding in half precision:
    Let δ be the relative spacing of the numbers in which the network answers. Since
    ε̂ = p · prediction + q x estimates noise of unit variance, the elements of p · prediction have
    a size of about √(1 + q² x²). Rounding changes each element of ε̂ by about ½ δ √(1 + q² x²), and
    ∇·ε̂ by about ½ δ |∇·ε̂ − q d|. Along the path, the gradient of the log-density with respect to
    z is about 1 per element. Per unit of u, the log-density therefore changes by about
        r = ½ δ √((σ (∇·ε̂ − q d))² + Σ_i σ̂²/c² (1 + q² x_i²)).
    In measurements on trained networks, the rounding errors at levels closer than CORRELATION in
    u were alike, and those farther apart were independent. The error of the log-density is
    therefore about √(CORRELATION · length of the span) · r. The solvers take the largest r on the
    path, and add this error to `solver_error` if the dtype is narrower than float32.

Source:
    Kingma et al., "Variational Diffusion Models", arXiv 2107.00630; Karras et al.,
    arXiv 2206.00364, for y and the scaling; Zheng et al., ICML 2023, for log SNR as the time
    variable; Chen et al., arXiv 1806.07366, for the change of variables; Song et al.,
    arXiv 2011.13456, appendix D.2, for the likelihood of this ODE.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states

from hosm_losses._checks import (
    can_read_values,
    check_like,
    error_message,
    expand_right,
    noised,
    sum_elements,
    warn,
    widest_dtype,
)
from hosm_losses._torch_internals import is_traced
from hosm_losses.derivatives import NetworkState
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations
from hosm_losses.likelihood.divergence import NO_DIVERGENCE, DivergenceEstimator
from hosm_losses.likelihood.result import all_finite
from hosm_losses.model import Affine, BoundModel, ScoreModel
from hosm_losses.schedules import Schedule
from hosm_losses.taylor import refuse_constants

Span = tuple[float, float]  # u = log σ̂ at the start of a path and at its end
CORRELATION = 0.1  # distance in log σ̂ within which rounding errors are alike
TRAINING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
TRAINING += (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TRAINING += (nn.FeatureAlphaDropout, nn.RReLU, nn.MultiheadAttention)


class NoiseLevel(NamedTuple):
    """α, σ and the scale c at a given u = log σ̂; all fields but t broadcast against a batch."""

    t: Tensor  # the network's time (n,), never outside [t_min, t_max]
    alpha: Tensor
    sigma: Tensor
    sigma_hat: Tensor  # σ/α
    scale: Tensor  # c, per element if the data's std is per element
    ratio: Tensor  # σ̂/c
    affine: Affine  # (p, q) in ε̂ = p · prediction + q x


@dataclass(frozen=True)
class Coordinates:
    """z = (x/α − mean)/c with c² = std² + σ̂²."""

    model: ScoreModel
    dtype: torch.dtype  # the network's dtype
    mean: Tensor  # mean of the data, broadcast to (1, *)
    std: Tensor  # standard deviation of the data, broadcast to (1, *)
    log_size: float  # log of the root mean square of std, on the host
    start: float | None = None  # log σ̂ at the data end; None for t_min

    @property
    def schedule(self) -> Schedule:
        """The model's schedule."""
        return self.model.schedule

    @property
    def span(self) -> Span:
        """log σ̂ at the data end and at the noise end."""
        low, high = self.schedule.log_sigma_hat_range
        return low if self.start is None else self.start, high

    def levels(self, log_sigma_hat: Tensor) -> Callable[[slice], NoiseLevel]:
        """Return a function that maps a slice of a grid u (n,) to the noise levels in this slice.

        A slice of length one yields one level for the whole batch, and a slice of length B yields
        one level for each sample. The schedule is evaluated once for the whole grid. The scale is
        computed only for the slice, because each level's scale may have as many elements as a
        sample.
        """
        t = self.schedule.time(log_sigma_hat)
        alpha, sigma = (expand_right(part, self.mean) for part in self.schedule(t))
        t = t.to(torch.promote_types(self.dtype, torch.float32))
        p, q = self.model.affine(t, self.mean)
        sigma_hats, variance = sigma / alpha, self.std.square()

        def level(place: slice) -> NoiseLevel:
            sigma_hat = sigma_hats[place]
            scale = torch.sqrt(variance + sigma_hat.square())
            coefficients = t[place], alpha[place], sigma[place]
            affine = None if p is None else p[place], None if q is None else q[place]
            return NoiseLevel(*coefficients, sigma_hat, scale, sigma_hat / scale, affine)

        return level

    def level(self, log_sigma_hat: Tensor) -> NoiseLevel:
        """The noise levels at u = log σ̂ (n,); α and σ have u's dtype."""
        return self.levels(log_sigma_hat)(slice(None))

    def ends(self, span: Span) -> tuple[NoiseLevel, NoiseLevel]:
        """The noise levels at the two ends of a span of u, shared by the whole batch."""
        ends = torch.linspace(*span, 2, dtype=self.std.dtype, device=self.std.device)
        level = self.levels(ends)
        return level(slice(0, 1)), level(slice(1, 2))

    def to_z(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Convert data coordinates to z."""
        return (x / level.alpha - self.mean) / level.scale

    def to_x(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Convert z to data coordinates."""
        return level.alpha * (level.scale * z + self.mean)

    def slope(self, z: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """dz/du for the predicted noise ε̂."""
        return level.ratio * (noise - level.ratio * z)

    def integrand(self, divergence: Tensor, level: NoiseLevel) -> Tensor:
        """The integrand σ ∇·ε̂ − Σ_i σ̂²/c², (K, n), for a given divergence ∇·ε̂ (K, n)."""
        return level.sigma.reshape(-1) * divergence - sum_elements(level.ratio.square(), 1)

    def log_volume(self, level: NoiseLevel) -> Tensor:
        """Σ_i log(α c), (n,)."""
        return sum_elements((level.alpha * level.scale).log(), 1)

    def log_gaussian(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The log-density (B,) of x at a noise level if the data follow N(mean, std²)."""
        normalisation = x[0].numel() * math.log(2 * math.pi)
        squares = sum_elements(self.to_z(x, level).square(), 1)
        return -(squares + normalisation) / 2 - self.log_volume(level)

    def covector(self, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The gradient of the log-density with respect to z.

        This gradient is exact if the model's score equals the score of the ODE's density.
        """
        return -(level.scale / level.sigma_hat) * noise


def rounding(dtype: torch.dtype) -> float:
    """Return the smallest solver error, in nats, that is reported for a network of this dtype."""
    return 0.0 if dtype == torch.float64 else 1e-6


@contextmanager
def buffers_restored(modules: Mapping[str, nn.Module], x: Tensor) -> Iterator[None]:
    """Return a context manager that restores buffers (e.g. running statistics) on exit."""
    may_change = any(part.training and part._buffers for part in modules.values())
    before = NetworkState(modules[""], x) if may_change and not is_traced() else None
    try:
        yield
    finally:
        if before is not None:
            before.restore(generators=False)


def warn_of_training_mode(modules: Mapping[str, nn.Module]) -> bool:
    """Warn and return True if a module in training mode affects likelihoods; else return False."""
    for name, part in modules.items():
        if not part.training or not isinstance(part, TRAINING):
            continue
        # The dropout probability of a dropout layer or of an attention layer.
        if getattr(part, "p", getattr(part, "dropout", 1)) > 0:
            warn(
                "network: expected evaluation mode, as after model.eval(); got "
                f"{name or 'the network'}, a {type(part).__name__} in training mode. Its results "
                "are random or mix samples."
            )
            return True
    return False


class FirstEvaluation:
    """Checks the network once for random draws, and once for operators without a derivative.

    Random draws are detected by comparing generator states, because every random draw in torch
    advances one of torch's generators. A list of random layers could never be complete, because a
    network's own code may randomly drop labels, layers or words.

    Operators without a derivative are rejected only in the first evaluation that computes a
    divergence, because checking every evaluation would slow down small networks.
    """

    def __init__(self, *, look_for_draws: bool, look_for_constants: bool) -> None:
        checks = {"draws": look_for_draws, "constants": look_for_constants}
        self.due = {check for check, wanted in checks.items() if wanted}
        self.answers: set[torch.dtype] = set()  # the dtypes of the network's predictions

    def refusing_constants(self, differentiates: bool) -> AbstractContextManager[Any]:
        """Return a context manager that rejects operators without a derivative.

        Such operators are rejected only in the first evaluation that differentiates the network.
        In all other evaluations, the context manager does nothing.
        """
        if not (differentiates and "constants" in self.due):
            return nullcontext()
        self.due.remove("constants")
        return refuse_constants()

    def before(self, x: Tensor) -> list[Tensor]:
        """Return the generator states of the CPU and of x's device, or [] to skip the check."""
        # Inside a CUDA graph, the states cannot be read.
        if "draws" not in self.due or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return []
        return [torch.get_rng_state(), *get_device_states(x)[1]]

    def compare(self, before: list[Tensor], x: Tensor) -> None:
        """Warn if the first evaluation, at the points x, advanced a random generator."""
        after = self.before(x)
        self.due.discard("draws")
        if not all(map(torch.equal, before, after)):
            warn(
                "network: expected an output that depends on its input alone; got one that draws "
                "random numbers, as dropout does in training mode. Call model.eval() first, and "
                "look for code that draws random numbers in any mode. If a divergence of your own "
                "draws, pass DivergenceFunction(function, is_random=True)."
            )


@dataclass(frozen=True)
class Paths:
    """Samples at one end of their paths, with everything needed to solve the ODE from that end."""

    x: Tensor  # (B, *), in the dtype used for sums
    model: BoundModel
    coordinates: Coordinates
    log_prior: Callable[[Tensor], Tensor] | None  # None for N(0, prior_std² I)
    generator: torch.Generator | None
    advance: Callable[[float], object]  # advances the progress bar by a number of samples
    watch: FirstEvaluation
    divergence: DivergenceEstimator  # NO_DIVERGENCE if only the ends of the paths are wanted
    evaluations: RecomputedEvaluations
    size: int  # the number of samples in a batch that is not the last
    nll_offset: Tensor | None = None  # to be added to the nll of x, (B,); None for zero

    def rows(self, x: Tensor, rows: Tensor, nll_offset: Tensor | None) -> "Paths":
        """Return the paths of the samples in `rows`; x and `nll_offset` contain all samples."""
        points, model = x[rows].to(widest_dtype(x)), self.model.rows(rows)
        offset = None if nll_offset is None else nll_offset[rows]
        return replace(self, x=points, model=model, nll_offset=offset)

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype."""
        return self.coordinates.dtype

    @property
    def dimensions(self) -> int:
        """The dimension d of a sample."""
        return self.x[0].numel()

    def at_half_speed(self) -> "Paths":
        """The same paths, for one of two solutions: the progress bar advances half as far."""
        return replace(self, advance=lambda samples: self.advance(samples / 2))

    def add_noise(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Draw noise ε and return (α x + σ ε, ε), with α and σ at the given noise level."""
        x = self.x
        noise = torch.randn(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
        return noised(x, noise, level.alpha, level.sigma), noise

    def model_at(self, level: NoiseLevel, rows: Tensor | None = None) -> BoundModel:
        """Bind the model to a noise level, for the given rows (n,) of the batch (all if None)."""
        model = self.model if rows is None else self.model.rows(rows)
        t = level.t.expand(len(self.x) if rows is None else len(rows))
        return model.at(t, level.affine, self.watch.answers)

    def draw_probes(self, z: Tensor) -> Tensor | None:
        """Draw probes, in the network's dtype, for an evaluation at states z (B, *)."""
        return self.divergence.draw(torch.empty_like(z, dtype=self.dtype), self.generator)

    def noise_at(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Return ε̂ at points (B, *), in the dtype of the points."""
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
        if divergence is NO_DIVERGENCE:
            return noise, slope, z.new_zeros(1, len(z))
        if divergences is None or divergences.shape[1:] != z.shape[:1]:
            expected = f"n estimates (n, {len(z)}) for {len(z)} samples"
            raise ValueError(error_message("divergence.estimate(...)[1]", expected, divergences))
        return noise, slope, self.coordinates.integrand(-divergences, level)

    def rates(self, z: Tensor, u: float, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return dz/du (B, *) and the integrand (B,) at states z, for one u = log σ̂."""
        level = self.coordinates.level(torch.full((1,), u, dtype=z.dtype, device=z.device))
        _, slope, integrands = self.slope_at(z, level, probes)
        return slope, integrands.mean(0)

    def _evaluate(
        self,
        model: BoundModel,
        x: Tensor,
        divergence: DivergenceEstimator,
        probes: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return f and ∇·f, and keep non-finite samples out of the autograd graph.

        A call's first network evaluation is checked for random draws, and its first evaluation of
        a divergence is checked for operators without a derivative.

        In an autograd graph, one non-finite sample would make the gradients of all parameters NaN,
        because 0 · NaN is NaN. The network therefore receives ones in place of a non-finite
        sample, and the results for that sample are set to NaN. If a finite sample leads to a
        non-finite result, the batch is evaluated again with ones in place of that sample.

        On an accelerator, testing the results would require synchronisation. On such a device,
        f alone is first evaluated without a graph, to find the samples with a non-finite f.
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

    @torch.no_grad()
    def rounding_error(
        self, z: Tensor, integrand: Tensor, level: NoiseLevel, rate: Tensor | float = 1.0
    ) -> Tensor | None:
        """Return the error (n,) due to rounding in half precision if it is everywhere as here.

        None if the network receives and returns float32 or a wider dtype. `integrand`, (n,), is
        multiplied by `rate`.
        """
        delta = max(torch.finfo(dtype).eps for dtype in (self.dtype, *self.watch.answers))
        if delta <= torch.finfo(torch.float32).eps:
            return None
        q, (low, high) = level.affine[1], self.coordinates.span
        squares, moved = level.ratio.square(), 0.0
        own = integrand / rate + sum_elements(squares, 1)
        if q is not None:
            own = own - self.dimensions * (level.sigma * q).reshape(-1)
            moved = (q * self.coordinates.to_x(z, level)).square()
        effect = own.square() + sum_elements(squares * (1 + moved) + torch.zeros_like(z), 1)
        return delta / 2 * torch.sqrt(CORRELATION * (high - low) * effect).nan_to_num(0, 0)

    def log_prior_at(self, latent: Tensor) -> Tensor:
        """The log-density (B,) of the prior at latents (B, *), in the dtype of the latents.

        The log-density of a non-finite latent is NaN. The prior receives zeros in place of a
        non-finite latent, because a prior may reject non-finite arguments. No gradient flows
        through these zeros.
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
