"""Rules for what moves elements about or adds them up: the same for every component.

All dimensions are counted from the back, where an axis of the value is one of the stack.

PyTorch moves the axes of several index tensors to the front where something stands between them,
and reads lists and arrays of NumPy in ways of its own. An index with at most one tensor keeps its
place, in a stack as in its value; every other goes to PyTorch as it stands.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.aliases import share
from hosm_losses.taylor.errors import NoRule, TaylorError
from hosm_losses.taylor.registry import Function, axes, axis, every, rule
from hosm_losses.taylor.stacks import align
from hosm_losses.taylor.tensor import (
    Jet,
    call,
    jet_among,
    on_values,
    result_type,
    stacks_of,
    written,
)


def linear(move: Function, *names: str | Function, view: bool = False) -> None:
    """Register a function of a stack and of arguments whose shapes alone matter.

    Its result is noted as a `view` where PyTorch's may share the memory of its argument.
    """

    def register(function: Function) -> None:
        @rule(function, several=True, kind="linear")
        @wraps(move)
        def moved(x: Any, *args: Any, **named: Any) -> Any:
            if not isinstance(x, Jet):  # beside one that is asked for its shape, as by expand_as
                return on_values(function, (x, *args), named)
            found = move(x.stack, *args, **named)
            parts = [x.like(part) for part in (found if isinstance(found, tuple) else (found,))]
            parts = [share(x, part) for part in parts] if view else parts
            return tuple(parts) if isinstance(found, tuple) else parts[0]

    for each in every(*names):
        register(each)


def _numbers(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sizes or dimensions of a method that takes them one by one or in a sequence."""
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        return tuple(sizes[0])
    return sizes


def _axis(stack: Tensor, dim: Any) -> int:
    return axis(dim, stack.ndim - 1)


def _axes(stack: Tensor, dims: Any) -> tuple[int, ...]:
    return axes(dims, stack.ndim - 1)


# ----------------------------------------------------------------------------- views, or perhaps
def _shaped(stack: Tensor, *sizes: Any, shape: Any = None) -> Tensor:
    return stack.reshape(len(stack), *_numbers(sizes or (shape,)))


def _viewed(stack: Tensor, *shape: Any, size: Any = None, dtype: Any = None) -> Tensor:
    given = _numbers(shape or (size if dtype is None else dtype,))
    if isinstance((*given, None)[0], torch.dtype):
        raise TaylorError("view: another dtype for the same bits has no derivative.")
    return stack.reshape(len(stack), *given)


def _expanded(stack: Tensor, *sizes: Any) -> Tensor:
    sizes = _numbers(sizes)
    return align(stack, len(sizes)).expand(len(stack), *sizes)


def _permuted(stack: Tensor, *dims: Any) -> Tensor:
    return stack.permute(0, *(dim + stack.ndim for dim in _axes(stack, _numbers(dims))))


def _transposed(stack: Tensor) -> Tensor:
    if stack.ndim < 3:
        raise NoRule
    return stack.mT


def _reversed(stack: Tensor) -> Tensor:
    return stack.permute(0, *range(stack.ndim - 1, 0, -1))


def _turned(stack: Tensor) -> Tensor:
    if stack.ndim > 3:
        raise NoRule
    return _reversed(stack)


def _squeezed(stack: Tensor, dim: Any = None) -> Tensor:
    if dim is None:
        dim = [axis for axis, size in enumerate(stack.shape[1:]) if size == 1]
    return stack.squeeze(_axes(stack, dim)) if dim != [] else stack


def _copied(stack: Tensor, memory_format: Any = None) -> Tensor:
    if memory_format is torch.contiguous_format:
        return stack.clone(memory_format=torch.contiguous_format)
    return stack.clone()


def _contiguous(stack: Tensor, memory_format: Any = None) -> Tensor:
    return stack if memory_format is None else _copied(stack, memory_format)


VIEWS = {
    "reshape": _shaped,
    "reshape_as view_as": lambda stack, other: _shaped(stack, *other.shape),
    "view": _viewed,
    "expand": _expanded,
    "expand_as": lambda stack, other: _expanded(stack, *other.shape),
    "contiguous": _contiguous,
    "permute": _permuted,
    "t": _turned,
    "adjoint": _transposed,
    "squeeze": _squeezed,
    "unsqueeze": lambda stack, dim: stack.unsqueeze(axis(dim, stack.ndim)),
    "transpose swapaxes swapdims": lambda stack, dim0, dim1: stack.transpose(
        _axis(stack, dim0), _axis(stack, dim1)
    ),
    "flatten": lambda stack, start_dim=0, end_dim=-1: stack.flatten(
        _axis(stack, start_dim), _axis(stack, end_dim)
    ),
    "unflatten": lambda stack, dim, sizes: stack.unflatten(_axis(stack, dim), sizes),
    "narrow": lambda stack, dim, start, length: stack.narrow(_axis(stack, dim), start, length),
    "select": lambda stack, dim, index: stack.select(_axis(stack, dim), index),
    "unbind": lambda stack, dim=0: tuple(stack.unbind(_axis(stack, dim))),
    "chunk": lambda stack, chunks, dim=0: tuple(stack.chunk(chunks, _axis(stack, dim))),
    "split": lambda stack, size, dim=0: tuple(stack.split(size, _axis(stack, dim))),
    "split_with_sizes": lambda stack, split_sizes, dim=0: tuple(
        stack.split_with_sizes(split_sizes, _axis(stack, dim))
    ),
}


# ---------------------------------------------------------------------------------- new elements
def _reduced(reduce: Function) -> Function:
    """A sum or a mean over all axes of the value, or over some."""

    def reduced(
        stack: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
    ) -> Tensor:
        # Integers have no derivatives, and a number has no axes.
        if stack.ndim == 1 or not (dtype is None or dtype.is_floating_point):
            raise NoRule
        return reduce(stack, _axes(stack, dim), keepdim, dtype=dtype)

    return reduced


def _summed_up(stack: Tensor, dim: Any, *, dtype: Any = None) -> Tensor:
    if not (dtype is None or dtype.is_floating_point):
        raise NoRule
    return stack.cumsum(_axis(stack, dim), dtype=dtype)


def _repeated(stack: Tensor, *sizes: Any) -> Tensor:
    sizes = _numbers(sizes)
    if len(sizes) < stack.ndim - 1:
        raise NoRule
    return align(stack, len(sizes)).repeat(1, *sizes)


def _tiled(stack: Tensor, *sizes: Any) -> Tensor:
    """As `_repeated`, but the first axes may be left out."""
    sizes = _numbers(sizes)
    return _repeated(stack, *(1,) * (stack.ndim - 1 - len(sizes)), *sizes)


def _rolled(stack: Tensor, shifts: Any, dims: Any) -> Tensor:
    if dims is None or dims == ():  # of all elements in a row
        raise NoRule
    return stack.roll(shifts, _axes(stack, dims))


def _gathered(stack: Tensor, dim: Any, index: Any) -> Tensor:
    if isinstance(index, Jet) or index.ndim != stack.ndim - 1 or not index.ndim:
        raise NoRule
    return stack.gather(_axis(stack, dim), index.expand(len(stack), *index.shape))


def _padded(stack: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    ndim = stack.ndim - 1
    if mode != "constant" and ndim > 2 and len(pad) <= 2 * (ndim - 1):
        return of_samples(stack, lambda samples: F.pad(samples, pad, mode))
    if mode != "constant" or len(pad) > 2 * ndim:  # others know a batch, and no components
        raise NoRule
    if not value:
        return F.pad(stack, pad)
    # The derivatives of a number are zero.
    return torch.cat([F.pad(stack[:1], pad, value=value), F.pad(stack[1:], pad)])


def of_samples(stack: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function that treats every sample alone, with the components as more samples."""
    return function(stack.flatten(0, 1)).unflatten(0, stack.shape[:2])


NEW = {
    "sum": _reduced(torch.sum),
    "mean": _reduced(torch.mean),
    "cumsum": _summed_up,
    "neg negative __neg__": lambda stack: -stack,
    "clone": _copied,
    "repeat": _repeated,
    "tile": _tiled,
    "repeat_interleave": lambda stack, repeats, dim, *, output_size=None: stack.repeat_interleave(
        repeats, _axis(stack, dim), output_size=output_size
    ),
    "roll": _rolled,
    "flip": lambda stack, *places, dims=None: stack.flip(
        _axes(stack, _numbers(places or (dims,)))
    ),
    "gather": _gathered,
    "index_select": lambda stack, dim, index: stack.index_select(_axis(stack, dim), index),
    "pad": _padded,
}
for _table in (VIEWS, NEW):
    for _names, _move in _table.items():
        linear(_move, _names, view=_table is VIEWS)
linear(_reversed, Tensor.T.__get__, view=True)  # pyright: ignore[reportAttributeAccessIssue]
linear(_transposed, Tensor.mT.__get__, view=True)  # pyright: ignore[reportAttributeAccessIssue]


_PIXELS, _TOPK = tuple(every("pixel_shuffle pixel_unshuffle")), tuple(every("topk"))


@rule(
    "avg_pool1d avg_pool2d avg_pool3d interpolate upsample pixel_shuffle pixel_unshuffle",
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    kind="linear",
    told=True,
)
def _by_samples(function: Function, x: Jet, *args: Any, **named: Any) -> Jet:
    # Of one sample, the components would be more channels.
    if x.ndim < 4 and function in _PIXELS:
        raise NoRule
    return x.like(of_samples(x.stack, lambda samples: function(samples, *args, **named)))


@rule("dropout dropout1d dropout2d dropout3d", kind="linear", told=True)
def _dropped(
    function: Function, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0:
        return x
    # One mask for the value and its derivatives.
    found = x.like(x.stack * function(torch.ones_like(x.stack[0]), p, True))
    return written(x, found) if inplace else found


@rule(torch.broadcast_tensors, several=True, kind="linear")
def _broadcast(*tensors: Any) -> tuple[Any, ...]:
    shape = torch.broadcast_shapes(*(each.shape for each in tensors))
    return tuple(
        call(Tensor.expand, (each, shape), {}) if isinstance(each, Jet) else each.expand(shape)
        for each in tensors
    )


@rule(Tensor.__iter__, kind="linear")
def _iterator(x: Jet) -> Any:
    if x.ndim == 0:
        raise NoRule
    return iter([share(x, x.like(row)) for row in x.stack.unbind(1)])


# ------------------------------------------------------------------------------- several tensors
@rule("cat concat concatenate", several=True, kind="linear")
def _cat(tensors: Any, dim: int = 0) -> Jet:
    # PyTorch passes over an empty tensor of one axis, of which caches of keys make use.
    kind = jet_among(tensors).dtype
    tensors = [each for each in tensors if each.shape != (0,) or each.dtype != kind]
    if not any(isinstance(each, Jet) for each in tensors):  # as where the only one is empty
        raise NoRule
    ndim = tensors[0].ndim
    if any(each.ndim != ndim for each in tensors):
        raise NoRule
    return jet_among(tensors).like(torch.cat(stacks_of(tensors), axis(dim, ndim)))


@rule(torch.stack, several=True, kind="linear")
def _stack(tensors: Any, dim: int = 0) -> Jet:
    place = axis(dim, tensors[0].ndim + 1)
    return jet_among(tensors).like(torch.stack(stacks_of(tensors), place))


def _chosen(condition: Any, a: Any, b: Any, dtype: torch.dtype | None = None) -> Jet:
    """The elements of a where a mask holds and those of b elsewhere, of each component."""
    known = all(isinstance(each, Tensor | float | int) for each in (a, b))
    if not known or not isinstance(condition, Tensor) or condition.dtype != torch.bool:
        raise NoRule
    if not isinstance(a, Jet) and not isinstance(b, Jet):
        raise NoRule
    jet = jet_among((a, b))
    if dtype is None:
        dtype = result_type(a, b)
    tensors = [
        each if isinstance(each, Tensor) else jet.stack.new_full((), each) for each in (a, b)
    ]
    ndim = max(condition.ndim, *(each.ndim for each in tensors))
    stacks = (align(stack, ndim) for stack in stacks_of(tensors))
    return jet.like(torch.where(condition, *stacks).to(dtype))


@rule(torch.where, several=True, kind="linear")
def _where(condition: Any, a: Any, b: Any) -> Jet:
    return _chosen(condition, a, b)


@rule(Tensor.where, several=True, kind="linear")
def _where_of(a: Any, condition: Any, b: Any) -> Jet:
    return _chosen(condition, a, b)


@rule("masked_fill", several=True, kind="linear")
def masked_fill(x: Any, mask: Any, value: Any) -> Jet:
    """x with a number in its place where a mask holds."""
    if (isinstance(value, Tensor) and value.ndim) or not x.is_floating_point():
        raise NoRule
    return _chosen(mask, value, x, x.dtype)


_INDICES = (torch.bool, torch.int64, torch.int32)


@rule(Tensor.__getitem__, kind="linear")
def _item(x: Any, index: Any) -> Any:
    parts = picks(index)
    if parts is None:
        raise NoRule
    found = x.like(picked(x.stack, parts))
    return share(x, found) if all(map(_keeps, parts)) else found


def picks(index: Any) -> tuple[Any, ...] | None:
    """The parts of an index that picks the same of every component; None where that is unsure."""
    parts = index if isinstance(index, tuple) else (index,)
    gathers = [part for part in parts if not _slices(part)]
    return parts if len(gathers) <= 1 and all(map(_gathers, gathers)) else None


def picked(stack: Tensor, parts: tuple[Any, ...]) -> Tensor:
    """What an index with these parts picks of every component."""
    return stack[(slice(None), *parts)]


def _slices(part: Any) -> bool:
    """Whether a part of an index is a place, a slice, a new axis or the dots."""
    if isinstance(part, bool):  # which makes a new axis, and is read as a mask
        return False
    return part is None or part is Ellipsis or isinstance(part, int | slice)


def _keeps(part: Any) -> bool:
    """Whether a part of an index makes a view: not a tensor of several places."""
    place = isinstance(part, Tensor) and part.ndim == 0 and part.dtype != torch.bool
    return place or _slices(part)


def _gathers(part: Any) -> bool:
    """Whether a part of an index is a tensor, or a list that PyTorch reads as one."""
    if isinstance(part, list):
        return all(isinstance(each, int) and not isinstance(each, bool) for each in part)
    return isinstance(part, Tensor) and not isinstance(part, Jet) and part.dtype in _INDICES


@rule("topk sort", kind="linear", told=True)
def _ordered(function: Function, x: Jet, *args: Any, **named: Any) -> Any:
    found = function(x.stack[0], *args, **named)
    places = 1 if function in _TOPK else 0  # of the arguments before the dimension
    dim = named.get("dim", named.get("axis", args[places] if len(args) > places else -1))
    stack = x.stack.gather(
        axis(dim, x.ndim), found.indices.expand(len(x.stack), *found.indices.shape)
    )
    return type(found)((x.like(stack), found.indices))


@rule("scatter_add", several=True, kind="linear")
def _scatter_add(x: Any, dim: Any, index: Tensor, src: Any) -> Jet:
    if index.shape != src.shape:  # of which PyTorch finds no gradient
        raise NoRule
    stack, added = stacks_of((x, src))
    place = axis(dim, x.ndim)
    index = index.expand(len(stack), *index.shape)
    return jet_among((x, src)).like(stack.scatter_add(place, index, added))


@rule("index_add", several=True, kind="linear")
def _index_add(x: Any, dim: Any, index: Any, source: Any, *, alpha: float = 1) -> Jet:
    stack, added = stacks_of((x, source))
    found = stack.index_add(axis(dim, x.ndim), index, added, alpha=alpha)
    return jet_among((x, source)).like(found)
