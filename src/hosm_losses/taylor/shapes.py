"""Rules for what moves elements about: the same for every component, one axis further on.

A dimension counted from the front moves by one, for the stack has an axis before the value's; one
counted from the back stays.
"""

__all__: list[str] = []

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.jet import (
    CHANGES,
    CONSTANT,
    Jet,
    TaylorError,
    aligned,
    every,
    fallback,
    keywords,
    rule,
)

_PROPERTIES = """
    size dim ndimension numel nelement stride __len__ element_size is_contiguous is_floating_point
    is_complex is_same_size get_device __hash__ __repr__ result_type
"""
_WITHOUT_SLOPE = """
    detach zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones
    new_empty new_full new_tensor lt le gt ge eq ne __lt__ __le__ __gt__ __ge__ __eq__ __ne__ isnan
    isinf isfinite argmax argmin argsort sign logical_and logical_or logical_not allclose equal all
    any is_nonzero bool long int floor ceil round
"""
CONSTANT.update(dict.fromkeys(every(*(_PROPERTIES + _WITHOUT_SLOPE).split()), True))
CONSTANT[Tensor.data.__get__] = True  # pyright: ignore[reportAttributeAccessIssue]


def _later(dim: int) -> int:
    return dim + 1 if dim >= 0 else dim


def _numbers(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """The sizes or dimensions of a method that takes them one by one or in a sequence."""
    if len(sizes) == 1 and isinstance(sizes[0], Sequence | torch.Size):
        return tuple(sizes[0])
    return sizes


def _register(names: tuple[str, ...], make: Callable[..., Any]) -> None:
    """Register make(stack, function, *args) for functions whose only Jet comes first."""
    for function in every(*names):

        def moved(x: Any, *args: Any, _function: Any = function, **named: Any) -> Any:
            if not isinstance(x, Jet):
                return fallback(_function, (x, *args), named)
            found = make(x.stack, *args, **named)
            return tuple(map(x.like, found)) if isinstance(found, tuple) else x.like(found)

        rule(function)(moved)
        moved.keywords = keywords(make)  # pyright: ignore[reportFunctionMemberAccess]


def _shaped(stack: Tensor, *shape: Any) -> Tensor:
    return stack.reshape(len(stack), *_numbers(shape))


def _viewed(stack: Tensor, *shape: Any) -> Tensor:
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        raise TaylorError("view: another dtype for the same bits has no derivative.")
    return _shaped(stack, *shape)


def _permuted(stack: Tensor, *dims: Any) -> Tensor:
    return stack.permute(0, *(dim % (stack.ndim - 1) + 1 for dim in _numbers(dims)))


def _expanded(stack: Tensor, *sizes: Any) -> Tensor:
    sizes = _numbers(sizes)
    return aligned(stack, len(sizes)).expand(len(stack), *sizes)


def _repeated(stack: Tensor, *sizes: Any) -> Tensor:
    sizes = _numbers(sizes)
    return aligned(stack, len(sizes)).repeat(1, *sizes)


def _squeezed(stack: Tensor, dim: Any = None) -> Tensor:
    if dim is None:
        return stack.reshape(len(stack), *(size for size in stack.shape[1:] if size != 1))
    return stack.squeeze(tuple(map(_later, dim)) if isinstance(dim, Sequence) else _later(dim))


def _reduced(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A sum or a mean over all axes of the value, or over some."""

    def reduced(stack: Tensor, dim: Any = None, keepdim: bool = False, **named: Any) -> Tensor:
        if dim is None:
            return reduce(stack.flatten(1), 1, **named)
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        return reduce(stack, tuple(map(_later, dims)), keepdim, **named)

    return reduced


for _names, _make in {
    ("reshape",): _shaped,
    ("view",): _viewed,
    ("permute",): _permuted,
    ("expand",): _expanded,
    ("repeat", "tile"): _repeated,
    ("squeeze",): _squeezed,
    ("sum",): _reduced(torch.sum),
    ("mean",): _reduced(torch.mean),
    ("view_as", "reshape_as"): lambda stack, other: stack.reshape(len(stack), *other.shape),
    ("expand_as",): lambda stack, other: _expanded(stack, *other.shape),
    ("flatten",): lambda stack, start_dim=0, end_dim=-1: stack.flatten(
        _later(start_dim), _later(end_dim)
    ),
    ("unflatten",): lambda stack, dim, sizes: stack.unflatten(_later(dim), sizes),
    ("transpose", "swapaxes", "swapdims"): lambda stack, dim0, dim1: stack.transpose(
        _later(dim0), _later(dim1)
    ),
    ("unsqueeze",): lambda stack, dim: stack.unsqueeze(_later(dim)),
    ("chunk",): lambda stack, chunks, dim=0: tuple(stack.chunk(chunks, _later(dim))),
    ("split",): lambda stack, size, dim=0: tuple(stack.split(size, _later(dim))),
    ("unbind",): lambda stack, dim=0: tuple(stack.unbind(_later(dim))),
    ("narrow",): lambda stack, dim, start, length: stack.narrow(_later(dim), start, length),
    ("select",): lambda stack, dim, index: stack.select(_later(dim), index),
    ("repeat_interleave",): lambda stack, repeats, dim: stack.repeat_interleave(
        repeats, _later(dim)
    ),
    ("contiguous", "clone"): lambda stack, **named: (
        stack.clone(memory_format=torch.contiguous_format)
        if named.get("memory_format") is torch.contiguous_format
        else stack
    ),
    ("float",): lambda stack: stack.float(),
    ("double",): lambda stack: stack.double(),
    ("half",): lambda stack: stack.half(),
    ("bfloat16",): lambda stack: stack.bfloat16(),
    ("type_as",): lambda stack, other: stack.type_as(other),
}.items():
    _register(_names, _make)


@rule(Tensor.requires_grad.__get__)  # pyright: ignore[reportAttributeAccessIssue]
def _requires_grad(x: Jet) -> bool:  # noqa: ARG001
    """As in the engine that goes backward, so that a checkpoint does not warn."""
    return True


@rule(Tensor.mT.__get__, *every("adjoint"))  # pyright: ignore[reportAttributeAccessIssue]
def _transposed(x: Jet) -> Jet:
    return x.like(x.stack.mT)


@rule(Tensor.T.__get__, *every("t"))  # pyright: ignore[reportAttributeAccessIssue]
def _reversed(x: Jet) -> Jet:
    return x.like(x.stack.permute(0, *range(x.ndim, 0, -1)))


@rule(*every("to"))
def _to(x: Any, *args: Any, **named: Any) -> Any:
    given: list[Any] = [each.stack if isinstance(each, Jet) else each for each in args]
    if not isinstance(x, Jet):  # a plain tensor in the dtype of a Jet
        return x.to(*given, **named)
    named.pop("memory_format", None)
    return x.like(x.stack.to(*given, **named))


@rule(Tensor.type)
def _type(x: Jet, dtype: Any = None, **named: Any) -> Any:
    found = x.stack.type(dtype, **named)
    return x.like(found) if isinstance(found, Tensor) else found


@rule(Tensor.__getitem__)
def _item(x: Any, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    gathers = sum(isinstance(part, Tensor | list) for part in parts)
    # Two index tensors would move their axes before that of the components.
    if not isinstance(x, Jet) or gathers > 1:
        return fallback(Tensor.__getitem__, (x, index), {})
    return x.like(x.stack[(slice(None), *parts)])


@rule(Tensor.__iter__)
def _iterator(x: Jet) -> Any:
    return iter([x.like(part) for part in x.stack.unbind(1)])


def _stacks(tensors: Any) -> tuple[Jet, list[Tensor]]:
    """Equally long stacks of Jets and plain tensors, and one of the Jets."""
    jets = [each for each in tensors if isinstance(each, Jet)]
    count = max(len(jet.stack) for jet in jets)
    found = []
    for each in tensors:
        stack = each.stack if isinstance(each, Jet) else each.unsqueeze(0)
        if len(stack) < count:
            zeros = stack.new_zeros(count - len(stack), *stack.shape[1:])
            stack = torch.cat([stack, zeros])
        found.append(stack)
    return jets[0], found


@rule(*every("cat", "concat", "concatenate"))
def _cat(tensors: Any, dim: int = 0) -> Jet:
    jet, stacks = _stacks(tensors)
    return jet.like(torch.cat(stacks, _later(dim)))


@rule(*every("stack"))
def _stack(tensors: Any, dim: int = 0) -> Jet:
    jet, stacks = _stacks(tensors)
    return jet.like(torch.stack(stacks, _later(dim)))


def _rows(function: Callable[..., Any]) -> None:
    """Register a linear function that treats every sample alone, the components as samples."""

    def folded(x: Any, *args: Any, **named: Any) -> Any:
        if not isinstance(x, Jet) or x.ndim < 3:
            return fallback(function, (x, *args), named)
        found = function(x.stack.flatten(0, 1), *args, **named)
        return x.like(found.unflatten(0, x.stack.shape[:2]))

    rule(function)(folded)


for _function in every(
    *("interpolate", "upsample", "avg_pool1d", "avg_pool2d", "avg_pool3d", "pixel_shuffle"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "pixel_unshuffle"),
):
    _rows(_function)


def _dropping(function: Callable[..., Any]) -> None:
    """Register a dropout by its own mask, of elements or of channels."""

    def dropped(x: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
        if inplace:
            raise TaylorError(f"dropout: {CHANGES}")
        if not training or p == 0:
            return x
        # One mask for the value and its derivatives.
        return x.like(x.stack * function(torch.ones_like(x.stack[0]), p))

    rule(function)(dropped)


for _function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
    _dropping(_function)


@rule(F.pad)
def _pad(x: Jet, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    if value or x.ndim < 3:
        return fallback(F.pad, (x, pad, mode, value), {})
    padded = F.pad(x.stack.flatten(0, 1), pad, mode)
    return x.like(padded.unflatten(0, x.stack.shape[:2]))


@rule(*every("where"))
def _where(condition: Any, a: Any = None, b: Any = None) -> Any:
    """Of each component, where a number or a plain tensor has derivatives of zero."""
    jet = a if isinstance(a, Jet) else b
    if not isinstance(jet, Jet) or isinstance(condition, Jet):
        return fallback(torch.where, (condition, a, b), {})
    tensors = [
        each if isinstance(each, Tensor) else jet.stack.new_full((), each) for each in (a, b)
    ]
    ndim = max(condition.ndim, *(each.ndim for each in tensors))
    _, stacks = _stacks(tensors)
    return jet.like(torch.where(condition, *(aligned(stack, ndim) for stack in stacks)))


@rule(*every("masked_fill"))
def _masked_fill(x: Any, mask: Any, value: Any) -> Any:
    return _where(mask, value, x)
