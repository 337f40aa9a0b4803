"""Computation of a loss: check, perturb, differentiate, form residuals, weight, reduce.

Formula, with the terms from `terms` or `paired`:
    x = α x₀ + σ ε,  loss = w₁ first + w₂ second + w_t trace + w₃ third, averaged over the batch

With antithetic=True, the noisy batch has 2B rows: B rows with +ε, then B rows with −ε, at the same
times and with the same probes and conditions. Each loss term for a sample is the mean of the
term's values for the sample's two rows.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hosm_losses._checks import (
    at_least_float32,
    check_finite,
    check_like,
    check_model_kwargs,
    check_sample_batch,
    generator_kwargs,
    noised,
)
from hosm_losses._torch_internals import (
    is_traced,
    outside_inference_mode,
    versions,
)
from hosm_losses.losses.options import (
    ORDERS,
    LossOptions,
    NamedWeights,
    check_weights,
    is_used,
    needed_order,
)
from hosm_losses.losses.paired import paired_terms
from hosm_losses.losses.targets import Targets, check_conditions, check_targets
from hosm_losses.losses.terms import (
    DSMTerms,
    NoisyBatch,
    Terms,
    check_result,
    first_residual,
    first_term,
    squared_terms,
)
from hosm_losses.losses.times import ends_of
from hosm_losses.losses.weighting import check_time_sampler, draw_time, time_factors
from hosm_losses.model import (
    BoundModel,
    ScoreModel,
    bind_model,
    check_model,
    check_time,
    refuse_wrapped,
)
from hosm_losses.probes import Paired, unit_vectors


class Perturbed(NamedTuple):
    """A noisy batch of B samples, and the terms that are computed from it.

    With antithetic noise, the batch and the conditions have 2B rows.
    """

    model: BoundModel
    batch: NoisyBatch
    options: LossOptions
    weights: NamedWeights
    order: int  # the highest order whose terms are needed

    def rows(self, rows: Tensor) -> "Perturbed":
        """Return the samples at `rows`, (n,)."""
        if self.options.antithetic:
            rows = torch.cat([rows, len(self.batch.x) // 2 + rows])
        return self._replace(model=self.model.rows(rows), batch=self.batch.at(rows))

    def first_term(self, residual: Tensor) -> Tensor:
        """Return the first term of each sample for the residuals r1 of all rows."""
        return self._of_samples({"first": first_term(residual, self.batch.dimensions)})["first"]

    def first(self) -> Tensor:
        """Evaluate the network, and return the first term of each sample."""
        prediction = self.model.native(self.batch.x)
        return self.first_term(first_residual(self.model, self.batch, prediction))

    def terms(self, v: Tensor) -> Terms:
        """Return all terms of each sample for probes v, (K, B, *)."""
        probes = torch.cat([v, v], 1) if self.options.antithetic else v
        given = self.model, self.batch, probes, self.order, self.options
        if isinstance(self.options.probes, Paired):
            terms = paired_terms(*given, second=is_used(self.weights["second"]))
        else:
            terms = squared_terms(*given)
        return self._of_samples(terms)

    def _of_samples(self, terms: Terms) -> Terms:
        """Average the terms of the two rows of each sample if the noise is antithetic."""
        if not self.options.antithetic:
            return terms
        return {name: term.reshape(2, -1).mean(0) for name, term in terms.items()}


class LossAndTerms(NamedTuple):
    """A loss, its terms, the times of the batch, and the rows with higher-order terms."""

    loss: Tensor  # reduced
    terms: Callable[[], DSMTerms]  # per sample, with their graph; most callers need only the loss
    t: Tensor  # (B,)
    rows: Tensor | None  # those with higher-order terms, in the terms' order; None for all rows


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
    time_sampler: Any = None,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LossAndTerms:
    """Return the loss, and a function that returns its terms.

    Random values are drawn in the order t, ε, rows, v. Values that the caller passes are not
    drawn.
    """
    kwargs, higher = check_model_kwargs(model_kwargs), options.order > 1
    check_time_sampler(time_sampler)
    targets = check_targets(targets, tensor=not higher)
    with outside_inference_mode():
        score_model, x0 = check_model(model), check_sample_batch("x0", x0)
        spread = None
        if t is None:
            time, spread = draw_time(score_model, x0, options.weighting, generator, time_sampler)
        else:
            time = check_time(score_model, x0, t)
        if isinstance(targets, Tensor):
            targets = _check_tensor_targets(targets, x0, t, noise, options)
        noisy = _prepare(
            score_model, x0, time, options, noise, targets, weights, generator, kwargs
        )
        v = _check_probe(x0, probe, options) if higher and probe is not None else None
        how = {"from_schedule": t is None and time_sampler == "schedule", "order": noisy.order}
        factors = time_factors(score_model, x0, time, options.weighting, spread, **how)
        if higher and not torch.compiler.is_compiling():
            refuse_wrapped(score_model.network)
        rows = None
        if noisy.order == 1:
            # A single call to the network without primitives or copies, as in any trainer.
            bound, batch = noisy.model, noisy.batch
            prediction = score_model.predict(batch.x, batch.t, **bound.kwargs)
            residual = first_residual(bound, batch, prediction)
            terms = partial(_first_alone, noisy, residual)
            if factors[0] is None and options.reduction == "mean":
                reduced = {"first": residual.square()}  # a single mean, as in any trainer
            else:
                reduced = {"first": noisy.first_term(residual)}
        else:
            rows, remaining = _select_rows(x0, options, generator)
            v = _probes(x0, rows, v, options, generator)
            reduced = (noisy if rows is None else noisy.rows(rows)).terms(v)
            if rows is not None and remaining is not None:
                reduced["first"] = _first_of_all(reduced["first"], noisy, rows, remaining)
            terms = partial(DSMTerms, **reduced)
        loss = _reduce(reduced, noisy.weights, factors, rows, options.reduction)
        check_result(loss, terms, time)
    # The return statement is outside the block, because torch.compile only resumes a graph in a
    # block with a single exit.
    return LossAndTerms(loss, terms, time, rows)


def _first_alone(noisy: Perturbed, residual: Tensor) -> DSMTerms:
    return DSMTerms(noisy.first_term(residual))


class RowLosses(nn.Module):
    """A module that computes the loss of a single sample; its parameters are those of `model`."""

    def __init__(self, model: ScoreModel, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, index: Tensor) -> Tensor:
        """Return the loss of the sample at `index` (1,), as a 0-dim tensor."""
        return self._loss(index)


def row_losses(
    model: ScoreModel,
    x0: Tensor,
    options: LossOptions,
    t: Tensor,
    rows: Tensor,
    *,
    targets: object,
    weights: object,
    generator: torch.Generator,
    model_kwargs: Mapping[str, Any] | None,
) -> RowLosses:
    """Return a module that maps an index i < n to the loss of sample rows[i], for `rows` (n,).

    `t` has the shape (B,), and the targets are computed from the whole batch. The terms are not
    multiplied by the factor that corrects for the time sampler. `fraction` is ignored: the higher
    terms are computed for every sample in `rows`.
    """
    kwargs, targets = check_model_kwargs(model_kwargs), check_targets(targets, tensor=False)
    noisy = _prepare(model, x0, t, options, None, targets, weights, generator, kwargs)
    spread = ends_of(model.schedule)[1] if options.is_uniform else None
    factors = time_factors(model, x0, t, options.weighting, spread, order=noisy.order)
    v = None if noisy.order == 1 else _probes(x0, rows, None, options, generator)
    noisy = noisy.rows(rows)
    of_first, of_higher = (None if factor is None else factor[rows] for factor in factors)

    def loss(index: Tensor) -> Tensor:
        own = noisy.rows(index)
        terms = {"first": own.first()} if v is None else own.terms(v[:, index])
        first, higher = (None if f is None else f[index] for f in (of_first, of_higher))
        return _reduce(terms, noisy.weights, (first, higher), None, "sum")

    return RowLosses(model, loss)


def _prepare(
    model: ScoreModel,
    x0: Tensor,
    t: Tensor,
    options: LossOptions,
    noise: object,
    targets: Targets,
    weights: object,
    generator: torch.Generator | None,
    kwargs: dict[str, Any],
) -> Perturbed:
    batch = perturb(model, x0, t, _noise(x0, noise, options, generator), targets, kwargs)
    checked = _weights(weights, options, batch.dimensions)
    bound = bind_model(model, len(x0), kwargs, t)
    check_conditions(targets, bound.kwargs)
    if options.antithetic:
        bound = bound.repeat(2)
    return Perturbed(bound, batch, options, checked, needed_order(options.order, checked))


def _check_tensor_targets(
    targets: Tensor, x0: Tensor, t: object, noise: object, options: LossOptions
) -> Tensor:
    targets = _like_data("targets", targets, x0).detach()
    if t is None or noise is None:
        raise ValueError(
            "targets: expected t and noise beside a tensor, which belongs to one x = α x0 + σ ε; "
            "got None for one of them, which would be drawn. Pass those of the tensor."
        )
    if options.antithetic:
        raise ValueError(
            "targets: expected None, AveragedTargets(...) or TargetScores(...) with "
            "antithetic=True; got a tensor, which belongs to +ε alone. Set antithetic=False, and "
            "pass x0, t, the noises and the targets of both halves."
        )
    return targets


def _noise(
    x0: Tensor, noise: object, options: LossOptions, generator: torch.Generator | None
) -> Tensor:
    """Return ε (B, *) or, with antithetic noise, +ε followed by −ε (2B, *)."""
    if noise is None:
        eps = torch.randn(
            x0.shape, device=x0.device, dtype=x0.dtype, **generator_kwargs(generator)
        )
    else:
        eps = _like_data("noise", noise, x0)
    return torch.cat([eps, -eps]) if options.antithetic else eps


def perturb(
    model: ScoreModel,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    targets: Targets,
    kwargs: dict[str, Any],
) -> NoisyBatch:
    """Return x = α(t) x₀ + σ(t) ε and its targets, with q x already subtracted (see `terms`).

    If ε contains more rows than x₀ and t, then x₀ and t are repeated to match ε.
    """
    data, moments = x0, None
    if len(eps) != len(x0):
        count = len(eps) // len(x0)
        data, t = x0.repeat(count, *(1,) * (x0.ndim - 1)), t.repeat(count)
    alpha, sigma = model.coefficients(t, data)
    x = noised(data, eps, alpha, sigma)
    target = model.noise_without_x(t, data, eps)
    if isinstance(targets, Tensor):
        target = target + (at_least_float32(targets) - eps)
    elif targets is not None:  # the mean of the targets replaces ε, without a gradient
        moments = targets.posterior(x0, eps, alpha, sigma, kwargs)
        # Added in the dtype of the moments, because the sum may cancel nearly all of ε.
        target = target + (eps.detach() - eps) + moments.mean.reshape(eps.shape)
        target = target.to(at_least_float32(eps).dtype)
    return NoisyBatch(x.to(x0.dtype), t, target, sigma, moments)


def _like_data(name: str, value: object, x0: Tensor) -> Tensor:
    tensor = check_like(name, value, tuple(x0.shape), x0.dtype, x0.device, "x0")
    check_finite(name, tensor)
    return tensor


def _weights(weights: object, options: LossOptions, dimensions: int) -> NamedWeights:
    if weights is None and options.order > 1 and options.weighting == "likelihood":
        raise ValueError(
            "weights: expected numbers or 'paper' with weighting='likelihood', where only the "
            "first term is in nats; got None."
        )
    return check_weights(weights, options.order, dimensions)


def _first_of_all(first: Tensor, noisy: Perturbed, rows: Tensor, remaining: Tensor) -> Tensor:
    """Return the first term of all samples; call the network only on the `remaining` samples."""
    if not len(remaining):
        return torch.empty_like(first).index_copy(0, rows, first)
    graph = torch.is_grad_enabled() and not is_traced()
    trained = [p for p in noisy.model.model.parameters() if p.requires_grad and graph]
    before = versions(trained)
    others = noisy.rows(remaining).first()
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
    """Return the selected and the other rows, or (None, None) if `fraction` is 1."""
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
    """Check the caller's probe, and return it with shape (K, B, *)."""
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
    terms: Terms,
    weights: NamedWeights,
    factors: tuple[Tensor | None, Tensor | None],
    rows: Tensor | None,
    reduction: str,
) -> Tensor:
    of_first, of_higher = factors
    if of_higher is not None and rows is not None:
        of_higher = of_higher[rows]
    copied = reduction == "none"  # so that the loss is not itself a term
    products: list[Tensor] = []
    for name, order in ORDERS.items():
        if name in terms and is_used(weight := weights[name]):
            term, factor = terms[name], of_first if order == 1 else of_higher
            is_one = not isinstance(weight, Tensor) and weight == 1
            product = term if is_one and not copied else weight * term
            products.append(product if factor is None else product * factor)
    if reduction == "none":
        return sum(products[1:], products[0])
    # A mean over a random fraction estimates the batch mean, so the sum is B times the mean.
    means = [product.mean() for product in products]
    mean = sum(means[1:], means[0])
    return mean if reduction == "mean" else mean * len(terms["first"])
