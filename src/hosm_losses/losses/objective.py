"""How a loss is computed: check, perturb, differentiate, form residuals, weight, reduce.

Formula, with the terms from `terms` or `paired`:
    x = α x₀ + σ ε,  loss = w₁ first + w₂ second + w_t trace + w₃ third, averaged over the batch
"""

from collections.abc import Mapping
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
    generator_kwargs,
)
from hosm_losses._torch_internals import (
    is_traced,
    outside_inference_mode,
    versions,
)
from hosm_losses.losses.options import LossOptions, Weights, check_weights, is_used, needed_order
from hosm_losses.losses.paired import paired_terms
from hosm_losses.losses.targets import Targets, check_conditions, check_targets
from hosm_losses.losses.terms import (
    DSMTerms,
    NoisyBatch,
    check_result,
    first_residual,
    first_term,
    squared_terms,
)
from hosm_losses.losses.weighting import draw_time, time_factors
from hosm_losses.model import (
    BoundModel,
    ScoreModel,
    bind_model,
    check_model,
    check_time,
    refuse_wrapped,
)
from hosm_losses.probes import Paired, unit_vectors


class LossAndTerms(NamedTuple):
    """A loss and its terms, with their times and rows."""

    loss: Tensor  # reduced
    terms: DSMTerms  # per sample, with their graph
    t: Tensor  # (B,)
    rows: Tensor | None  # the rows with higher terms, in the order of the terms; None for all rows


def dsm(
    model: object,
    x0: object,
    options: LossOptions,
    *,
    t: object = None,
    noise: object = None,
    probe: object = None,
    targets: object = None,
    weights: object = None,
    generator: object = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LossAndTerms:
    """Return the loss and its terms.

    Random numbers are drawn in the order t, ε, rows, v, except for those that the caller passes.
    """
    kwargs = check_model_kwargs(model_kwargs)
    weighting, sampler, higher = options.weighting, options.time_sampler, options.order > 1
    targets = check_targets(targets, tensor=not higher)
    with outside_inference_mode():
        score_model, x0 = check_model(model), check_sample_batch("x0", x0)
        rng, drawn = check_generator(generator, x0.device), t is None
        if drawn:
            time = draw_time(score_model, x0, weighting, rng, sampler)
        else:
            time = check_time(score_model, x0, t)
        batch = perturb(score_model, x0, time, noise, targets, rng, kwargs)
        weights = _weights(weights, options, batch.dimensions)
        order, v = needed_order(options.order, weights), None
        if higher and probe is not None:
            v = _check_probe(x0, probe, options)
        how = {"drawn": drawn, "order": order}
        factors = time_factors(score_model, batch.x, time, weighting, sampler, **how)
        if higher and not torch.compiler.is_compiling():
            refuse_wrapped(score_model.network)
        bound = bind_model(score_model, len(x0), kwargs, time)
        check_conditions(targets, bound.kwargs)
        rows = None
        if order == 1:
            # A single call of the network without primitives or copies, as in any trainer.
            prediction = score_model.predict(batch.x, time, **bound.kwargs)
            residual = first_residual(bound, batch, prediction)
            reduced = terms = DSMTerms(first_term(residual, batch.dimensions))
            if factors[0] is None and options.reduction == "mean":
                reduced = DSMTerms(residual.square())  # a single mean, as in any trainer
        else:
            rows, remaining = _select_rows(batch.x, options, rng)
            v = _probes(batch.x, rows, v, options, rng)
            bound_rows, noisy_rows = bound, batch
            if rows is not None:
                bound_rows, noisy_rows = bound.rows(rows), batch.at(rows)
            if isinstance(options.probes, Paired):
                second = is_used(weights[1])
                terms = paired_terms(bound_rows, noisy_rows, v, order, options, second=second)
            else:
                terms = squared_terms(bound_rows, noisy_rows, v, order, options)
            if rows is not None and remaining is not None:
                first = _first_of_all(terms.first, bound, batch, rows, remaining)
                terms = terms._replace(first=first)
            reduced = terms
        loss = _reduce(reduced, weights, factors, rows, options.reduction)
        check_result(loss, terms, batch)
    # The return statement is outside the block, because torch.compile only resumes a graph in a
    # block with a single exit.
    return LossAndTerms(loss, terms, time, rows)


def perturb(
    model: ScoreModel,
    x0: Tensor,
    t: Tensor,
    noise: object,
    targets: Targets,
    generator: torch.Generator | None,
    kwargs: dict[str, Any],
) -> NoisyBatch:
    """Return x = α(t) x₀ + σ(t) ε and its targets, which leave out q x, as in `terms`."""
    if noise is None:
        eps = torch.randn(
            x0.shape, device=x0.device, dtype=x0.dtype, **generator_kwargs(generator)
        )
    else:
        eps = _like_data("noise", noise, x0)
    alpha, sigma = model.coefficients(t, x0)
    x = expand_right(alpha, x0) * x0 + expand_right(sigma, x0) * eps
    target, moments = model.noise_without_x(t, x0, eps), None
    if isinstance(targets, Tensor):
        instead = at_least_float32(_like_data("targets", targets, x0).detach())
        target = target + (instead - eps)
    elif targets is not None:  # the mean of the targets replaces ε, without a gradient
        moments = targets.posterior(x0, eps, alpha, sigma, kwargs)
        # Added in the dtype of the moments, because the sum may cancel nearly all of ε.
        target = target + (eps.detach() - eps) + moments.mean.reshape(eps.shape)
        target = target.to(at_least_float32(eps).dtype)
    return NoisyBatch(x.to(x0.dtype), t, target, sigma, moments)


def _like_data(name: str, value: object, x0: Tensor) -> Tensor:
    """Return the caller's tensor, after checking that it is finite and matches the data."""
    tensor = check_like(name, value, tuple(x0.shape), x0.dtype, x0.device, "x0")
    check_finite(name, tensor)
    return tensor


def _weights(weights: object, options: LossOptions, dimensions: int) -> Weights:
    """Return the checked weights of the terms."""
    if weights is None and options.order > 1 and options.weighting == "likelihood":
        raise ValueError(
            "weights: expected numbers or 'paper' with weighting='likelihood', where only the "
            "first term is in nats; got None."
        )
    return check_weights(weights, options.order, dimensions)


def _first_of_all(
    first: Tensor, bound: BoundModel, batch: NoisyBatch, rows: Tensor, remaining: Tensor
) -> Tensor:
    """Return the first term for all samples, calling the network for the samples not in `rows`."""
    if not len(remaining):
        return torch.empty_like(first).index_copy(0, rows, first)
    graph = torch.is_grad_enabled() and not is_traced()
    trained = [p for p in bound.model.parameters() if p.requires_grad and graph]
    before = versions(trained)
    bound, batch = bound.rows(remaining), batch.at(remaining)
    others = first_term(first_residual(bound, batch, bound.native(batch.x)), batch.dimensions)
    if versions(trained) != before:
        raise ValueError(
            "fraction: expected 1 with a network that changes its parameters in its forward, as "
            "forced weight normalisation does; got less than 1, for which the network is called "
            "twice. Change the parameters after each step of the optimizer instead."
        )
    first = torch.cat([first, others])
    return torch.empty_like(first).index_copy(0, torch.cat([rows, remaining]), first)


def _select_rows(
    x: Tensor, options: LossOptions, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows for the higher terms and the other rows; (None, None) means all rows."""
    if options.fraction == 1:
        return None, None
    shuffled = torch.randperm(len(x), device=x.device, **generator_kwargs(generator))
    count = max(1, round(options.fraction * len(x)))
    return shuffled[:count], shuffled[count:]


def _probes(
    x: Tensor,
    rows: Tensor | None,
    probe: Tensor | None,
    options: LossOptions,
    generator: torch.Generator | None,
) -> Tensor:
    """Return probes (K, n, *) for the rows: the caller's, all unit vectors, or random vectors."""
    if probe is not None:
        return probe if rows is None else probe[:, rows]
    like, probes = x if rows is None else x[rows], options.probes
    return unit_vectors(like) if isinstance(probes, str) else probes.draw(like, generator)


def _check_probe(x: Tensor, probe: object, options: LossOptions) -> Tensor:
    """Return the caller's checked probe, as (K, B, *)."""
    if isinstance(probe, Tensor) and probe.ndim == x.ndim and not probe.is_nested:
        probe = probe.unsqueeze(0)
    probes = options.probes
    fewest = 2 if isinstance(probes, Paired) else 1
    count = len(probe) if isinstance(probe, Tensor) and probe.ndim == x.ndim + 1 else 1
    shape = (max(count, fewest), *x.shape)
    checked = check_like("probe", probe, shape, x.dtype, x.device, "x0 after a probe dimension")
    if isinstance(probes, str) or probes.count not in (fewest, count):
        raise ValueError(
            f"probe: expected as many vectors as probes={probes!r} asks for; got {count}. Leave "
            "out the number in probes if you pass probe."
        )
    check_finite("probe", checked)
    return checked


def _reduce(
    terms: DSMTerms,
    weights: Weights,
    factors: tuple[Tensor | None, Tensor | None],
    rows: Tensor | None,
    reduction: str,
) -> Tensor:
    """Sum the terms times their weights and factors, omitting terms whose weight is 0."""
    of_first, of_higher = factors
    if of_higher is not None and rows is not None:
        of_higher = of_higher[rows]
    copied = reduction == "none"  # so that the loss is not itself a term
    products: list[Tensor] = []
    for weight, term, factor in zip(weights, terms, (of_first, *[of_higher] * 3), strict=False):
        if term is not None and is_used(weight):
            is_one = not isinstance(weight, Tensor) and weight == 1
            product = term if is_one and not copied else weight * term
            products.append(product if factor is None else product * factor)
    if reduction == "none":
        return sum(products[1:], products[0])
    # A mean over a random fraction estimates the batch mean, so the sum is B times the mean.
    means = [product.mean() for product in products]
    mean = sum(means[1:], means[0])
    return mean if reduction == "mean" else mean * len(terms.first)
