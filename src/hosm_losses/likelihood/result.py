r"""What a likelihood is reported as.

Formula:
    bits/dim = nll/(d ln 2) + log2(levels/(high − low))
    for data of `levels` levels, dequantized as x = low + (high − low)(k + u)/levels with u uniform
    on [0, 1): its density per element is levels/(high − low) times that of k + u.

    The mean over n samples has standard error std(nll)/√n; (Σ s²)^½/n of it comes from the random
    probes, with s = standard_error/widening, whose square is an unbiased variance. Student's
    factor is for one sample of few probes, and has no place in a mean of many.

Source:
    Theis et al., "A note on the evaluation of generative models", arXiv 1511.01844.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import check_number, check_whole, describe
from hosm_losses.likelihood.summary import NLLSummary

# A sample fails with a solver_error above the larger of these, in nats and in nats an element.
SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT = 1000.0, 0.1


class Quantization(NamedTuple):
    """Which integers the data came from: 0 … levels − 1, scaled from `low` to `high`."""

    levels: int
    low: float
    high: float


@dataclass(frozen=True)
class NLLResult:
    """The negative log-likelihood of a batch.

    Attributes:
        nll: −log p(x) in nats, (B,), or an upper bound on it: variational, or of integers.
        latent: the end of x's path, at t_max, in the coordinates of x, (B, *).
        nfe: network evaluations, (B,); a value with its divergence counts as one.
        standard_error: of nll, from the random probes, or from the draws of the bound of the SDE,
            (B,); None where it is not known. The draws of dequantization and of clean=True are
            not in it.
        solver_error: estimate of what the solver is off, in nats, (B,). It is no bound; twice that
            of a path with a companion is meant to cover 95 % of samples on a grid of 64 steps.
        failed: where there is no number to use, (B,): it was not finite, the path did not arrive,
            or solver_error is above max(1000, 0.1 d) nats; nll is NaN there. `failures` says why.
        quantization: what the data was before dequantization; None for continuous data.
        steps: of the fixed grid; None with the adaptive method, and of a bound.
        widening: Student's factor in standard_error, of the adaptive method; 1 elsewhere.
    """

    nll: Tensor
    latent: Tensor
    nfe: Tensor
    standard_error: Tensor | None
    solver_error: Tensor
    failed: Tensor
    quantization: Quantization | None = None
    steps: int | None = None
    widening: float = 1.0

    def bits_per_dim(
        self, levels: int | None = None, low: float | None = None, high: float | None = None
    ) -> Tensor:
        """Bits per dimension, (B,), of the integers where the data has levels; NaN if it failed.

        Args:
            levels: 256 for 8-bit images that were dequantized and scaled to [low, high]. None for
                continuous data, or for what the `dequantization` of the call used.
            low: what level 0 was scaled to; −1 if None.
            high: what level `levels` was scaled to; 1 if None.

        Raises:
            ValueError: for levels below 1, an empty range, a range without levels, or what
                contradicts the `dequantization` of the call.

        Example:
            >>> one = torch.ones(1)
            >>> result = NLLResult(one * 0, torch.zeros(1, 3), one, None, one, one > 2)
            >>> result.bits_per_dim(levels=256)
            tensor([7.])
        """
        bits = self.nll / (self.latent[0].numel() * math.log(2))
        quantization = self._quantization({"levels": levels, "low": low, "high": high})
        if quantization is None:
            return bits
        levels, low, high = quantization
        return bits + math.log2(levels / (high - low))

    def _quantization(self, options: dict[str, int | float | None]) -> Quantization | None:
        """The data's levels: those of the call, or those that the options say."""
        given = {name: value for name, value in options.items() if value is not None}
        told = ", ".join(f"{name}={value!r}" for name, value in given.items())
        known = {} if self.quantization is None else self.quantization._asdict()
        if given.items() <= known.items():
            return self.quantization
        if known:
            raise ValueError(
                "bits_per_dim: expected no levels or those of the call's dequantization, "
                f"{self.quantization}; got {told}. Leave them out: the result knows them."
            )
        if "levels" not in given:
            raise ValueError(
                "bits_per_dim: expected levels with a range, as in bits_per_dim(levels=256, "
                f"low=0, high=1); got {told} alone. Without levels the data is continuous, "
                "and its bits depend on no range."
            )
        found = Quantization(
            check_whole("levels", given["levels"], 1),
            check_number("low", given.get("low", -1.0), "a number"),
            check_number("high", given.get("high", 1.0), "a number"),
        )
        if found.low >= found.high:
            raise ValueError(f"bits_per_dim: expected low < high; got {found.low}, {found.high}.")
        return found

    def summary(
        self, levels: int | None = None, low: float | None = None, high: float | None = None
    ) -> NLLSummary:
        """Means over the samples that did not fail, with the standard error of the mean.

        Arguments are those of `bits_per_dim`. NaN counts as failed, whatever `failed` says.

        Raises:
            ValueError: if every sample failed, or as in `bits_per_dim`.

        Example:
            >>> nll, none = torch.tensor([1.0, 3.0]), torch.zeros(2)
            >>> result = NLLResult(nll, torch.zeros(2, 4), none + 74, none + 0.2, none, none > 0)
            >>> summary = result.summary()
            >>> summary.nll, summary.standard_error, round(summary.estimator_error, 3)
            (2.0, 1.0, 0.141)
        """
        bits = self.bits_per_dim(levels, low, high)
        good = ~(self.failed | torch.isnan(self.nll))
        count = int(good.sum())
        if not count:
            raise ValueError(
                f"summary: expected a sample that did not fail; got none of {len(good)}. The "
                f"first one: {self.failures().get(0, 'its nll is NaN')}."
            )

        def mean(numbers: Tensor) -> float:
            return float(numbers.detach()[good].double().mean())

        error = float(self.nll.detach()[good].double().std()) / count**0.5 if count > 1 else None
        bit, part = self.latent[0].numel() * math.log(2), None
        if self.standard_error is not None:
            part = (mean((self.standard_error / self.widening).square()) / count) ** 0.5
            part = part if error is None else min(part, error)  # both are estimates
        return NLLSummary(
            samples=count,
            failed=len(good) - count,
            nll=mean(self.nll),
            standard_error=error,
            estimator_error=part,
            solver_error=mean(self.solver_error),
            bits_per_dim=mean(bits),
            bits_standard_error=None if error is None else error / bit,
            nfe=mean(self.nfe),
        )

    def failures(self) -> dict[int, str]:
        """Why each sample that failed did, and what to do, by its row.

        Example:
            >>> one = torch.ones(1)
            >>> result = NLLResult(one, torch.zeros(1, 3) / 0, one, None, one, one > 0)
            >>> print(result.failures()[0])  # doctest: +ELLIPSIS
            a value on its path is not finite: look at x and at the network's outputs from t_min...
        """
        limit = max(SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT * self.latent[0].numel())
        texts = {}
        for row in self.failed.nonzero().flatten().tolist():
            error = float(self.solver_error[row])
            finite = math.isfinite(error) and bool(self.latent[row].isfinite().all())
            texts[row] = (
                f"its solver_error of {error:.2g} nats is above {limit:g}: take more steps or a "
                "lower tolerance, or give data_mean and data_std"
                if limit < error < math.inf
                else "its number is not finite or beyond the range of "
                f"{self.latent.dtype}, or its path did not arrive: look at x, nfe, the "
                "network, and what log_prior returns if you gave one"
                if finite
                else "a value on its path is not finite: look at x and at the network's outputs "
                "from t_min to t_max, or take smaller steps"
            )
        return texts

    @classmethod
    def cat(cls, results: Sequence["NLLResult"]) -> "NLLResult":
        """The result of all samples from those of batches or ranks, on the device of the first.

        `steps` is None where they differ.

        Raises:
            TypeError: if something else is among them.
            ValueError: for no result at all, samples of different shapes, or results of which some
                have a standard error, a quantization or steps that others lack, or another
                widening: a bound is not joined with a likelihood of the fixed grid. With one of
                the adaptive method and the exact divergence it is: no field tells them apart.

        Example:
            >>> zero = torch.zeros(2)
            >>> one = NLLResult(zero, torch.zeros(2, 3), zero, None, zero, zero > 0)
            >>> NLLResult.cat([one, one]).nll.shape
            torch.Size([4])
        """
        if isinstance(results, NLLResult):
            raise TypeError(f"cat: expected a list of NLLResults; got {describe(results)} alone.")
        results = list(results)
        for result in results:
            if not isinstance(result, NLLResult):
                raise TypeError(f"cat: expected NLLResults; got {describe(result)}.")
        if not results:
            raise ValueError("cat: expected at least one result; got none.")
        kinds = {
            f"samples {tuple(each.latent.shape[1:])}, "
            f"{'no' if each.standard_error is None else 'with'} standard error, "
            f"{'no' if each.steps is None else 'a number of'} steps, "
            f"widening {each.widening:.4g}, {each.quantization}"
            for each in results
        }
        if len(kinds) > 1:
            raise ValueError(
                f"cat: expected results of the same options; got {'; '.join(sorted(kinds))}. Call "
                "ode_nll with the same arguments for every batch."
            )
        device, joined = results[0].nll.device, {}
        for field in fields(cls):
            parts = [getattr(result, field.name) for result in results]
            tensors = isinstance(parts[0], Tensor)
            joined[field.name] = torch.cat([p.to(device) for p in parts]) if tensors else parts[0]
        if len({result.steps for result in results}) > 1:
            joined["steps"] = None
        return cls(**joined)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, without a graph: tensors, None and dicts of plain numbers.

        `torch.save` writes it, and `torch.load` reads it with `weights_only=True`, which unpickles
        nothing else. `from_dict` makes the result again.

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
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NLLResult":
        """The result whose `to_dict` gave these values, bit for bit.

        Raises:
            TypeError: for something else than a mapping, or than a tensor where one belongs.
            ValueError: for a key that is missing or unknown.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"from_dict: expected what to_dict returned; got {describe(values)}.")
        values = {"widening": 1.0, **values}  # which results of 0.1.0 do not have
        expected = [field.name for field in fields(cls)]
        wrong = {
            "missing": [name for name in expected if name not in values],
            "unknown": [name for name in values if name not in expected],
        }
        if any(wrong.values()):
            told = "; ".join(f"{kind}: {names}" for kind, names in wrong.items() if names)
            raise ValueError(
                f"from_dict: expected the keys {expected}; got {told}. Give it what to_dict "
                "returned in this version of hosm_losses."
            )
        optional = {
            "standard_error": Tensor | None,
            "steps": int | None,
            "widening": float,
            "quantization": dict | None,
        }
        for name, value in values.items():
            if not isinstance(value, optional.get(name, Tensor)):
                kind, got = optional.get(name, "a tensor"), describe(value)
                raise TypeError(f"from_dict: expected {kind} for {name!r}; got {got}.")
        known = values["quantization"]
        quantization = None if known is None else Quantization(**known)
        return cls(**{**values, "quantization": quantization})


def _plain(value: Any) -> Any:
    """A field as torch.load(weights_only=True) takes it."""
    if isinstance(value, Tensor):
        return value.detach()
    return value._asdict() if isinstance(value, Quantization) else value
