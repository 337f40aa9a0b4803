"""Conditions that a network's values must meet before its derivatives can be checked.

- The output is finite and depends only on the arguments and the seed.
- Samples do not affect each other: a sample's output stays the same if all others are replaced,
  together with their times, at the same batch size and dropout mask.
- If a sample is moved to another row of the batch, its output moves along. The test permutes the
  samples and, separately, fills the batch with copies of one. Every tensor that is assumed to
  belong to the samples is rearranged in the same way. If it is in fact an unordered set that all
  samples share, only the test with copies shows it. The test is skipped if the network draws
  random numbers, because these depend on a sample's position in the batch.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import chain, combinations, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosm_losses._checks import DerivativeError, error_message
from hosm_losses.diagnostics.differences import TOLERANCE, random_like, reseed, size_of
from hosm_losses.diagnostics.localize import evaluate, floats_in, record_calls
from hosm_losses.model import BoundModel, per_sample

# The allowed relative change of an output that is due to a different order of summation.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
ATTEMPTS = 64
IN_FLOAT32 = "Check a float32 copy, with its own switches to half precision off."
ALONE = (
    "Take no mean, norm or attention over the first dimension, which holds the samples: use "
    "GroupNorm or LayerNorm instead of batch norm, or call .eval() on it; nn.MultiheadAttention "
    "and recurrent layers need batch_first=True."
)


def check_values(bound: BoundModel, x: Tensor) -> torch.dtype:
    """Check that a network's values are finite and repeatable; return the network's precision."""
    value = evaluate(bound, x)
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        where = _first_module(bound, x, lambda tensor: not bool(torch.isfinite(tensor).all()))
        got = f"{bad} NaN or infinite of {value.numel()}, first in {where}"
        remedy = "Check its weights, and the range of x0, t and model_kwargs."
        raise DerivativeError(error_message("network", "finite values", value, remedy, got=got))
    _check_deterministic(bound, x)
    precision = _precision(bound, x)
    if precision not in TOLERANCE:
        where = _first_module(bound, x, lambda tensor: tensor.dtype == precision)
        expected = "a network that works in float32 or float64, which finite differences need"
        got = f"{precision}, in {where}"
        raise TypeError(error_message("network", expected, value, IN_FLOAT32, got=got))
    return precision


def _first_module(bound: BoundModel, x: Tensor, has: Callable[[Tensor], bool]) -> str:
    for call in record_calls(bound, x):
        if any(map(has, floats_in(call.returned))):
            return call.where
    return "its own forward"


def _check_deterministic(bound: BoundModel, x: Tensor) -> None:
    network: object = bound.model.network
    buffers = dict(network.named_buffers()) if isinstance(network, nn.Module) else {}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    first, second = evaluate(bound, x), evaluate(bound, x)
    if torch.equal(first, second):
        return
    changed = [name for name, buffer in buffers.items() if not torch.equal(buffer, before[name])]
    if changed:
        expected = "an output that depends on x, t and the parameters alone"
        got = f"one that changes with the buffers {', '.join(changed)}, which every call updates"
        remedy = "Freeze them while you train, by module.eval() or the module's own switch."
        raise DerivativeError(error_message("network", expected, first, remedy, got=got))
    if float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
        expected = "the same output for the same input and seed"
        remedy = "Make it draw from torch's generators only, and use deterministic operators."
        raise DerivativeError(error_message("network", expected, first, remedy, got="another"))


class _Dtypes(TorchFunctionMode):
    """A mode that collects the dtypes of tensors through which gradients may flow."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in floats_in((args, kwargs, returned)):
            # A custom autograd.Function computes with gradients off.
            if tensor.requires_grad or not torch.is_grad_enabled():
                self.seen.add(tensor.dtype)
        return returned


def _precision(bound: BoundModel, x: Tensor) -> torch.dtype:
    """Return the least precise dtype of the tensors that depend on x or a trainable parameter."""
    reseed(x)
    with _Dtypes() as dtypes:
        value = bound.native(x.clone().requires_grad_())
    return max(dtypes.seen | {x.dtype, value.dtype}, key=lambda dtype: torch.finfo(dtype).eps)


def check_samples(bound: BoundModel, x: Tensor, precision: torch.dtype) -> None:
    """Raise an error if a sample's output depends on the other samples or on their order."""
    if len(x) < 2:
        return
    rounding = ROUNDING[precision]
    value = evaluate(bound, x)
    for row in (0, len(x) - 1):
        replaced, t = x + size_of(x) * random_like(x, seed=2)(x), bound.t.roll(1, 0)
        replaced[row], t[row] = x[row], bound.t[row]
        rebound = replace(bound, t=t)
        if _same(evaluate(rebound, replaced)[row], value[row], rounding):
            continue
        where = _first_difference((bound, x), (rebound, replaced), row, rounding)
        got = f"an output that changes with the other samples of the batch, in {where}"
        expected = "samples that do not affect each other"
        raise DerivativeError(error_message("network", expected, value, ALONE, got=got))
    check_rows(bound, x, precision)


def check_rows(bound: BoundModel, x: Tensor, precision: torch.dtype | None = None) -> None:
    """Raise an error if a sample's output changes when the samples are reordered or repeated."""
    rounding = ROUNDING.get(precision or _precision(bound, x))
    value = evaluate(bound, x)
    if rounding is None or not torch.equal(evaluate(bound, x, seed=1), value):
        return
    places = torch.arange(len(x), device=x.device)
    moves = places.roll(1), places[:1].expand_as(places), places[-1:].expand_as(places)

    def follow(shared: Collection[str], rows: Tensor) -> bool:
        kwargs = per_sample(
            bound.kwargs, lambda path, tensor: tensor if path in shared else tensor[rows]
        )
        try:
            moved = evaluate(replace(bound, t=bound.t[rows], kwargs=kwargs), x[rows])
        except (RuntimeError, ValueError, LookupError):
            return False
        return _same(moved, value[rows], rounding)

    def all_follow(shared: Collection[str]) -> bool:
        """Return whether moving samples, but not `shared` tensors, moves outputs alike."""
        return all(follow(shared, rows) for rows in moves)

    if all_follow(()):
        return
    paths: list[str] = []
    per_sample(bound.kwargs, lambda path, tensor: paths.append(path) or tensor)
    subsets = chain.from_iterable(combinations(paths, n) for n in range(1, len(paths) + 1))
    for shared in islice(subsets, ATTEMPTS):
        if all_follow(shared):
            raise DerivativeError(
                f"{' and '.join(shared)}: expected a tensor with a row for each sample, as its "
                f"first dimension is the batch size, {bound.batch}; got one in which samples use "
                "rows other than their own. If all samples share it, mark it: "
                "hosm_losses.Shared(tensor)."
            )
    raise DerivativeError(
        "network: expected outputs that follow their samples when the batch is permuted or one "
        "sample is repeated; got different outputs. Something depends on the position in the "
        "batch: the network, state that it keeps from an earlier call, or a tensor of "
        "model_kwargs that belongs to the samples but is not split or is marked Shared."
    )


def _same(a: Tensor, b: Tensor, rounding: float) -> bool:
    size = max(float(a.double().norm()), float(b.double().norm()))
    return float((a.double() - b.double()).norm()) <= rounding * size


def _first_difference(
    before: tuple[BoundModel, Tensor], after: tuple[BoundModel, Tensor], row: int, rounding: float
) -> str:
    """Return the name of the first module whose results, but not arguments, differ in `row`."""
    batch = len(before[1])

    def at_row(tensor: Tensor) -> Tensor:
        has_rows = tensor.ndim and len(tensor) % batch == 0 and tensor.numel()
        return tensor.reshape(batch, -1)[row] if has_rows else tensor

    def same(left: object, right: object) -> bool:
        pairs = zip(floats_in(left), floats_in(right), strict=False)
        return all(_same(at_row(a), at_row(b), rounding) for a, b in pairs)

    for left, right in zip(record_calls(*before), record_calls(*after), strict=False):
        if left.name != right.name:
            break
        if same(left.arguments, right.arguments) and not same(left.returned, right.returned):
            return left.where
    return "its own forward"
