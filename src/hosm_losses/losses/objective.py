"""The objective of a loss: from arguments to a reduced loss.

Formula, with the terms of `terms` or `paired`, or of `stein`:
    loss = w₁ first + w₂ second + w_t trace + w₃ third, averaged over the batch
    loss = first + weight · rate, the integral over log σ̂, averaged over the batch
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import (
    at_least_float32,
    check_finite,
    check_generator,
    check_like,
    check_model_kwargs,
    check_sample_batch,
    expand_right,
    source,
)
from hosm_losses._torch_internals import normal, outside_inference_mode, traced
from hosm_losses.derivatives import has_other_leaves
from hosm_losses.losses.balance import Balance
from hosm_losses.losses.options import (
    LossOptions,
    SteinOptions,
    Weights,
    check_weights,
    counts,
)
from hosm_losses.losses.paired import paired_terms
from hosm_losses.losses.stein import stein_terms
from hosm_losses.losses.targets import Targets, check_conditions, check_targets
from hosm_losses.losses.terms import (
    DSMTerms,
    Inputs,
    check_result,
    first_residual_of,
    first_term,
    terms_along,
)
from hosm_losses.losses.weighting import draw_time, noise_level, time_factors
from hosm_losses.model import (
    NoiseField,
    ScoreModel,
    check_model,
    check_time,
    noise_field,
    refuse_wrapped,
)
from hosm_losses.probes import draw_probes, unit_vectors


class Evaluated(NamedTuple):
    """A loss with what it was made of."""

    loss: Tensor  # reduced
    terms: Any  # DSMTerms or SteinTerms, per sample, with their graph
    t: Tensor  # (B,)
    rows: Tensor | None  # that have the higher terms, in their order; None for all


def evaluate(
    model: object,
    x0: object,
    options: LossOptions,
    *,
    t: object = None,
    noise: object = None,
    targets: object = None,
    probe: object = None,
    weights: object = None,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    balance: Balance | None = None,
) -> Evaluated:
    """The loss and its terms, from arguments that are checked here."""
    kwargs = check_model_kwargs(model_kwargs)
    targets = check_targets(targets, tensor=options.order == 1)
    with outside_inference_mode():
        score_model, inputs = perturbed(model, x0, t, noise, options, generator, targets, kwargs)
        if balance is None:
            checked = options.checked(weights, inputs.x[0].numel())
        else:
            checked = check_weights(weights, options.order)
        _check_device(checked, inputs.x, options.weights_name)
        weighting, sampler, drawn = options.weighting, options.time_sampler, t is None
        factors = time_factors(
            score_model, inputs.x, inputs.t, weighting, sampler, drawn=drawn, order=options.order
        )
        higher = options.order > 1
        if higher and not torch.compiler.is_compiling():
            refuse_wrapped(score_model.network)
        primitives = score_model.primitives and higher
        field = noise_field(score_model, inputs.t, kwargs, primitives=primitives)
        check_conditions(targets, field.kwargs)
        field = field.apart_from_x() if options.x_apart else field
        rows = None
        if higher:
            rows, rest = _fraction(inputs.x, options, generator)
            probes = _probes(inputs.x, probe, rows, options, generator)
            terms = _terms(field, inputs, probes, options, checked, rows, rest)
            terms = _without_idle_graph(terms, score_model)
            if isinstance(options, SteinOptions) and factors[0] is not None:
                nats = factors[0] / inputs.x[0].numel()  # of whole samples, not of their elements
                factors = nats, nats
            if balance is not None:
                found = balance(terms, noise_level(score_model, inputs.t, inputs.x), rows)
                checked = [
                    ratio * weight if counts(weight) and ratio is not None else weight
                    for weight, ratio in zip(checked, found, strict=False)
                ]
                factors = factors[0], factors[0]
            loss = _reduce(terms, checked, factors, rows, options)
        else:
            residual = first_residual_of(field, inputs)
            terms = DSMTerms(first_term(residual))
            if factors[0] is None and options.reduction == "mean":
                # One mean over all elements, as every trainer has it.
                loss = residual.square().mean()
            else:
                loss = _reduce(terms, checked, factors, None, options)
        check_result(loss, terms, inputs)
        return Evaluated(loss, terms, inputs.t, rows)


def perturbed(
    model: object,
    x0: object,
    t: object,
    noise: object,
    options: LossOptions,
    generator: torch.Generator | None,
    targets: Targets,
    kwargs: dict[str, Any],
) -> tuple[ScoreModel, Inputs]:
    """Check the arguments of a loss, draw t and ε where they are missing, and perturb the data.

    x = α(t) x₀ + σ(t) ε. What is missing is drawn on the device of x₀, in the order t, ε, v. The
    noise is ε − q x, to go with `NoiseField.apart_from_x`, where x is apart. Of `targets` it has
    the mean in the place of ε, without a gradient.
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
        eps = torch.randn(batch.shape, device=batch.device, dtype=batch.dtype, **source(generator))
    else:
        eps = _like_data("noise", noise, batch)
    alpha, sigma = score_model.coefficients(times, batch)
    exact = expand_right(alpha, batch) * batch + expand_right(sigma, batch) * eps
    target = score_model.noise_without_x(times, batch, eps) if options.x_apart else eps
    posterior = None
    if isinstance(targets, Tensor):
        target = target + (at_least_float32(_like_data("targets", targets, batch).detach()) - eps)
    elif targets is not None:
        posterior = targets.posterior(batch, eps, alpha, sigma, kwargs)
        shift = posterior.mean.reshape(eps.shape).to(at_least_float32(eps).dtype)
        target = target + (shift + (eps.detach() - eps))
    return score_model, Inputs(exact.to(batch.dtype), times, target, sigma, posterior)


def _like_data(name: str, value: object, x0: Tensor) -> Tensor:
    """The caller's tensor, if it is a finite one like the data."""
    given = normal(check_like(name, value, tuple(x0.shape), x0.dtype, x0.device, "x0"))
    check_finite(name, given)
    return given


def _terms(
    field: NoiseField,
    inputs: Inputs,
    probes: Tensor,
    options: LossOptions,
    weights: Weights,
    rows: Tensor | None,
    rest: Tensor | None,
) -> Any:
    """The terms of a loss, the higher ones of `rows` alone, all if None.

    `probes` are those of `rows`. The `rest` of the batch has the first term only.
    """
    along, given = terms_along, probes
    if isinstance(options, SteinOptions):
        along, given = stein_terms, probes if counts(weights[1]) else None
    elif options.estimator == "paired":
        along = partial(paired_terms, second=counts(weights[1]))
    if rows is None or rest is None:
        return along(field, inputs, given, options)
    terms = along(field.rows(rows), inputs.at(rows), given, options)
    first = terms.first
    if len(rest):
        others = along(field.rows(rest), inputs.at(rest), None, options)
        first = torch.cat([first, others.first])
    return terms._replace(
        first=torch.empty_like(first).index_copy(0, torch.cat([rows, rest]), first)
    )


def _without_idle_graph(terms: Any, model: ScoreModel) -> Any:
    """The terms, without a graph that leads to nothing but the copies of x of the engines.

    As at order one the loss of a frozen network requires no gradient, and .backward() is an error.
    """
    # A graph is looked through only where no parameter is trained that is known.
    if traced() or any(each.requires_grad for each in model.parameters()):
        return terms
    if has_other_leaves([term for term in terms if term is not None]):
        return terms
    return terms._make(None if term is None else term.detach() for term in terms)


def _fraction(
    x: Tensor, options: LossOptions, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """The rows that have the higher terms, and the others; None for all rows."""
    if options.fraction == 1:
        return None, None
    order = torch.randperm(len(x), device=x.device, **source(generator))
    count = max(1, round(options.fraction * len(x)))
    return order[:count], order[count:]


def _probes(
    x: Tensor,
    probe: object,
    rows: Tensor | None,
    options: LossOptions,
    generator: torch.Generator | None,
) -> Tensor:
    """The probes of the rows: as given, all unit vectors, or drawn."""
    if probe is not None:
        v = _given_probe(x, probe, options)
        return v if rows is None else v[:, rows]
    chosen = x if rows is None else x[rows]
    if options.probes == "exact":
        return unit_vectors(chosen)
    count = options.probes or options.default_probes
    return draw_probes(chosen, count, options.distribution, generator)


def _given_probe(x: Tensor, probe: object, options: LossOptions) -> Tensor:
    """The caller's probe, checked, as (K, B, *)."""
    if isinstance(probe, Tensor) and probe.ndim == x.ndim and not probe.is_nested:
        probe = probe.unsqueeze(0)
    count = len(probe) if isinstance(probe, Tensor) and probe.ndim == x.ndim + 1 else 1
    shape = (max(count, options.default_probes), *x.shape)
    given = check_like("probe", probe, shape, x.dtype, x.device, "x0 after one for the probes")
    if options.probes not in (options.default_probes, count):
        raise ValueError(
            f"probe: expected as many as probes={options.probes!r} asks for; got {count}. Leave "
            "probes out when you give the probe."
        )
    check_finite("probe", given)
    return normal(given)


def _check_device(weights: Weights, x: Tensor, name: str) -> None:
    for weight in weights:
        # A number on the CPU goes with a tensor on any device.
        if isinstance(weight, Tensor) and weight.device not in (x.device, torch.device("cpu")):
            raise ValueError(
                f"{name}: expected numbers, or tensors on {x.device} as x0 is, or on the CPU; "
                f"got one on {weight.device}."
            )


def _reduce(
    terms: Any,
    weights: Weights,
    factors: tuple[Tensor | None, Tensor | None],
    rows: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """The sum of the terms times their weights and factors; what has weight zero is left out."""
    of_first, of_higher = factors
    if of_higher is not None and rows is not None:
        of_higher = of_higher[rows]
    apart = options.reduction == "none"  # from the terms, of which the loss may be one then
    products: list[Tensor] = []
    for weight, term, factor in zip(weights, terms, (of_first, *[of_higher] * 3), strict=False):
        if term is not None and counts(weight):
            is_one = not isinstance(weight, Tensor) and weight == 1
            product = term if is_one and not apart else weight * term
            products.append(product if factor is None else product * factor)
    if apart:
        return sum(products[1:], products[0])
    # The mean over a random fraction estimates the mean over the batch, so the sum is B times it.
    means = [product.mean() for product in products]
    mean = sum(means[1:], means[0])
    return mean if options.reduction == "mean" else mean * len(terms.first)
