"""The objective of a loss: from arguments to a reduced loss.

Formula, with the terms of `terms` or `paired`, or of `stein`:
    loss = w₁ first + w₂ second + w_t trace + w₃ third, averaged over the batch
    loss = first + weight · rate, the integral over log σ̂, averaged over the batch
"""

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
from hosm_losses._torch_internals import normal, outside_inference_mode, traced, versions
from hosm_losses.losses.arguments import (
    Given,
    Options,
    Weights,
    check_weight,
    check_weights,
    counts,
)
from hosm_losses.losses.balance import Balance
from hosm_losses.losses.paired import paired_terms
from hosm_losses.losses.stein import stein_terms
from hosm_losses.losses.targets import check_conditions, check_targets
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
from hosm_losses.probes import Paired, draw_probes, unit_vectors


class Evaluated(NamedTuple):
    """A loss with what it was made of."""

    loss: Tensor  # reduced
    terms: Any  # DSMTerms or SteinTerms, per sample, with their graph
    t: Tensor  # (B,)
    rows: Tensor | None  # that have the higher terms, in their order; None for all


def evaluate(
    model: object, x0: object, options: Options, given: Given, balance: Balance | None = None
) -> Evaluated:
    """The loss and its terms, from arguments that are checked here."""
    kwargs = check_model_kwargs(given.model_kwargs)
    higher = options.order > 1
    targets = check_targets(given.targets, tensor=not higher)
    with outside_inference_mode():
        score_model, inputs = perturb(model, x0, options, given, kwargs)
        x, t = inputs.x, inputs.t
        weights, probe = _weights(given.weights, options, x), None
        if given.probe is not None and higher:
            probe = _given_probe(x, given.probe, options)
        options = options.for_weights(weights)
        weighting, sampler, drawn = options.weighting, options.time_sampler, given.t is None
        factors = time_factors(
            score_model, x, t, weighting, sampler, drawn=drawn, order=options.order
        )
        if higher and not torch.compiler.is_compiling():
            refuse_wrapped(score_model.network)
        field = noise_field(score_model, t, kwargs)
        check_conditions(targets, field.kwargs)
        field = field if options.stein else field.drop_qx()
        rows = None
        if options.order > 1:
            rows, rest = _select_rows(x, options, given.generator)
            probes = _probes(x, rows, probe, options, given.generator)
            reduced = terms = _terms(field, inputs, probes, options, weights, rows, rest)
            if options.stein and factors[0] is not None:
                nats = factors[0] / x[0].numel()  # of whole samples, not of their elements
                factors = nats, nats
        else:
            residual = first_residual_of(field, inputs)
            reduced = terms = DSMTerms(first_term(residual))
            if factors[0] is None and balance is None and options.reduction == "mean":
                # One mean over all elements, as every trainer has it.
                reduced = DSMTerms(residual.square())
        if balance is not None:
            found = balance(terms, noise_level(score_model, t, x), rows)
            weights = [
                ratio * weight if counts(weight) and ratio is not None else weight
                for weight, ratio in zip(weights, found, strict=False)
            ]
            factors = factors[0], factors[0]
        loss = _reduce(reduced, weights, factors, rows, options.reduction)
        check_result(loss, terms, inputs)
        return Evaluated(loss, terms, t, rows)


def perturb(
    model: object, x0: object, options: Options, given: Given, kwargs: dict[str, Any]
) -> tuple[ScoreModel, Inputs]:
    """Check the arguments of a loss, draw t and ε where they are missing, and perturb the data.

    x = α(t) x₀ + σ(t) ε. What is missing is drawn on the device of x₀, in the order t, ε, v. The
    noise is ε − q x, to go with `NoiseField.drop_qx`, but for `stein_dsm`, whose rate
    multiplies by ε. Of averaged targets it has the mean in the place of ε, without a gradient.
    """
    score_model, targets = check_model(model), given.targets
    batch = normal(check_sample_batch("x0", x0))
    generator = check_generator(given.generator, batch.device)
    times = (
        draw_time(score_model, batch, options.weighting, generator, options.time_sampler)
        if given.t is None
        else check_time(score_model, batch, given.t)
    )
    if given.noise is None:
        eps = torch.randn(batch.shape, device=batch.device, dtype=batch.dtype, **source(generator))
    else:
        eps = _like_data("noise", given.noise, batch)
    alpha, sigma = score_model.coefficients(times, batch)
    exact = expand_right(alpha, batch) * batch + expand_right(sigma, batch) * eps
    target = eps if options.stein else score_model.noise_without_x(times, batch, eps)
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


def _weights(given: object, options: Options, x: Tensor) -> Weights:
    """The weights of the terms, checked."""
    likelihood = isinstance(options.weighting, str) and options.weighting == "likelihood"
    if options.stein:
        return 1.0, 1.0 if given is None else check_weight("weight", given)
    if given is None and options.order > 1 and likelihood:
        raise ValueError(
            "weights: expected numbers, 'paper' or, in a module, 'balanced' with weighting="
            "'likelihood', which puts the first term alone in nats; got None."
        )
    return check_weights(given, options.order, x[0].numel())


def _terms(
    field: NoiseField,
    inputs: Inputs,
    probes: Tensor,
    options: Options,
    weights: Weights,
    rows: Tensor | None,
    rest: Tensor | None,
) -> Any:
    """The terms of a loss, the higher ones of `rows` alone, all if None.

    `probes` are those of `rows`. The `rest` of the batch has the first term only.
    """
    along, given = terms_along, probes
    if options.stein:
        along, given = stein_terms, probes if counts(weights[1]) else None
    elif isinstance(options.probes, Paired):
        along = partial(paired_terms, second=counts(weights[1]))
    if rows is None or rest is None:
        return along(field, inputs, given, options)
    terms = along(field.rows(rows), inputs.at(rows), given, options)
    first = terms.first
    if len(rest):
        graph = torch.is_grad_enabled() and not traced()
        trained = [each for each in field.model.parameters() if each.requires_grad and graph]
        before = versions(trained)
        others = along(field.rows(rest), inputs.at(rest), None, options)
        if versions(trained) != before:
            raise ValueError(
                "fraction: expected 1 with a network that changes its parameters in its forward, "
                f"as by forced weight normalisation; got {options.fraction}, two calls. "
                "Change them after each step of the optimizer."
            )
        first = torch.cat([first, others.first])
    return terms._replace(
        first=torch.empty_like(first).index_copy(0, torch.cat([rows, rest]), first)
    )


def _select_rows(
    x: Tensor, options: Options, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """The rows that have the higher terms, and the others; None for all rows."""
    if options.fraction == 1:
        return None, None
    order = torch.randperm(len(x), device=x.device, **source(generator))
    count = max(1, round(options.fraction * len(x)))
    return order[:count], order[count:]


def _probes(
    x: Tensor,
    rows: Tensor | None,
    probe: Tensor | None,
    options: Options,
    generator: torch.Generator | None,
) -> Tensor:
    """The probes of the rows: as the caller has them, all unit vectors, or drawn."""
    if probe is not None:
        return probe if rows is None else probe[:, rows]
    chosen, how = x if rows is None else x[rows], options.probes
    if isinstance(how, str):
        return unit_vectors(chosen)
    return draw_probes(chosen, how.count, how.distribution, generator)


def _given_probe(x: Tensor, probe: object, options: Options) -> Tensor:
    """The caller's probe, checked, as (K, B, *)."""
    if isinstance(probe, Tensor) and probe.ndim == x.ndim and not probe.is_nested:
        probe = probe.unsqueeze(0)
    count = len(probe) if isinstance(probe, Tensor) and probe.ndim == x.ndim + 1 else 1
    shape = (max(count, options.fewest), *x.shape)
    checked = check_like("probe", probe, shape, x.dtype, x.device, "x0 after one for the probes")
    how = options.probes
    if isinstance(how, str) or how.count not in (options.fewest, count):
        raise ValueError(
            f"probe: expected as many as probes={how!r} asks for; got {count}. Leave the count of "
            "probes out when you give the probe."
        )
    check_finite("probe", checked)
    return normal(checked)


def _reduce(
    terms: Any,
    weights: Weights,
    factors: tuple[Tensor | None, Tensor | None],
    rows: Tensor | None,
    reduction: str,
) -> Tensor:
    """The sum of the terms times their weights and factors; what has weight zero is left out."""
    of_first, of_higher = factors
    if of_higher is not None and rows is not None:
        of_higher = of_higher[rows]
    apart = reduction == "none"  # from the terms, of which the loss may be one then
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
    return mean if reduction == "mean" else mean * len(terms.first)
