r"""The objective of order one, two or three, from checked inputs to a reduced loss.

What:
    Perturb the data, take the derivatives the order needs, form the residuals, square, average.

Formula, with the terms of `hosm_losses.losses.terms`:
    loss = w₁ first + w₂ second + w_t trace + w₃ third, averaged over the batch.

Source:
    Lu et al., ICML 2022, arXiv 2206.08265: the objectives and their Hutchinson forms, in the
    normalisation of its image experiments.
"""

__all__ = ["evaluate"]

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hosm_losses._checks import DerivativeError, check_model_kwargs, may_look
from hosm_losses._torch_internals import outside_inference_mode
from hosm_losses.losses.inputs import prepare
from hosm_losses.losses.options import LossOptions, Weights, check_weights
from hosm_losses.losses.terms import DSMTerms, evaluate_terms, first_residual_of, first_term
from hosm_losses.losses.weighting import time_factors
from hosm_losses.model import noise_field, refuse_wrapped


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

    Raises:
        TypeError: for an argument of a wrong type or dtype.
        ValueError: for a wrong shape, device or value, and, on the CPU, for a loss that is NaN or
            infinite.
        DerivativeError: where the derivatives of the network cannot be taken, or, on the CPU, are
            NaN or infinite.
    """
    checked = check_weights(weights, options.order)
    kwargs = check_model_kwargs(model_kwargs)
    with outside_inference_mode():
        score_model, inputs = prepare(model, x0, t, noise, options.weighting, generator)
        _check_device(checked, inputs.x)
        factors = time_factors(
            score_model, inputs.x, inputs.t, options.weighting, drawn=inputs.drawn
        )
        higher = options.order > 1
        if higher and not torch.compiler.is_compiling():
            refuse_wrapped(score_model.network)
        field = noise_field(
            score_model, inputs.t, kwargs, primitives=score_model.primitives and higher
        )
        chosen = None
        if not higher:
            residual = first_residual_of(field, inputs)
            terms = DSMTerms(first_term(residual))
            if options.weighting == "noise" and options.reduction == "mean":
                # One mean over all elements, as every trainer has it.
                loss = residual.square().mean()
                _check_result(loss, terms, inputs.t)
                return loss, terms
        else:
            terms, chosen = evaluate_terms(field, inputs, probe, options, generator)
        loss = _reduce(terms, checked, factors, chosen, options)
        _check_result(loss, terms, inputs.t)
        return loss, terms


def _check_device(weights: Weights, x: Tensor) -> None:
    for weight in weights:
        # A number on the CPU goes with a tensor on any device.
        if isinstance(weight, Tensor) and weight.device not in (x.device, torch.device("cpu")):
            raise ValueError(
                f"weights: expected numbers, or tensors on {x.device} as x0 is, or on the CPU; "
                f"got one on {weight.device}."
            )


def _check_result(loss: Tensor, terms: DSMTerms, t: Tensor) -> None:
    """Raise where a loss on the CPU is not finite: one number is looked at, and then why."""
    if not may_look(loss):
        return
    if math.isfinite(loss.item()) if loss.ndim == 0 else bool(torch.isfinite(loss).all()):
        return
    bad = ~torch.isfinite(terms.first)
    if bool(bad.any()):
        times = t[bad]
        raise ValueError(
            "network: expected finite outputs; got NaN or infinite ones for "
            f"{int(bad.sum())} of {len(bad)} samples, at t from {float(times.min()):g} to "
            f"{float(times.max()):g}. Look for parameters that are not finite, after a step that "
            "was too large, and for a division by zero or a logarithm in the network."
        )
    names = [
        name
        for name, term in terms._asdict().items()
        if term is not None and not bool(torch.isfinite(term).all())
    ]
    if names:
        raise DerivativeError(
            "network: expected finite derivatives; its outputs are finite, but not the terms "
            f"{', '.join(names)}. A root, a norm or a power has no derivative at zero: add a "
            "small number inside it. check_derivatives(model, x0) names the module."
        )
    raise ValueError(
        "loss: expected a finite one; its terms are finite, but not with their weights. Take "
        "smaller weights, or a weighting without a singularity at the times of the batch."
    )


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
