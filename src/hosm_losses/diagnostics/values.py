"""What has to hold of a network's values before its derivatives can be compared with differences.

The output is finite and depends on the arguments and the seed alone. Every sample is treated
alone: one is kept and the others, with their times, are replaced, so that the batch keeps its size
and dropout its mask. Then the samples are permuted, and one of them repeated in the place of all,
with all that is taken to belong to them: a set that they share is the same when permuted. It is
not done if the network draws random numbers, which go by place.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosm_losses._checks import DerivativeError
from hosm_losses.diagnostics.differences import TOLERANCE, random_like, reseed, size_of
from hosm_losses.diagnostics.localize import evaluate, floats_in, record_calls
from hosm_losses.model import BoundModel, per_sample

# Of the size of an output, what sums in another order may change.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
ATTEMPTS = 64
IN_FLOAT32 = "Check a float32 copy, with its own switches to half precision off."
ALONE = (
    "Take no mean, norm or attention over the first dimension, which is the samples': use "
    "GroupNorm or LayerNorm in place of batch norm, or .eval() on it; nn.MultiheadAttention and "
    "recurrent layers want batch_first=True."
)


def check_values(field: BoundModel, x: Tensor) -> torch.dtype:
    """Return the precision in which a network works, if its values are finite and determined."""
    value = evaluate(field, x)
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        where = _first_module(field, x, lambda tensor: not bool(torch.isfinite(tensor).all()))
        raise DerivativeError(
            f"network: expected finite values; got {bad} NaN or infinite of {value.numel()}, "
            f"first in {where}. Check its weights, and the range of x0, t and model_kwargs."
        )
    _check_deterministic(field, x)
    precision = _precision(field, x)
    if precision not in TOLERANCE:
        where = _first_module(field, x, lambda tensor: tensor.dtype == precision)
        raise TypeError(
            "network: expected one that works in float32 or float64, in which differences mean "
            f"something; got {precision}, in {where}. {IN_FLOAT32}"
        )
    return precision


def _first_module(field: BoundModel, x: Tensor, has: Callable[[Tensor], bool]) -> str:
    """The first module that returns a tensor of which this holds."""
    for call in record_calls(field, x):
        if any(map(has, floats_in(call.returned))):
            return call.where
    return "its own forward"


def _check_deterministic(field: BoundModel, x: Tensor) -> None:
    """Raise where the same input, seed and parameters do not give the same output."""
    network: object = field.model.network
    buffers = dict(network.named_buffers()) if isinstance(network, nn.Module) else {}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    first, second = evaluate(field, x), evaluate(field, x)
    if torch.equal(first, second):
        return
    changed = [name for name, buffer in buffers.items() if not torch.equal(buffer, before[name])]
    if changed:
        raise DerivativeError(
            "network: expected an output that depends on x, t and the parameters alone; got one "
            f"that changes with the buffers {', '.join(changed)}, which every call updates. "
            "Freeze them while you train, by module.eval() or the module's own switch."
        )
    if float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
        raise DerivativeError(
            "network: expected the same output for the same input and seed; got another. Make it "
            "draw from torch's generators only, and use deterministic operators."
        )


class _Dtypes(TorchFunctionMode):
    """Collects dtypes while it is on."""

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


def _precision(field: BoundModel, x: Tensor) -> torch.dtype:
    """The least precise dtype of what depends on x or on a trained parameter."""
    reseed(x)
    with _Dtypes() as dtypes:
        value = field.native(x.clone().requires_grad_())
    return max(dtypes.seen | {x.dtype, value.dtype}, key=lambda dtype: torch.finfo(dtype).eps)


def check_samples(field: BoundModel, x: Tensor, precision: torch.dtype) -> None:
    """Raise where samples see each other, or do not go with what is taken to belong to them."""
    if len(x) < 2:
        return
    rounding = ROUNDING[precision]
    value = evaluate(field, x)
    for kept in (0, len(x) - 1):
        around, t = x + size_of(x) * random_like(x, seed=2)(x), field.t.roll(1, 0)
        around[kept], t[kept] = x[kept], field.t[kept]
        others = replace(field, t=t)
        if _same(evaluate(others, around)[kept], value[kept], rounding):
            continue
        where = _first_difference((field, x), (others, around), kept, rounding)
        raise DerivativeError(
            "network: expected every sample to be treated alone; got an output that changes with "
            f"the other samples of the batch, in {where}. {ALONE}"
        )
    check_rows(field, x, precision)


def check_rows(field: BoundModel, x: Tensor, precision: torch.dtype | None = None) -> None:
    """Raise where outputs do not follow their samples, with what is taken to belong to them."""
    precision = _precision(field, x) if precision is None else precision
    value = evaluate(field, x)
    if precision in ROUNDING and torch.equal(evaluate(field, x, seed=1), value):
        _check_permuted(field, x, value, ROUNDING[precision])


def _same(one: Tensor, other: Tensor, rounding: float) -> bool:
    size = max(float(one.double().norm()), float(other.double().norm()))
    return float((one.double() - other.double()).norm()) <= rounding * size


def _first_difference(
    one: tuple[BoundModel, Tensor], other: tuple[BoundModel, Tensor], kept: int, rounding: float
) -> str:
    """The innermost module that was given the same for the kept sample and returned another."""
    batch = len(one[1])

    def row(tensor: Tensor) -> Tensor:
        own = tensor.ndim and len(tensor) % batch == 0 and tensor.numel()
        return tensor.reshape(batch, -1)[kept] if own else tensor

    def same(left: object, right: object) -> bool:
        pairs = zip(floats_in(left), floats_in(right), strict=False)
        return all(_same(row(a), row(b), rounding) for a, b in pairs)

    for left, right in zip(record_calls(*one), record_calls(*other), strict=False):
        if left.name != right.name:
            break
        if same(left.arguments, right.arguments) and not same(left.returned, right.returned):
            return left.where
    return "its own forward"


def _check_permuted(field: BoundModel, x: Tensor, value: Tensor, rounding: float) -> None:
    places = torch.arange(len(x), device=x.device)
    moves = places.roll(1), places[:1].expand_as(places), places[-1:].expand_as(places)

    def follows(left: Collection[str]) -> bool:
        """Whether the outputs follow, if the tensors at these paths are left as they are."""
        return all(moved(left, rows) for rows in moves)

    def moved(left: Collection[str], rows: Tensor) -> bool:
        kwargs = per_sample(
            field.kwargs, lambda path, tensor: tensor if path in left else tensor[rows]
        )
        try:
            found = evaluate(replace(field, t=field.t[rows], kwargs=kwargs), x[rows])
        except (RuntimeError, ValueError, LookupError):
            return False
        return _same(found, value[rows], rounding)

    if follows(()):
        return
    paths: list[str] = []
    per_sample(field.kwargs, lambda path, tensor: paths.append(path) or tensor)
    some = (each for count in range(1, len(paths) + 1) for each in combinations(paths, count))
    for left in islice(some, ATTEMPTS):
        if follows(left):
            raise DerivativeError(
                f"{' and '.join(left)}: expected a tensor that belongs to the samples, as its "
                f"first dimension is their number, {len(x)}; got one of which they use other "
                "rows than their own. Mark what all samples share: hosm_losses.Shared(tensor)."
            )
    raise DerivativeError(
        "network: expected outputs that follow their samples when the batch is permuted, or one "
        "of them repeated; got others. Something depends on the place in the batch: the network, "
        "what it keeps from an earlier call, or a tensor of model_kwargs that belongs to the "
        "samples and is not split, or is Shared."
    )
