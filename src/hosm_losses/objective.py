r"""The objective of order one, two or three, from checked inputs to a reduced loss.

What:
    Perturb the data, take the derivatives the order needs, form the residuals, square, average.

Formula, per sample, d the number of elements of a sample:
    first = ‖r1‖²/d      second = ‖r2‖²/d²      trace = rt²/d²      third = ‖r3‖²/d³
    loss = w₁ first + w₂ second + w_t trace + w₃ third, averaged over probes, then over the batch.

    The residuals and what is held fixed in them are in `hosm_losses.residuals`.

Random or exact probes:
    With probes="exact" the terms are ‖M₂‖²_F, (tr M₂)² and ‖R₃‖² of the whole Jacobian and of the
    gradient of its trace. With random ones the second term has the same mean; the trace and third
    terms have a mean that is larger by the spread over probes, which is zero at the true score.
    For a field free to take any value the minimiser is the same; for a restricted family it need
    not be.

Source:
    Lu et al., ICML 2022, arXiv 2206.08265: the objectives and their Hutchinson forms, in the
    normalisation of its image experiments.
"""

__all__ = ["DSMTerms", "LossOptions", "Probes", "Weights", "evaluate"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import check_choice, describe, expand_right
from hosm_losses.derivatives import ENGINES
from hosm_losses.inference import outside_inference_mode
from hosm_losses.loss_inputs import Inputs, prepare, probe_tensor
from hosm_losses.noise_field import NoiseField
from hosm_losses.probes import DISTRIBUTIONS
from hosm_losses.residuals import (
    first_residual,
    second_residual,
    third_residual,
    trace_residual,
)
from hosm_losses.weighting import Weighting, check_weighting, time_factors
from hosm_losses.wrappers import refuse_wrapped

REDUCTIONS = ("mean", "sum", "none")
Probes = int | Literal["exact"]
Weights = Sequence[float | Tensor]


class DSMTerms(NamedTuple):
    """The terms of a loss, per sample and before any weight.

    Attributes:
        first: ‖r1‖²/d, of shape (B,).
        second: ‖r2‖²/d², of shape (B,), or of the rows a fraction chose; None at order 1.
        trace: rt²/d², likewise.
        third: ‖r3‖²/d³, likewise; None below order 3.
    """

    first: Tensor
    second: Tensor | None = None
    trace: Tensor | None = None
    third: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is chosen once for a loss, checked on construction; `third_order_dsm` explains each.

    Raises:
        ValueError: for an unknown name or a number out of range.
    """

    order: int
    probes: Probes = 1
    distribution: str = "rademacher"
    weighting: Weighting = "noise"
    derivative: str = "auto"
    fraction: float = 1.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Check every option."""
        if self.order not in (1, 2, 3):
            raise ValueError(f"order: expected 1, 2 or 3; got {describe(self.order)}.")
        whole = isinstance(self.probes, int) and not isinstance(self.probes, bool)
        if self.probes != "exact" and not (whole and self.probes >= 1):
            raise ValueError(
                f"probes: expected a number above 0, or 'exact'; got {describe(self.probes)}."
            )
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        check_weighting(self.weighting)
        check_choice("derivative", self.derivative, ENGINES)
        check_choice("reduction", self.reduction, REDUCTIONS)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1]; got {self.fraction!r}.")
        if self.fraction < 1 and self.reduction == "none":
            raise ValueError(
                "fraction: expected 1 with reduction='none', as rows outside the fraction have no "
                f"higher terms; got {self.fraction!r}. Use reduction='mean' or 'sum'."
            )


def _mean_square(residual: Tensor, *, exact: bool = False) -> Tensor:
    """‖r‖² of (K, B, *) averaged over probes, or of their sum over all unit vectors: (B,)."""
    if exact:
        residual = residual.sum(0, keepdim=True)
    return residual.square().reshape(*residual.shape[:2], -1).sum(-1).mean(0)


def _first(field: NoiseField, inputs: Inputs) -> Tensor:
    return first_residual(field(inputs.x).unsqueeze(0), inputs.noise)


def _first_term(residual: Tensor) -> Tensor:
    return _mean_square(residual) / residual[0, 0].numel()


def _terms(field: NoiseField, inputs: Inputs, probe: Tensor, options: LossOptions) -> DSMTerms:
    x, noise = inputs.x, inputs.noise
    direction = (expand_right(inputs.sigma, x) * probe).to(x.dtype)
    value, directional, gradient = field.derive(
        x, direction, order=options.order, derivative=options.derivative
    )
    elements = x[0].numel()
    exact = options.probes == "exact"
    first = _first_term(first_residual(value, noise))
    second = _mean_square(second_residual(value, directional, noise, probe)) / elements**2
    # Over all unit vectors ‖r2‖² is summed, but rt and r3 are summed before they are squared.
    second = second * len(probe) if exact else second
    trace = trace_residual(value, directional, noise, probe)
    trace = _mean_square(trace, exact=exact) / elements**2
    if gradient is None:
        return DSMTerms(first, second, trace)
    third = third_residual(value, directional, gradient, noise, probe)
    return DSMTerms(first, second, trace, _mean_square(third, exact=exact) / elements**3)


def _terms_of_fraction(
    field: NoiseField,
    inputs: Inputs,
    probe: Tensor | None,
    options: LossOptions,
    generator: torch.Generator | None,
) -> tuple[DSMTerms, Tensor]:
    """Every row's first term, the higher terms of a random part, and the rows of that part."""
    batch = len(inputs.x)
    count = max(1, round(options.fraction * batch))
    order = torch.randperm(batch, generator=generator, device=inputs.x.device)
    chosen, rest = order[:count], order[count:]
    part = _rows(inputs, chosen)
    given = None if probe is None else probe[:, chosen]
    if given is None:
        given = probe_tensor(part.x, None, options.probes, options.distribution, generator)
    terms = _terms(field.rows(chosen), part, given, options)
    first = terms.first
    if count < batch:
        others = _rows(inputs, rest)
        first = torch.cat([first, _first_term(_first(field.rows(rest), others))])
    first = torch.empty_like(first).index_copy(0, order, first)
    return terms._replace(first=first), chosen


def _rows(inputs: Inputs, index: Tensor) -> Inputs:
    x, t, noise, sigma, drawn = inputs
    return Inputs(x[index], t[index], noise[index], sigma[index], drawn)


def _check_weights(weights: object, order: int) -> Weights:
    count = {1: 1, 2: 3, 3: 4}[order]
    if weights is None:
        return (1.0,) * count
    given = tuple(weights) if isinstance(weights, Sequence | Tensor) else ()
    if len(given) not in ((3, 4) if order == 2 else (count,)):
        raise ValueError(
            "weights: expected four numbers (first, second, trace, third), at order 2 three or "
            f"four; got {weights!r} at order {order}."
        )
    for weight in given:
        if isinstance(weight, Tensor) and weight.numel() != 1:
            raise ValueError(f"weights: expected numbers; got {describe(weight)}.")
    if not any(isinstance(weight, Tensor) or weight != 0 for weight in given[: order + 1]):
        raise ValueError(f"weights: expected one at least that is not 0; got {weights!r}.")
    return given


def _weighted(terms: DSMTerms, weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    """w₁ first, and the weighted sum of the higher terms; None for what has weight zero."""
    products = [
        weight * term if term is not None and (isinstance(weight, Tensor) or weight != 0) else None
        for weight, term in zip(weights, terms, strict=False)
    ]
    higher = [product for product in products[1:] if product is not None]
    return products[0], sum(higher[1:], higher[0]) if higher else None


def evaluate(
    model: object,
    x0: object,
    options: LossOptions,
    *,
    t: object = None,
    noise: object = None,
    probe: object = None,
    weights: Weights | None = None,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, DSMTerms]:
    """The loss and its terms: what every function and module of this package calls.

    Args:
        model: a ScoreModel.
        x0: data (B, *).
        options: what is chosen once.
        t: times (B,); drawn if None.
        noise: ε (B, *); drawn if None.
        probe: v, (B, *) or (K, B, *); drawn if None.
        weights: (first, second, trace, third).
        generator: the source of randomness.
        model_kwargs: for the network.

    Returns:
        The reduced loss, and the terms with their graph.
    """
    checked = _check_weights(weights, options.order)
    with outside_inference_mode():
        score_model, inputs = prepare(model, x0, t, noise, options.weighting, generator)
        higher = options.order > 1
        if higher and not torch.compiler.is_compiling():
            refuse_wrapped(score_model.network)
        field = score_model.field(
            inputs.t, model_kwargs, primitives=score_model.primitives and higher
        )
        chosen = None
        if not higher:
            residual = _first(field, inputs)
            terms = DSMTerms(_first_term(residual))
            if options.weighting == "noise" and options.reduction == "mean":
                # One mean over all elements, as every trainer has it: the same to the last bit.
                return residual.square().mean(), terms
        elif options.fraction < 1:
            given = None
            if probe is not None:
                given = probe_tensor(inputs.x, probe, options.probes, options.distribution, None)
            terms, chosen = _terms_of_fraction(field, inputs, given, options, generator)
        else:
            given = probe_tensor(inputs.x, probe, options.probes, options.distribution, generator)
            terms = _terms(field, inputs, given, options)
        factors = time_factors(
            score_model, inputs.x, inputs.t, options.weighting, drawn=inputs.drawn
        )
        return _reduce(terms, checked, factors, chosen, options), terms


def _reduce(
    terms: DSMTerms,
    weights: Weights,
    factors: tuple[Tensor | None, Tensor | None],
    chosen: Tensor | None,
    options: LossOptions,
) -> Tensor:
    first, higher = _weighted(terms, weights)
    first_factor, higher_factor = factors
    if first is not None and first_factor is not None:
        first = first * first_factor
    if higher is not None and higher_factor is not None:
        higher = higher * (higher_factor if chosen is None else higher_factor[chosen])
    parts = [part for part in (first, higher) if part is not None]
    if options.reduction == "none":
        return sum(parts[1:], parts[0])
    # The mean over a random fraction estimates the mean over the batch, so the sum is B times it.
    means = [part.mean() for part in parts]
    mean = sum(means[1:], means[0])
    return mean if options.reduction == "mean" else mean * len(terms.first)
