r"""The objective of order one, two or three, from checked inputs to a reduced loss.

What:
    Perturb the data, take the derivatives the order needs, form the residuals, square, average.

Formula, with the terms of `hosm_losses.terms`:
    loss = w₁ first + w₂ second + w_t trace + w₃ third, averaged over the batch.

Source:
    Lu et al., ICML 2022, arXiv 2206.08265: the objectives and their Hutchinson forms, in the
    normalisation of its image experiments.
"""

__all__ = ["evaluate"]

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import describe
from hosm_losses.inference import outside_inference_mode
from hosm_losses.loss_inputs import prepare
from hosm_losses.loss_options import LossOptions, Weights
from hosm_losses.terms import DSMTerms, evaluate_terms, first_residual_of, first_term
from hosm_losses.weighting import time_factors
from hosm_losses.wrappers import refuse_wrapped


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
            residual = first_residual_of(field, inputs)
            terms = DSMTerms(first_term(residual))
            if options.weighting == "noise" and options.reduction == "mean":
                # One mean over all elements, as every trainer has it: the same to the last bit.
                return residual.square().mean(), terms
        else:
            terms, chosen = evaluate_terms(field, inputs, probe, options, generator)
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
