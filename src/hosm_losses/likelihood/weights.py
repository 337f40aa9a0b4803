r"""Importance weights of samples from the ODE, to estimate expectations and normalising constants.

Formula, for an unnormalised target π and samples x_i drawn from the density q of the ODE:
    log w_i = log π(x_i) + nll_i − v_i/2
    log Z = log mean w         E_π[f] = Σ w_i f(x_i)/Σ w_i         ESS = (Σ w)²/Σ w²

    With random probes, nll is −log q plus noise with variance v. If this noise is Gaussian, the
    mean of its exponential is e^{v/2}. The term −v_i/2 corrects for this factor, with v_i
    estimated from the probes.

    Standard errors are computed with a jackknife that leaves out one sample at a time, together
    with its probes.

    The interval for log Z extends 1.96 standard errors below the estimate, and usually farther
    above it. If the weights are skewed and the samples miss regions of large weight, both the mean
    weight and its standard error are underestimated. The upper end is therefore computed with the
    largest weight counted twice. Let n be the number of weights including this copy, m their mean,
    s the standard error of m, and γ their skewness divided by √n. With T = (m − Z)/s, Hall's
    transformation g(T) = T + γ T²/3 + γ² T³/27 + γ/6 is nearly standard normal. At the upper end
    of the interval for Z, g(T) is −1.96, so the upper end is
        m + 3 s u/(1 + c + c²),     u = 1.96 + γ/6,     c = (1 − γ u)^{1/3}

    The weights apply to x itself: q is the exact density of x at t_min, where x still contains
    noise with standard deviation σ(t_min). The noise at t_min lowers the effective sample size but
    does not bias the estimates. The weights do not apply to denoised samples, which have a
    different density.

Source:
    Owen, "Monte Carlo theory, methods and examples" (2013), chapter 9. Hall, "On the removal of
    skewness by transformation", JRSS B 54 (1992), for the interval.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import check_like, error_message, warn
from hosm_losses.likelihood.result import NLLResult, SampleResult

LogTarget = Callable[[Tensor], Tensor]
NORMAL = 1.959964  # the 0.975 quantile of the standard normal distribution
SMALL, LARGE = 0.25, 1.0  # limits on `Weights.probe_variance`


class Expectation(NamedTuple):
    """A mean under the target, with the standard error of each element."""

    value: Tensor
    error: Tensor


class Sandwich(NamedTuple):
    """Lower and upper bounds on log Z in nats, with their standard errors.

    The lower bound is the mean of log w over the samples. The upper bound is the mean of
    log π + nll over points drawn from the target. Only the upper bound accounts for modes that the
    samples miss.
    """

    lower: float
    lower_error: float
    upper: float
    upper_error: float

    def __str__(self) -> str:
        """Return one line of text with both bounds; an error that is not finite is left out."""
        pairs = self[:2], self[2:]
        lower, upper = (f"{v:.4f}" + f" ± {e:.4f}" * math.isfinite(e) for v, e in pairs)
        return f"log Z is between {lower} and {upper} nats"


@dataclass(frozen=True)
class Weights:
    """Importance weights of samples, and estimates based on the weights; `print` shows a summary.

    Attributes:
        x: the samples, (B, *).
        log_weights: log w, (B,); −inf for failed samples and for samples at which log π is −inf.
        variance: the variance of log w due to random probes, (B,); zero with the exact divergence.
        solver_error: the solver error in the nll of each sample, in nats, (B,).
        log_target: the callable that returns log π; `sandwich` applies it to points other than x.
        failed_share: the fraction of samples that failed; failed samples have weight zero.
    """

    x: Tensor
    log_weights: Tensor
    variance: Tensor
    solver_error: Tensor
    log_target: LogTarget
    failed_share: float = 0.0

    @cached_property
    def normalized(self) -> Tensor:
        """The weights divided by their sum, in float64, (B,)."""
        return self.log_weights.double().softmax(0)

    @property
    def log_z(self) -> float:
        """An estimate of log Z, the log of the mean weight, in nats."""
        return float(self.log_weights.logsumexp(0)) - math.log(len(self.log_weights))

    @property
    def log_z_error(self) -> float:
        """Estimated standard error of `log_z`; the estimate is often too small.

        `log_z_interval` allows for such underestimates. The standard error is NaN if one sample
        carries all the weight, or if every sample has weight zero.
        """
        return float(_jackknife(torch.log1p(-self.normalized)[:, None]))

    @property
    def log_z_interval(self) -> tuple[float, float]:
        """95 % confidence interval for log Z, in nats; the interval allows for skewed weights.

        The interval does not account for regions that the samples miss. Such a region may be a
        mode, or a tail that is much heavier than the model's tail. The interval is (NaN, NaN) if
        one sample carries all the weight, or if every sample has weight zero.
        """
        below = NORMAL * self.log_z_error
        if math.isnan(below):
            return math.nan, math.nan
        w = torch.cat([self.normalized, self.normalized.max()[None]])
        mean, error = float(w.mean()), float(w.std()) / len(w) ** 0.5
        third = float((w - mean).pow(3).mean())
        gamma = third / (error**3 * len(w) ** 2) if error > 0 else 0.0
        u = NORMAL + gamma / 6
        c = math.cbrt(1 - gamma * u)
        upper = mean + error * 3 * u / (1 + c + c**2)
        above = math.log(upper * len(self.normalized))
        return self.log_z - below, self.log_z + above

    @property
    def log_z_bias(self) -> float:
        """Estimated bias of `log_z` due to the solver, in nats.

        The estimate is the weighted mean of `solver_error`.
        """
        return float(self.normalized @ self.solver_error.double())

    @property
    def effective_sample_size(self) -> float:
        """Effective sample size (Σ w)²/Σ w², which is at most the number of samples.

        Do not use this number to choose between runs. A run that misses regions of large weight
        can have a larger effective sample size than a run that covers them.
        """
        return self._effective_size(self.normalized.square())

    @property
    def probe_variance(self) -> float:
        """Weighted mean of `variance`; if it is above 1, the weights carry little information."""
        return float(self.normalized @ self.variance.double())

    @property
    def effective_sample_size_without_probes(self) -> float | None:
        """Estimate of the effective sample size that weights without probe noise would have.

        If the weighted mean of `variance` is above 0.25, this effective sample size cannot be
        estimated, and the value is None.
        """
        if self.probe_variance > SMALL:
            return None
        return self._effective_size(self.normalized.square() * torch.exp(-self.variance.double()))

    def _effective_size(self, squares: Tensor) -> float:
        return min(1 / float(squares.sum()), float(len(squares)))

    @property
    def largest_share(self) -> float:
        """The largest weight, as a fraction of the sum of all weights."""
        return float(self.normalized.max())

    def expectation(self, function: Callable[[Tensor], Tensor]) -> Expectation:
        """Estimate E_π[function(x)] for a function that maps x (B, *) to values (B,) or (B, *).

        Returns:
            A named tuple of `value` and `error`, each with the shape of the function's value for
            one sample.

        Raises:
            ValueError: if the function does not return one value or tensor for each sample.

        Example:
            >>> x = torch.tensor([[0.0], [1.0]])
            >>> zero = torch.zeros(2)
            >>> weights = Weights(x, torch.tensor([1.0, 3.0]).log(), zero, zero, lambda x: zero)
            >>> weights.expectation(lambda x: x).value
            tensor([0.7500], dtype=torch.float64)
        """
        values = function(self.x)
        if values.shape[:1] != (len(self.x),):
            expected = f"a tensor with one or more values for each of the {len(self.x)} samples"
            raise ValueError(error_message("function(x)", expected, values))
        values, w = values.detach().double(), self.normalized
        flat = values.reshape(len(w), -1)
        # A sample with weight zero may have the value NaN.
        flat = torch.where(self.log_weights.isneginf()[:, None], 0.0, flat)
        mean = w @ flat
        left_out = (mean - w[:, None] * flat) / (1 - w[:, None])
        shape = values.shape[1:]
        return Expectation(mean.reshape(shape), _jackknife(left_out).reshape(shape))

    def resample(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw `count` samples by weight, with replacement; return them and their indices in x."""
        rows = torch.multinomial(self.normalized, count, replacement=True, generator=generator)
        return self.x[rows], rows

    def sandwich(self, x: Tensor, result: NLLResult) -> Sandwich:
        """Return bounds on log Z, computed from these samples and points x drawn from the target.

        `result` is the result of `ode_nll` for x. The lower bound is −inf if any sample has weight
        zero. The upper bound is inf if the path of any point of x failed, −inf if the target is
        zero at any other point, and NaN in both cases together.

        Returns:
            A named tuple of `lower`, `lower_error`, `upper` and `upper_error`, in nats.
        """
        log_target = _log_target(self.log_target, x, result.failed)
        above = log_target + result.nll.detach().double()
        above = torch.where(result.failed, torch.inf, above)
        lower, upper = self.log_weights, above
        return Sandwich(
            lower=float(lower.mean()),
            lower_error=float(lower.std() / len(lower) ** 0.5),
            upper=float(upper.mean()),
            upper_error=float(upper.std() / len(upper) ** 0.5),
        )

    def __str__(self) -> str:
        """Return one line of text with log Z, the effective sample size, warnings and advice."""
        count = len(self.x)
        lower, upper = self.log_z_interval
        interval = f"nats (95 %: {lower:.4f} to {upper:.4f})"
        if math.isnan(lower):
            interval = "nats, its error unknown as one sample has all the weight"
        outside = float(self.log_weights.isneginf().double().mean()) - self.failed_share
        shown = [
            f"log Z = {self.log_z:.4f} {interval}, solver error about {self.log_z_bias:.2g}",
            f"effective sample size {self.effective_sample_size:.1f} of {count}",
            f"largest share {self.largest_share:.3g}",
        ]
        without = self.effective_sample_size_without_probes
        if self.probe_variance > 0 and without is not None:
            shown[1] += f", {without:.1f} without the noise of the probes"
        if bool(self.log_weights.isneginf().all()):
            advice = "look at x and log_target"
            shown = [f"log Z = -inf, as none of {count} samples lies inside the target: {advice}"]
        if self.failed_share:
            shown.append(f"{self.failed_share:.2%} failed, with weight zero")
        if outside > 0:
            shown.append(f"{outside:.2%} outside the target, with weight zero")
        if self.effective_sample_size < count / 4:
            reason = "fewer than a quarter of the samples are effective"
            shown.append(f"{reason}: compare several runs, and their bounds by sandwich(...)")
        shown.append("a mode that the samples miss shows only in sandwich(...)")
        return "; ".join(shown)

    __repr__ = __str__


def importance_weights(result: SampleResult, log_target: LogTarget) -> Weights:
    """Return the importance weights of samples from `ode_sample` for a target density.

    Args:
        result: the samples with their densities, drawn with divergence="exact" or with enough
            probes to estimate a standard error.
        log_target: log π, up to a constant, as a callable x (B, *) → (B,). `log_target` is
            evaluated at the samples as they are, including their noise at t_min. A sample at which
            log π is −inf, for example outside the support of a prior, has weight zero. At other
            samples that did not fail, log π has to be finite.

    Returns:
        The weights. A failed sample has weight zero, but is included in the number of samples.

    Raises:
        TypeError: if `result` is not a `SampleResult`.
        ValueError: if the samples have no density or no standard error, or if log π has an invalid
            shape or is NaN or +inf.

    Example:
        >>> from hosm_losses import VESchedule, ScoreModel, ode_sample, FixedGrid
        >>> schedule = VESchedule(sigma_max=200.0)
        >>> def standard_normal(x, t):
        ...     return schedule.sigma(t)[:, None] * x / (1 + schedule.sigma(t)[:, None] ** 2)
        >>> model = ScoreModel(standard_normal, schedule)
        >>> latent = 200 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> drawn = ode_sample(model, latent, divergence="exact", solver=FixedGrid(data_std=1.0))
        >>> weights = importance_weights(drawn, lambda x: -x.square().sum(1) / 2)
        >>> print(f"{weights.log_z:.2f}, exactly {math.log(2 * math.pi):.2f}")
        1.84, exactly 1.84
    """
    if not isinstance(result, SampleResult):
        remedy = "Pass result = ode_sample(model, ...), which has samples and their densities."
        raise TypeError(error_message("result", "the result of ode_sample", result, remedy))
    nll = result._density().detach().double()
    if result.standard_error is None:
        raise ValueError(
            "result: expected a standard error, which is needed to correct the weights; got None, "
            "which means that there were too few probes. Use divergence='exact', or more probes."
        )
    variance = (result.standard_error.detach().double() / result.widening).square()
    log_weights = _log_target(log_target, result.x, result.failed) + nll - variance / 2
    log_weights = torch.where(result.failed, -torch.inf, log_weights)
    variance = torch.where(result.failed, 0.0, variance)
    solver_error = torch.where(result.failed, 0.0, result._errors().detach())
    failed = float(result.failed.double().mean())
    weights = Weights(result.x.detach(), log_weights, variance, solver_error, log_target, failed)
    if weights.probe_variance > LARGE:
        warn(
            f"The variance of the log-weights due to the probes, {weights.probe_variance:.2g} "
            f"nats², is above {LARGE:g}: the weights say more about the probes than about the "
            "model. Use more probes, or divergence='exact'."
        )
    return weights


def _log_target(log_target: LogTarget, x: Tensor, failed: Tensor) -> Tensor:
    values = log_target(x.detach())
    dtype = values.dtype if isinstance(values, Tensor) else x.dtype
    values = check_like("log_target(x)", values, (len(x),), dtype, x.device, "x")
    values = values.detach().double()
    bad = (~failed & ~(values < math.inf)).nonzero().flatten().tolist()
    if bad:
        expected = "finite values, or -inf outside the target, for all samples that did not fail"
        got = f"{float(values[bad[0]])} at x[{bad[0]}], and NaN or +inf at {len(bad)} of {len(x)}"
        remedy = "Look at x there, and return -inf where the target is zero."
        raise ValueError(error_message("log_target(x)", expected, values, remedy, got=got))
    return values


def _jackknife(left_out: Tensor) -> Tensor:
    """Return standard errors (k,) of k estimates; row i of `left_out` (B, k) omits sample i."""
    count = len(left_out)
    return left_out.std(0, correction=0) * (count - 1) ** 0.5
