r"""The terms of the loss, per sample: squares of the residuals.

Formula, d the number of elements of a sample:
    first = ‖r1‖²/d      second = ‖r2‖²/d²      trace = rt²/d²      third = ‖r3‖²/d³

    averaged over probes. With the sliced estimator third = (u·r3)²/d³.

Random or exact probes:
    With probes="exact" the terms are ‖M₂‖²_F, (tr M₂)² and ‖R₃‖² of the whole Jacobian and of the
    gradient of its trace. With random ones the second term has the same mean; the trace and third
    terms have a mean that is larger by the spread over probes, which is zero at the true score.
    For a field free to take any value the minimiser is the same; for a restricted family it need
    not be.

Precision:
    Residuals and terms are float32 at least: a sum over a few thousand squares leaves the range
    of float16. The network and its derivatives keep the precision of x.
"""

__all__ = ["DSMTerms", "evaluate_terms", "first_residual_of", "first_term"]

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import at_least_float32, expand_right, over_elements
from hosm_losses.derivatives import Curved
from hosm_losses.losses.inputs import Inputs, probe_tensor
from hosm_losses.losses.options import LossOptions
from hosm_losses.losses.recompute import in_chunks
from hosm_losses.losses.residuals import (
    first_residual,
    second_residual,
    sliced_residual,
    third_residual,
    trace_residual,
)
from hosm_losses.model import NoiseField
from hosm_losses.probes import draw_probes


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


class Directions(NamedTuple):
    """The probes v (K, B, *), and u of the sliced estimator."""

    probe: Tensor
    other: Tensor | None = None


def evaluate_terms(
    field: NoiseField,
    inputs: Inputs,
    probe: object,
    options: LossOptions,
    generator: torch.Generator | None,
) -> tuple[DSMTerms, Tensor | None]:
    """The terms of order two or three, and the rows that have the higher ones; None for all.

    Args:
        field: f at the times of the batch.
        inputs: the perturbed batch.
        probe: v, (B, *) or (K, B, *); drawn if None.
        options: what is chosen once.
        generator: the source of randomness.
    """

    def directions(part: Inputs, given: object) -> Directions:
        v = probe_tensor(part.x, given, options.probes, options.distribution, generator)
        if options.order < 3 or options.third != "sliced":
            return Directions(v)
        # r3 is summed over all unit vectors before it is squared: one u for all of them.
        exact = options.probes == "exact"
        u = draw_probes(part.x, 1 if exact else len(v), options.distribution, generator)
        return Directions(v, u.expand_as(v))

    if options.fraction == 1:
        return _higher(field, inputs, directions(inputs, probe), options), None
    if probe is not None:
        probe = probe_tensor(inputs.x, probe, options.probes, options.distribution, None)
    batch = len(inputs.x)
    count = max(1, round(options.fraction * batch))
    order = torch.randperm(batch, generator=generator, device=inputs.x.device)
    chosen, rest = order[:count], order[count:]
    part = _rows(inputs, chosen)
    given = directions(part, None if probe is None else probe[:, chosen])
    terms = _higher(field.rows(chosen), part, given, options)
    first = terms.first
    if count < batch:
        first = torch.cat([first, _first(field.rows(rest), _rows(inputs, rest), options)])
    first = torch.empty_like(first).index_copy(0, order, first)
    return terms._replace(first=first), chosen


def _rows(inputs: Inputs, index: Tensor | slice) -> Inputs:
    x, t, noise, sigma, drawn = inputs
    return Inputs(x[index], t[index], noise[index], sigma[index], drawn)


def first_residual_of(field: NoiseField, inputs: Inputs) -> Tensor:
    """r1 (1, B, *), in float32 at least."""
    value = at_least_float32(field(inputs.x).unsqueeze(0))
    return first_residual(value, at_least_float32(inputs.noise))


def _first(field: NoiseField, inputs: Inputs, options: LossOptions) -> Tensor:
    def evaluate(field: NoiseField, inputs: Inputs) -> tuple[Tensor]:
        return (first_term(first_residual_of(field, inputs)),)

    return _in_parts(evaluate, field, inputs, (), options)[0]


def _higher(
    field: NoiseField, inputs: Inputs, directions: Directions, options: LossOptions
) -> DSMTerms:
    def evaluate(field: NoiseField, inputs: Inputs, *given: Tensor) -> tuple[Tensor, ...]:
        terms = terms_along(field, inputs, Directions(*given), options)
        return tuple(term for term in terms if term is not None)

    given = tuple(each for each in directions if each is not None)
    return DSMTerms(*_in_parts(evaluate, field, inputs, given, options))


def _in_parts(
    evaluate: Callable[..., tuple[Tensor, ...]],
    field: NoiseField,
    inputs: Inputs,
    directions: tuple[Tensor, ...],
    options: LossOptions,
) -> tuple[Tensor, ...]:
    if options.chunks == 1:
        return evaluate(field, inputs, *directions)
    conditions = field.conditions()
    batched = inputs[:-1]

    def of_rows(rows: slice, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, t, noise, sigma = tensors[: len(batched)]
        given = tensors[len(batched) : len(batched) + len(directions)]
        bound = field.with_conditions(tensors[len(batched) + len(directions) :]).rows(rows)
        part = _rows(Inputs(x, t, noise, sigma, inputs.drawn), rows)
        return evaluate(bound, part, *(each[:, rows] for each in given))

    tensors = (*batched, *directions, *conditions)
    return in_chunks(of_rows, options.chunks, field.model.network, tensors, len(inputs.x))


def _mean_square(residual: Tensor, *, exact: bool = False) -> Tensor:
    """‖r‖² of (K, B, *) averaged over probes, or of their sum over all unit vectors: (B,)."""
    if exact:
        residual = residual.sum(0, keepdim=True)
    return over_elements(residual.square()).mean(0)


def first_term(residual: Tensor) -> Tensor:
    """‖r1‖²/d, (B,), of r1 (K, B, *)."""
    return _mean_square(residual) / residual[0, 0].numel()


def terms_along(
    field: NoiseField, inputs: Inputs, directions: Directions, options: LossOptions
) -> DSMTerms:
    """The terms of every sample, along given directions."""
    x, noise = inputs.x, inputs.noise
    probe, other = directions
    sigma = expand_right(inputs.sigma, x)
    direction = (sigma * probe).to(x.dtype)
    second_direction = None
    if options.order == 3 and options.third != "exact":
        second_direction = direction if other is None else (sigma * other).to(x.dtype)
    derived = field.derive(
        x,
        direction,
        order=options.order,
        derivative=options.derivative,
        second_direction=second_direction,
    )
    value, directional, last = derived
    value, directional, noise, probe = map(at_least_float32, (value, directional, noise, probe))
    elements = x[0].numel()
    exact = options.probes == "exact"
    first = first_term(first_residual(value, noise))
    second = _mean_square(second_residual(value, directional, noise, probe)) / elements**2
    # Over all unit vectors ‖r2‖² is summed, but rt and r3 are summed before they are squared.
    second = second * len(probe) if exact else second
    trace = trace_residual(value, directional, noise, probe)
    trace = _mean_square(trace, exact=exact) / elements**2
    if last is None:
        return DSMTerms(first, second, trace)
    last = at_least_float32(last)
    if other is None or not isinstance(derived, Curved):
        third = third_residual(value, directional, last, noise, probe)
    else:
        other = at_least_float32(other)
        third = sliced_residual(value, directional, last, noise, probe, other)
    return DSMTerms(first, second, trace, _mean_square(third, exact=exact) / elements**3)
