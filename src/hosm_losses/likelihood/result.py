r"""What a likelihood is reported as.

Formula:
    bits/dim = nll/(d ln 2) + log2(levels/(high − low))
    for data of `levels` levels, dequantized as x = low + (high − low)(k + u)/levels with u uniform
    on [0, 1): its density per element is levels/(high − low) times that of k + u.

    A sample fails where its number says nothing: one that is not finite in the network's own range
    (float32's at least), a path that did not arrive, or a solver error above 1000 nats and above
    0.1 nats an element, 0.14 bits per dimension. There the estimate, which is of first order, has
    lost its meaning as well; what is tolerable below is for the caller to say.

    Over a data set of n samples the mean has standard error std(nll)/√n. The part of it that the
    random probes contribute is (Σ standard_error²)^½/n, and more probes reduce that part alone.

Source:
    Theis et al., "A note on the evaluation of generative models", arXiv 1511.01844.
"""

__all__ = ["NLLResult", "NLLSummary", "Quantization", "mark_failed"]

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import check_number, check_whole, describe

SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT = 1000.0, 0.1


class Quantization(NamedTuple):
    """Which integers the data came from: 0 … levels − 1, scaled from `low` to `high`."""

    levels: int
    low: float
    high: float


@dataclass(frozen=True)
class NLLSummary:
    """The likelihood of a data set, as numbers on the host.

    Attributes:
        samples: n, how many samples the numbers are of; those that failed are left out.
        failed: how many failed, or have NaN for their nll.
        nll: mean of nll, in nats.
        standard_error: of that mean as an estimate for the data's distribution, probes included;
            None for a single sample.
        estimator_error: the part of it that comes from the random probes; None where unknown.
        solver_error: mean of solver_error, in nats.
        bits_per_dim: mean of bits_per_dim.
        bits_standard_error: standard_error in bits per dimension.
        nfe: mean number of network evaluations.
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

    def __str__(self) -> str:
        def plus_minus(value: float | None, digits: int) -> str:
            return "" if value is None else f" ± {value:.{digits}f}"

        lines = [
            f"{self.bits_per_dim:.4f}{plus_minus(self.bits_standard_error, 4)} bits/dim, "
            f"{self.nll:.3f}{plus_minus(self.standard_error, 3)} nats over {self.samples} samples"
        ]
        if self.estimator_error is not None:
            lines.append(f"of which {self.estimator_error:.3f} nats from the probes")
        lines.append(
            f"solver error about {self.solver_error:.2g} nats, {self.nfe:.0f} evaluations"
        )
        if self.failed:
            lines.append(f"failed and left out: {self.failed}")
        return "; ".join(lines)


@dataclass(frozen=True)
class NLLResult:
    """The negative log-likelihood of a batch.

    Attributes:
        nll: −log p(x) in nats, (B,); an upper bound on it from `variational_nll` or dequantized
            data; NaN where it failed.
        latent: the image of x at t_max, in the coordinates of x, (B, *).
        nfe: network evaluations, one a value with its divergence, (B,).
        standard_error: of nll, from random draws, (B,); None where it is not known.
        solver_error: estimate of what the solver is off, in nats, (B,). On the fixed grid with
            random probes it covers the path alone, for the quadrature's part hides in the noise;
            with the adaptive method it is the sum of the integral's local errors alone.
        failed: where there is no number to use, (B,): it was not finite, the path did not arrive,
            or solver_error is above max(1000, 0.1 d) nats.
        quantization: what the data was before dequantization; None for continuous data.
    """

    nll: Tensor
    latent: Tensor
    nfe: Tensor
    standard_error: Tensor | None
    solver_error: Tensor
    failed: Tensor
    quantization: Quantization | None = None

    def bits_per_dim(
        self, levels: int | None = None, low: float | None = None, high: float | None = None
    ) -> Tensor:
        """Bits per dimension: nll/(d ln 2), and for data of `levels` levels that of the integers.

        Args:
            levels: 256 for 8-bit images that were dequantized and scaled to [low, high]: it adds
                log2(levels/(high − low)). None for continuous data, or for what the
                `dequantization` of the call used.
            low: what level 0 was scaled to; −1 if None.
            high: what level `levels` was scaled to; 1 if None.

        Returns:
            Bits per dimension, (B,); NaN where the sample failed.

        Raises:
            ValueError: for levels below 1, an empty range, a range without levels, or what
                contradicts the `dequantization` of the call.

        Example:
            >>> import torch
            >>> one = torch.ones(1)
            >>> result = NLLResult(one * 0, torch.zeros(1, 3), one, None, one, one > 2)
            >>> result.bits_per_dim(levels=256)
            tensor([7.])
        """
        bits = self.nll / (self.latent[0].numel() * math.log(2))
        quantization = self._quantization(levels, low, high)
        if quantization is None:
            return bits
        levels, low, high = quantization
        return bits + math.log2(levels / (high - low))

    def _quantization(
        self, levels: int | None, low: float | None, high: float | None
    ) -> Quantization | None:
        """What is known of the data's levels from the call, or said here."""
        said = Quantization._fields, (levels, low, high)
        given = {name: value for name, value in zip(*said, strict=True) if value is not None}
        told = ", ".join(f"{name}={value!r}" for name, value in given.items())
        if self.quantization is not None:
            known = self.quantization._asdict()
            if any(value != known[name] for name, value in given.items()):
                raise ValueError(
                    "bits_per_dim: expected no levels or those of the call's dequantization, "
                    f"{self.quantization}; got {told}. Leave them out: the result knows them."
                )
            return self.quantization
        if levels is None:
            if given:
                raise ValueError(
                    "bits_per_dim: expected levels with a range, as in bits_per_dim(levels=256, "
                    f"low=0, high=1); got {told} alone. Without levels the data is continuous, "
                    "and its bits depend on no range."
                )
            return None
        found = Quantization(
            check_whole("levels", levels, 1),
            -1.0 if low is None else check_number("low", low, "a number"),
            1.0 if high is None else check_number("high", high, "a number"),
        )
        if found.low >= found.high:
            raise ValueError(f"bits_per_dim: expected low < high; got {found.low}, {found.high}.")
        return found

    def summary(
        self, levels: int | None = None, low: float | None = None, high: float | None = None
    ) -> NLLSummary:
        """Means over the samples that did not fail, with the standard error of the mean.

        A sample whose nll is NaN has failed, whatever `failed` says.

        Args:
            levels: as in `bits_per_dim`.
            low: as in `bits_per_dim`.
            high: as in `bits_per_dim`.

        Returns:
            The summary, which prints as a sentence.

        Raises:
            ValueError: if every sample failed, or as in `bits_per_dim`.

        Example:
            >>> import torch
            >>> nll, none = torch.tensor([1.0, 3.0]), torch.zeros(2)
            >>> result = NLLResult(nll, torch.zeros(2, 4), none + 74, none + 0.2, none, none > 0)
            >>> summary = result.summary()
            >>> summary.nll, summary.standard_error, round(summary.estimator_error, 3)
            (2.0, 1.0, 0.141)
        """
        bits = self.bits_per_dim(levels, low, high).detach()
        good = ~(self.failed | torch.isnan(self.nll.detach()))
        count = int(good.sum())
        if not count:
            raise ValueError(
                f"summary: expected a sample that did not fail; got none of {len(good)}. Look at "
                "the network's outputs for NaN, at solver_error, or take more steps."
            )
        nll = self.nll.detach()[good].double()
        error = None if count == 1 else float(nll.std()) / count**0.5
        estimator = None
        if self.standard_error is not None:
            estimator = float(self.standard_error[good].double().square().sum().sqrt()) / count
        elements = self.latent[0].numel()
        return NLLSummary(
            samples=count,
            failed=len(good) - count,
            nll=float(nll.mean()),
            standard_error=error,
            estimator_error=estimator,
            solver_error=float(self.solver_error.detach()[good].double().mean()),
            bits_per_dim=float(bits[good].mean()),
            bits_standard_error=None if error is None else error / (elements * math.log(2)),
            nfe=float(self.nfe[good].double().mean()),
        )

    @classmethod
    def cat(cls, results: Sequence["NLLResult"]) -> "NLLResult":
        """Join the results of batches, or of the ranks of a distributed job, in order.

        Args:
            results: results of one model with the same options, at least one. All are brought to
                the device of the first.

        Returns:
            The result of all samples.

        Raises:
            TypeError: if something else is among them.
            ValueError: for no result at all, samples of different shapes, or results of which some
                have a standard error or a quantization that others lack.

        Example:
            >>> import torch
            >>> zero = torch.zeros(2)
            >>> one = NLLResult(zero, torch.zeros(2, 3), zero, None, zero, zero > 0)
            >>> NLLResult.cat([one, one]).nll.shape
            torch.Size([4])
        """
        results = list(results)
        for result in results:
            if not isinstance(result, NLLResult):
                raise TypeError(f"cat: expected NLLResults; got {describe(result)}.")
        if not results:
            raise ValueError("cat: expected at least one result; got none.")
        kinds = {
            (tuple(r.latent.shape[1:]), r.standard_error is None, r.quantization) for r in results
        }
        if len(kinds) > 1:
            told = "; ".join(
                f"samples {shape}, {'no' if bare else 'with'} standard error, {quantization}"
                for shape, bare, quantization in sorted(kinds, key=str)
            )
            raise ValueError(
                f"cat: expected results of the same options; got {told}. Call ode_nll with the "
                "same arguments for every batch."
            )
        first = results[0]

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(each, name).to(first.nll.device) for each in results])

        return cls(
            joined("nll"),
            joined("latent"),
            joined("nfe"),
            None if first.standard_error is None else joined("standard_error"),
            joined("solver_error"),
            joined("failed"),
            first.quantization,
        )


def mark_failed(result: NLLResult) -> NLLResult:
    """Mark the samples whose number says nothing, and put NaN in its place.

    Args:
        result: with what the solver itself saw fail, and latents in the network's dtype.

    Returns:
        The result, whose nll is NaN wherever it failed.

    Example:
        >>> nll, zero = torch.tensor([1.0, 1.0]), torch.zeros(2)
        >>> error = torch.tensor([9.0, 5000.0])
        >>> mark_failed(NLLResult(nll, torch.zeros(2, 3), zero, None, error, zero > 0)).nll
        tensor([1., nan])
    """
    latent = result.latent
    limit = max(SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT * latent[0].numel())
    in_range = result.nll.detach().to(torch.promote_types(latent.dtype, torch.float32))
    good = torch.isfinite(in_range) & (result.solver_error.detach() <= limit)
    failed = result.failed | ~good
    return replace(result, nll=result.nll.masked_fill(failed, math.nan), failed=failed)
