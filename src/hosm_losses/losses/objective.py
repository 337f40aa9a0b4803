"""The objective of order one, two or three: from arguments to a reduced loss.

Formula, with the terms of `terms`:
    loss = w₁ first + w₂ second + w_t trace + w₃ third, averaged over the batch.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import (
    DerivativeError,
    check_finite,
    check_generator,
    check_like,
    check_model_kwargs,
    check_sample_batch,
    expand_right,
    may_look,
)
from hosm_losses._torch_internals import normal, outside_inference_mode
from hosm_losses.losses.options import LossOptions, Weights, check_weights
from hosm_losses.losses.terms import (
    Directions,
    DSMTerms,
    Inputs,
    evaluate_terms,
    first_residual_of,
    first_term,
)
from hosm_losses.losses.weighting import draw_time, time_factors
from hosm_losses.model import ScoreModel, check_model, check_time, noise_field, refuse_wrapped
from hosm_losses.probes import draw_probes, unit_vectors


class Evaluated(NamedTuple):
    """A loss with what it was made of."""

    loss: Tensor  # reduced
    terms: DSMTerms  # per sample, with their graph
    t: Tensor  # (B,)
    rows: Tensor | None  # that have the higher terms, in their order; None for all


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
) -> Evaluated:
    """The loss and its terms, from arguments that are checked here."""
    checked = check_weights(weights, options.order)
    kwargs = check_model_kwargs(model_kwargs)
    with outside_inference_mode():
        score_model, inputs = perturbed(model, x0, t, noise, options, generator)
        _check_device(checked, inputs.x)
        weighting, sampler, drawn = options.weighting, options.time_sampler, t is None
        factors = time_factors(score_model, inputs.x, inputs.t, weighting, sampler, drawn=drawn)
        higher = options.order > 1
        if higher and not torch.compiler.is_compiling():
            refuse_wrapped(score_model.network)
        primitives = score_model.primitives and higher
        field = noise_field(score_model, inputs.t, kwargs, primitives=primitives)
        rows = None
        if higher:
            rows, rest = _fraction(inputs.x, options, generator)
            directions = _directions(inputs.x, probe, rows, options, generator)
            terms = evaluate_terms(field, inputs, directions, options, rows, rest)
            loss = _reduce(terms, checked, factors, rows, options)
        else:
            residual = first_residual_of(field, inputs)
            terms = DSMTerms(first_term(residual))
            if factors[0] is None and options.reduction == "mean":
                # One mean over all elements, as every trainer has it.
                loss = residual.square().mean()
            else:
                loss = _reduce(terms, checked, factors, None, options)
        _check_result(loss, terms, inputs.t)
        return Evaluated(loss, terms, inputs.t, rows)


def perturbed(
    model: object,
    x0: object,
    t: object,
    noise: object,
    options: LossOptions,
    generator: torch.Generator | None,
) -> tuple[ScoreModel, Inputs]:
    """Check the arguments of a loss, draw t and ε where they are missing, and perturb the data.

    x = α(t) x₀ + σ(t) ε. What is missing is drawn on the device of x₀, in the order t, ε, v.
    """
    score_model = check_model(model)
    batch = normal(check_sample_batch("x0", x0))
    check_generator(generator, batch.device)
    times = (
        draw_time(score_model, batch, options.weighting, generator, options.time_sampler)
        if t is None
        else check_time(score_model, batch, t)
    )
    if noise is None:
        eps = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
    else:
        shape = tuple(batch.shape)
        eps = normal(check_like("noise", noise, shape, batch.dtype, batch.device, "x0"))
        check_finite("noise", eps)
    alpha, sigma = score_model.coefficients(times, batch)
    x = expand_right(alpha, batch) * batch + expand_right(sigma, batch) * eps
    return score_model, Inputs(x.to(batch.dtype), times, eps, sigma)


def _fraction(
    x: Tensor, options: LossOptions, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """The rows that have the higher terms, and the others; None for all rows."""
    if options.fraction == 1:
        return None, None
    order = torch.randperm(len(x), generator=generator, device=x.device)
    count = max(1, round(options.fraction * len(x)))
    return order[:count], order[count:]


def _directions(
    x: Tensor,
    probe: object,
    rows: Tensor | None,
    options: LossOptions,
    generator: torch.Generator | None,
) -> Directions:
    """For the rows: v as given, all unit vectors, or drawn; and u, drawn."""
    chosen = x if rows is None else x[rows]
    if probe is not None:
        v = _given_probe(x, probe, options)
        v = v if rows is None else v[:, rows]
    elif options.probes == "exact":
        v = unit_vectors(chosen)
    else:
        v = draw_probes(chosen, options.probes, options.distribution, generator)
    if options.order < 3 or options.third != "sliced":
        return Directions(v)
    # r3 is summed over all unit vectors before it is squared: one u for all of them.
    count = 1 if options.probes == "exact" else len(v)
    u = draw_probes(chosen, count, options.distribution, generator)
    return Directions(v, u)


def _given_probe(x: Tensor, probe: object, options: LossOptions) -> Tensor:
    """The caller's probe, checked, as (K, B, *)."""
    if isinstance(probe, Tensor) and probe.ndim == x.ndim:
        probe = probe.unsqueeze(0)
    count = len(probe) if isinstance(probe, Tensor) and probe.ndim == x.ndim + 1 else 1
    shape = (max(count, 1), *x.shape)
    given = check_like("probe", probe, shape, x.dtype, x.device, "x0 after one for the probes")
    if options.probes not in (1, count):
        raise ValueError(
            f"probe: expected as many as probes={options.probes!r} asks for; got {count}. Leave "
            "probes out when you give the probe."
        )
    check_finite("probe", given)
    return normal(given)


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
    rows: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """The sum of the terms times their weights and factors; what has weight zero is left out."""
    of_first, of_higher = factors
    if of_higher is not None and rows is not None:
        of_higher = of_higher[rows]
    products = [
        weight * term if factor is None else weight * term * factor
        for weight, term, factor in zip(weights, terms, (of_first, *[of_higher] * 3), strict=False)
        if term is not None and (isinstance(weight, Tensor) or weight != 0)
    ]
    if options.reduction == "none":
        return sum(products[1:], products[0])
    # The mean over a random fraction estimates the mean over the batch, so the sum is B times it.
    means = [product.mean() for product in products]
    mean = sum(means[1:], means[0])
    return mean if options.reduction == "mean" else mean * len(terms.first)
