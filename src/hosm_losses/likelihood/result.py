r"""The results of likelihood computations: `NLLResult`, `SampleResult` and `NLLSummary`.

Formula:
    bits/dim = nll/(d ln 2) + log2(levels/(high − low))
    for data with `levels` levels, dequantized as x = low + (high − low)(k + u)/levels with u
    uniform on [0, 1). Per element, the density of x is levels/(high − low) times the density of
    k + u.

    The standard error of the mean over n samples is std(nll)/√n. The part that comes from the
    random probes is (Σ s²)^½/n with s = standard_error/widening. The square s² is an unbiased
    estimate of the variance of one sample's nll due to the probes. The Student-t factor `widening`
    applies to a single sample with few probes, not to a mean over many samples.

Source:
    Theis et al., "A note on the evaluation of generative models", arXiv 1511.01844.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from hosm_losses._checks import error_message, owns_values

# A sample fails if its solver_error exceeds both limits, in nats and in nats per element.
SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT = 1000.0, 0.1
SHOWN = 0.01  # prior errors below this limit, in nats, are not printed


class Cause(IntEnum):
    """The cause of a sample's failure.

    In a result's `cause`, 0 means that the sample did not fail or that no cause was recorded.
    """

    START, OUTPUT, DIVERGENCE, ROUNDING, ARRIVAL, RANGE, PRIOR, SOLVER = range(1, 9)


REASONS = {
    0: "the result does not say why: look at x, log_prior and the network from t_min to t_max",
    Cause.START: "its path starts at values that are not finite: check x or the latent",
    Cause.OUTPUT: "the network's output is not finite on its path, or a point is beyond {dtype}: "
    "look at the outputs from t_min to t_max, and take smaller steps if they are finite. With "
    "enable_grad=True, the divergence alone may be the cause",
    Cause.DIVERGENCE: "the divergence is not finite on its path, but the network's outputs are: "
    "look for an infinite derivative, such as the derivative of sqrt at 0",
    Cause.ROUNDING: "rounding its path alone changes the nll by more than {limit:g} nats: look at "
    "x, which may be far from the data",
    Cause.ARRIVAL: "Adaptive ran out of evaluations (see nfe) or reached its smallest step: "
    "use a larger step_tolerance, as rounding in {dtype} limits it, or FixedGrid(), or look for "
    "jumps",
    Cause.RANGE: "its nll or the end of its path is beyond {dtype}: look at x, and at the size of "
    "the network's outputs",
    Cause.PRIOR: "log_prior is not finite, although its latent is: look at log_prior there",
    Cause.SOLVER: "its solver_error of {error:.2g} nats is not within {limit:g}: look at x or the "
    "latent, which may be too large; otherwise, use more steps or a lower tolerance, or set "
    "data_mean and data_std of the solver",
}


@dataclass(frozen=True)
class NLLSummary:
    """Summary statistics of the likelihoods of a data set; `print` shows the main ones.

    Attributes:
        samples: the number of samples included in the means.
        failed: the number of samples excluded because they failed or because their nll is NaN.
        nll: the mean nll in nats.
        standard_error: the standard error of `nll` as an estimate of the mean over the data
            distribution; None for a single sample. It includes the error due to the probes.
        estimator_error: the part of `standard_error` that comes from the random probes or, for
            the SDE's bound, from the random draws; None if unknown.
        solver_error: the mean solver error in nats.
        bits_per_dim: the mean nll in bits per dimension.
        bits_standard_error: `standard_error` in bits per dimension.
        nfe: the mean number of network evaluations per sample.
        discrete: whether the data are integers; if so, `print` also shows bits per dimension.
        products: the mean number of Jacobian products per sample; None for a bound or if unknown.
        kinks: the number of paths that seem to have kinks; None if unknown.
        prior_error: the mean prior error in nats; None if unknown.
        prior_size: the mean absolute prior error in nats; None if unknown.
    """

    samples: int
    failed: int
    nll: float
    standard_error: float | None
    estimator_error: float | None
    solver_error: float
    bits_per_dim: float
    bits_standard_error: float | None
    nfe: float
    discrete: bool = False
    products: float | None = None
    kinks: int | None = None
    prior_error: float | None = None
    prior_size: float | None = None

    def __str__(self) -> str:
        bits, nats = f"{self.bits_per_dim:.4f} bits/dim", f"{self.nll:.3f} nats"
        if self.standard_error is not None:
            bits += f" ± {self.bits_standard_error:.4f}"
            nats += f" ± {self.standard_error:.3f}"
        if self.estimator_error is not None:
            source = "draws" if self.products is None else "probes"
            nats += f" ({source} {self.estimator_error:.3f})"
        small = 0 < self.solver_error < 0.01
        error = f"{self.solver_error:.0e}" if small else f"{self.solver_error:.2g}"
        error = error.replace("e-0", "e-") + " nats" * self.discrete
        numbers = f"{bits}, {nats}" if self.discrete else nats
        shown = f"NLL {numbers}, n = {self.samples}; solver error {error}"
        warnings = [f"{self.failed} failed and left out"] if self.failed else []
        if self.kinks:
            warnings.append(f"kinks suspected on {self.kinks} path{'s' * (self.kinks > 1)}")
        if self.prior_size is not None and self.prior_size >= SHOWN:
            warnings.append(
                f"the prior is off by {self.prior_size:.3f} nats per sample, by "
                f"{self.prior_error:+.3f} in the mean log-likelihood: set log_prior to the "
                "Gaussian of data_mean and data_std at t_max"
            )
        return f"{shown}; {self.nfe:.0f} evaluations\n{'; '.join(warnings)}".rstrip()


class Quantization(NamedTuple):
    """The number of levels of quantized data, and the range of values that their cells cover."""

    levels: int
    low: float
    high: float


def solver_limit(elements: int) -> float:
    """Return the solver_error, in nats, above which a sample with this many elements fails."""
    return max(SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT * elements)


@dataclass(frozen=True, repr=False)
class Result:
    """Base class of `NLLResult` and `SampleResult`, whose docstrings describe the attributes."""

    nll: Tensor | None
    latent: Tensor
    nfe: Tensor
    standard_error: Tensor | None
    solver_error: Tensor | None
    failed: Tensor
    products: Tensor | None = None
    quantization: Quantization | None = None
    steps: Tensor | None = None
    widening: float = 1.0
    kinks: Tensor | None = None
    cause: Tensor | None = None
    prior_error: Tensor | None = None

    @property
    def _d(self) -> int:
        return self.latent[0].numel()

    def bits_per_dim(
        self, levels: int | None = None, low: float | None = None, high: float | None = None
    ) -> Tensor:
        """Return the bits per dimension (B,) of continuous data or of quantized integers.

        The value for a failed sample is NaN.

        Args:
            levels: the number of levels, such as 256 for 8-bit images that you dequantized and
                scaled to [low, high] yourself. If None, the call's `dequantization` determines the
                number; without `dequantization`, the data are treated as continuous.
            low: the value of level 0 after scaling; −1 if None.
            high: the value that an additional level above the last would have after scaling; 1 if
                None.

        Raises:
            ValueError: if the range is empty or is given without `levels`, if an argument
                contradicts the call's `dequantization`, or if no densities were computed.

        Example:
            >>> one = torch.ones(1)
            >>> result = NLLResult(one * 0, torch.zeros(1, 3), one, None, one, one > 2)
            >>> result.bits_per_dim(levels=256)
            tensor([7.])
        """
        bits = self._density() / (self._d * math.log(2))
        known = self._quantization({"levels": levels, "low": low, "high": high})
        return bits if known is None else bits + math.log2(known.levels / (known.high - known.low))

    def __getitem__(self, index: slice | Tensor) -> Self:
        """Return the result for selected samples, for example `result[:200]` or `result[mask]`.

        Args:
            index: a slice, a mask (B,), or a tensor of row indices.

        Raises:
            TypeError: if the index is neither a slice nor a tensor.
            ValueError: if no sample is selected.

        Example:
            >>> nll, none = torch.tensor([1.0, 3.0, 8.0]), torch.zeros(3)
            >>> result = NLLResult(nll, torch.zeros(3, 4), none + 66, None, none, none > 0)
            >>> result[:2].summary().nll, result[nll > 2].nll
            (2.0, tensor([3., 8.]))
        """
        if not isinstance(index, slice | Tensor):
            expected = "a slice, a mask or an index tensor (n,)"
            raise TypeError(error_message("index", expected, index, "Take [i : i + 1] for one."))
        chosen: dict[str, Any] = {
            name: value[index] if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        if not len(chosen["nfe"]):
            raise ValueError(error_message("index", "one that leaves a sample", index))
        return type(self)(**chosen)

    def _density(self) -> Tensor:
        if self.nll is None:
            raise ValueError(
                "nll: expected samples with their density; got samples drawn with "
                "divergence=None. Call ode_sample with divergence='exact' or Hutchinson()."
            )
        return self.nll

    def _errors(self) -> Tensor:
        """Return the solver errors, or NaN for every sample if no solver errors are known."""
        if self.solver_error is None:
            return torch.full_like(self.nfe, math.nan, dtype=torch.float32)
        return self.solver_error

    def _quantization(self, options: dict[str, Any]) -> Quantization | None:
        """Return the quantization from the call or `options`; None for continuous data."""
        options = {name: value for name, value in options.items() if value is not None}
        known = self.quantization
        if known is None and "levels" in options:
            low, high = options.get("low", -1.0), options.get("high", 1.0)
            if not low < high:
                raise ValueError(error_message("bits_per_dim: high", f"more than {low}", high))
            return Quantization(options["levels"], low, high)
        if not options.items() <= (known._asdict() if known else {}).items():
            expected = known or "levels together with a range, as continuous data has none"
            raise ValueError(f"bits_per_dim: expected {expected}; got {options}.")
        return known

    def summary(
        self, levels: int | None = None, low: float | None = None, high: float | None = None
    ) -> NLLSummary:
        """Return means over the samples that did not fail, and the standard error of the mean nll.

        The arguments are the same as in `bits_per_dim`. A sample whose nll is NaN counts as
        failed, whatever the value of `failed`.

        Raises:
            ValueError: if every sample failed, or for the same reasons as in `bits_per_dim`.

        Example:
            >>> nll, none = torch.tensor([1.0, 3.0]), torch.zeros(2)
            >>> result = NLLResult(nll, torch.zeros(2, 4), none + 66, none + 0.2, none, none > 0)
            >>> summary = result.summary()
            >>> summary.nll, summary.standard_error, round(summary.estimator_error, 3)
            (2.0, 1.0, 0.141)
        """
        bits, nll = self.bits_per_dim(levels, low, high), self._density()
        good = ~(self.failed | torch.isnan(nll))
        count = int(good.sum())
        if not count:
            raise ValueError(
                f"summary: expected a sample that did not fail; got none of {len(good)}. The "
                f"first one: {self.failures().get(0, 'its nll is NaN')}."
            )

        def mean(numbers: Tensor) -> float:
            return float(numbers.detach()[good].double().mean())

        error = float(nll.detach()[good].double().std()) / count**0.5 if count > 1 else None
        bit, part = self._d * math.log(2), None
        if self.standard_error is not None:
            part = (mean((self.standard_error / self.widening).square()) / count) ** 0.5
            part = part if error is None else min(part, error)  # both are estimates
        return NLLSummary(
            samples=count,
            failed=len(good) - count,
            nll=mean(nll),
            standard_error=error,
            estimator_error=part,
            solver_error=mean(self._errors()),
            bits_per_dim=mean(bits),
            bits_standard_error=None if error is None else error / bit,
            nfe=mean(self.nfe),
            discrete=levels is not None or self.quantization is not None,
            products=None if self.products is None else mean(self.products),
            kinks=None if self.kinks is None else int((self.kinks & good).sum()),
            prior_error=None if self.prior_error is None else mean(self.prior_error),
            prior_size=None if self.prior_error is None else mean(self.prior_error.abs()),
        )

    def __repr__(self) -> str:
        """Return the summary, or a shorter text if no summary can be computed."""
        count = f"{len(self.failed)} samples"
        if self.failed.is_meta or not owns_values(self.failed):
            return f"{type(self).__name__} of {count}, not on hand"
        if bool(self.failed.all()):
            return f"{count}, all failed; the first one: {self.failures()[0]}"
        if self.nll is None:
            failed, nfe = int(self.failed.sum()), float(self.nfe.double().mean())
            return f"{count} without density; {nfe:.0f} evaluations; {failed} failed"
        return str(self.summary())

    def failures(self) -> dict[int, str]:
        """Return the reason and a remedy for each failed sample, in a dict keyed by row.

        Example:
            >>> one, cause = torch.ones(1), torch.tensor([7])
            >>> result = NLLResult(one, torch.zeros(1, 3), one, None, one, one > 0, cause=cause)
            >>> print(result.failures()[0])
            log_prior is not finite, although its latent is: look at log_prior there
        """
        limit, dtype = solver_limit(self._d), self.latent.dtype
        errors, texts = self._errors(), {}
        for row in self.failed.nonzero().flatten().tolist():
            reason = REASONS[0 if self.cause is None else int(self.cause[row])]
            texts[row] = reason.format(dtype=dtype, limit=limit, error=float(errors[row]))
        return texts

    @classmethod
    def cat(cls, results: Sequence[Self]) -> Self:
        """Concatenate the results of batches or ranks, on the first result's device.

        Raises:
            ValueError: if the list is empty, if the shapes of samples differ between results, if
                an attribute is None in some of the results but not in others, or if the values of
                `widening` or `quantization` differ. A bound cannot be concatenated with ODE
                likelihoods.

        Example:
            >>> zero = torch.zeros(2)
            >>> one = NLLResult(zero, torch.zeros(2, 3), zero, None, zero, zero > 0)
            >>> NLLResult.cat([one, one]).nll.shape
            torch.Size([4])
        """
        every: list[Any] = list(results)
        kinds = {result._kind() for result in every}
        if len(kinds) != 1:
            raise ValueError(
                "cat: expected results of one or more calls with the same arguments; got "
                f"{'; '.join(sorted(kinds)) or 'none'}."
            )
        joined: dict[str, Any] = dict(vars(every[0]))
        device = every[0].latent.device
        for name, first in joined.items():
            if isinstance(first, Tensor):
                joined[name] = torch.cat([getattr(result, name).to(device) for result in every])
        return cls(**joined)

    def _kind(self) -> str:
        """Describe the properties in which all concatenated results must agree."""
        lacking = [name for name, value in vars(self).items() if value is None]
        shape = tuple(self.latent.shape[1:])
        known = f"widening {self.widening:.4g}, {self.quantization}, d = {self._d}"
        return f"samples {shape} without {', '.join(lacking) or 'nothing'}, {known}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict of detached tensors and plain Python values.

        `torch.save` can write this dict, and `torch.load` can read it with `weights_only=True`.
        `from_dict` restores the result.

        Example:
            >>> import io
            >>> zero, file = torch.zeros(2), io.BytesIO()
            >>> result = NLLResult(zero, torch.zeros(2, 3), zero, None, zero, zero > 0)
            >>> torch.save(result.to_dict(), file)
            >>> position = file.seek(0)
            >>> again = NLLResult.from_dict(torch.load(file, weights_only=True))
            >>> again.nll, again.standard_error
            (tensor([0., 0.]), None)
        """
        known = self.quantization and self.quantization._asdict()
        plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return plain | {"quantization": known}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore a result, bit for bit, from the values that its `to_dict` returned."""
        known = values["quantization"]
        return cls(**{**values, "quantization": Quantization(**known) if known else None})


@dataclass(frozen=True, repr=False)
class NLLResult(Result):
    """The negative log-likelihoods of a batch; `print` shows their summary.

    Attributes:
        nll: −log p(x) in nats, (B,); for `variational_nll`, an unbiased estimate of an upper bound
            on −log p(x). Dequantization makes the result for integer data random. The mean of
            `bits_per_dim` over this randomness is an upper bound on the bits per dimension of the
            integers.
        latent: the end of x's path, at t_max, in the coordinates of x, (B, *).
        nfe: the number of network evaluations, (B,). An evaluation that also computes the
            divergence is counted once.
        standard_error: the standard error of nll due to the random probes or, for the SDE's bound,
            due to the random draws, (B,); None if unknown. The standard error does not account for
            the randomness of dequantization or of the noise added with clean=True.
        solver_error: an estimate of the solver's error in nats, (B,). The estimate is not a bound.
            On a grid of 64 steps with a companion, twice the estimate is meant to exceed the true
            error for 95 % of samples.
        failed: whether the sample is unusable, (B,). A sample is unusable if its path contains a
            non-finite value, if its density is not finite, if the path did not reach its end, or
            if solver_error is above max(1000, 0.1 d) nats. The nll of a failed sample is NaN, and
            `failures` returns the reason.
        products: the number of vector-Jacobian products, (B,); None for a bound. nfe does not
            include these products.
        quantization: the number of levels and the range of dequantized data; None for continuous
            data.
        steps: the number of steps of the fixed grid, (B,); None with `Adaptive` or for a bound.
        widening: the factor from Student's t distribution by which `Adaptive` multiplies
            standard_error; 1 if standard_error is not multiplied.
        kinks: whether the path seems to have kinks, (B,); None if unknown. Paths of ReLU networks
            have kinks. Only `Adaptive` looks for kinks. Kinks lower the solver's order of accuracy
            and make the error estimate unreliable. `Adaptive` therefore triples the solver_error
            of a path that seems to have kinks.
        cause: a code for the reason why each sample failed, (B,); 0 if it did not fail. `failures`
            names the reasons.
        prior_error: log N(z; α m, α² s² + σ²) − log N(z; 0, prior_std²), (B,), where z is the
            latent, and m and s are the solver's data_mean and data_std. If you add `prior_error`
            to log p(x), you replace the prior with N(α m, α² s² + σ²). If the data follow N(m,
            s²), the new prior is the exact distribution of the diffused data. `prior_error` is
            None if the result is a bound, if `log_prior` is set, or if data_mean or data_std is
            not set.
    """

    nll: Tensor
    solver_error: Tensor


@dataclass(frozen=True, repr=False)
class SampleResult(Result):
    """Samples with their densities; `print` shows a summary.

    Attributes:
        x: the samples at t_min, (B, *).
        latent: the latents at t_max from which the samples were computed, (B, *).
        nll: −log p(x) in nats, (B,); None if no divergence was computed.
        nfe: the number of network evaluations, (B,).
        standard_error: the standard error of nll due to the random probes, (B,); None if unknown.
        solver_error: an estimate of the solver's error in −log p(x), in nats, (B,); None if nll is
            None. With a companion, the ODE is also solved from x back to a second latent. The
            estimate is then based on the difference between the two values of log p(x) or, if the
            probes are random, between the prior log-densities of the two latents. Without a
            companion, the estimate uses the model's score instead of the gradient of log p near
            the data, and is often far larger than the true error.
        failed: as in `NLLResult`.
        products: as in `NLLResult`.
        quantization: always None.
        steps: as in `NLLResult`.
        widening: as in `NLLResult`.
        kinks: as in `NLLResult`.
        cause: as in `NLLResult`.
        prior_error: always None; only `ode_nll` computes the prior error.
    """

    x: Tensor = field(kw_only=True)


class ODESolution(NamedTuple):
    """What `Solver.integrate` returns: the ends of B paths, the integrals and their errors.

    Attributes:
        z: the states at the other end of the span, (B, *).
        integral: the integral of the second value of `Paths.rates` from the start of the span to
            its end, (B,).
        nfe: the number of network evaluations, as one number or for each sample, (B,).
        products: the number of products with the network's Jacobian, (B,); None if each evaluation
            estimated the divergence once.
        standard_error: the error of `integral` due to random probes, (B,); None if unknown.
        solver_error: an estimate of the error of the log-density, in nats, (B,); None if unknown.
        cause: why the solver gave up on a path, as a `Cause`, (B,); None if it never does.
        steps: the number of steps of a grid, (B,); None without a grid.
        widening: as in `NLLResult`.
        kinks: as in `NLLResult`.
    """

    z: Tensor
    integral: Tensor
    nfe: Tensor | int
    products: Tensor | None = None
    standard_error: Tensor | None = None
    solver_error: Tensor | None = None
    cause: Tensor | None = None
    steps: Tensor | None = None
    widening: float = 1.0
    kinks: Tensor | None = None


def all_finite(samples: Tensor) -> Tensor:
    """Return a mask (B,) of the samples (B, *) whose elements are all finite."""
    return torch.isfinite(samples).reshape(len(samples), -1).all(1)


def mark_failed(result: NLLResult, *conditions: tuple[Cause, Tensor]) -> NLLResult:
    """Mark unusable samples as failed, set their nll to NaN, and record the cause.

    The latent has to be finite in its own dtype, which is the network's dtype. The nll has to be
    finite in this dtype or in float32, whichever has the larger range. A cause that is already
    recorded in the result is kept. Otherwise, the cause recorded for a sample is that of the first
    condition (B,) that is true for it.
    """
    dtype, limit = result.latent.dtype, solver_limit(result._d)
    in_range = result.nll.detach().to(torch.promote_types(dtype, torch.float32))
    inaccurate = ~(result.solver_error.detach() <= limit)
    failed = result.failed | inaccurate | ~(torch.isfinite(in_range) & all_finite(result.latent))
    own = result.cause
    cause = torch.zeros_like(failed, dtype=torch.uint8) if own is None else own
    for value, holds in (*conditions, (Cause.SOLVER, inaccurate), (Cause.RANGE, failed)):
        cause = cause.masked_fill(failed & holds & (cause == 0), value)
    nll = result.nll.masked_fill(failed, math.nan)
    return replace(result, nll=nll, failed=failed, cause=cause)
