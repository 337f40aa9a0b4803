"""Rules for what moves elements about: the same for every component, one axis further on.

All dimensions are counted from the back, where an axis of the value is one of the stack.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.aliases import share
from hosm_losses.taylor.along import aligned
from hosm_losses.taylor.arguments import like_samples
from hosm_losses.taylor.errors import NoRule, TaylorError
from hosm_losses.taylor.jet import Jet, call, on_values, written
from hosm_losses.taylor.table import Function, axes, axis, every, rule, rule_of_each


def _numbers(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sizes or dimensions of a method that takes them one by one or in a sequence."""
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        return tuple(sizes[0])
    return sizes


# Of the functions below, those that copy; all other results are views, or may be.
COPIES = (
    *("repeat", "tile", "sum", "mean", "clone", "neg", "repeat_interleave"),
    *("roll", "flip", "cumsum", "index_select"),
)
# Those that ask another tensor, which may be the Jet, for its shape alone.
AS_ANOTHER = ("expand_as", "view_as", "reshape_as")


def _register(
    functions: tuple[Callable[..., Any], ...], move: Callable[..., Any], copies: bool = False
) -> None:
    """Register a function of a stack and of arguments of which shapes alone matter."""

    @rule(*functions, several=True)
    @wraps(move)
    def moved(x: Any, *args: Any, **named: Any) -> Any:
        if not isinstance(x, Jet):
            if functions[0].__name__ not in AS_ANOTHER:
                raise NoRule
            return on_values(functions[0], (x, *args), named)
        found = move(x.stack, *args, **named)
        if isinstance(found, tuple):
            return tuple([share(x, x.like(part)) for part in found])
        return x.like(found) if copies else share(x, x.like(found))


def _axis(stack: Tensor, dim: Any) -> int:
    return axis(dim, stack.ndim - 1)


def _axes(stack: Tensor, dims: Any) -> tuple[int, ...]:
    return axes(dims, stack.ndim - 1)


def _shaped(stack: Tensor, *sizes: Any, shape: Any = None) -> Tensor:
    return stack.reshape(len(stack), *_numbers(sizes or (shape,)))


def _viewed(stack: Tensor, *shape: Any, size: Any = None, dtype: Any = None) -> Tensor:
    given = _numbers(shape or (size if dtype is None else dtype,))
    if isinstance((*given, None)[0], torch.dtype):
        raise TaylorError("view: another dtype for the same bits has no derivative.")
    return stack.reshape(len(stack), *given)


def _permuted(stack: Tensor, *dims: Any) -> Tensor:
    return stack.permute(0, *(dim + stack.ndim for dim in _axes(stack, _numbers(dims))))


def _flattened(stack: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    return stack.flatten(_axis(stack, start_dim), _axis(stack, end_dim))


def _swapped(stack: Tensor, dim0: int, dim1: int) -> Tensor:
    return stack.transpose(_axis(stack, dim0), _axis(stack, dim1))


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


def _expanded(stack: Tensor, *sizes: Any) -> Tensor:
    sizes = _numbers(sizes)
    return aligned(stack, len(sizes)).expand(len(stack), *sizes)


def _repeated(stack: Tensor, *sizes: Any) -> Tensor:
    sizes = _numbers(sizes)
    if len(sizes) < stack.ndim - 1:
        raise NoRule
    return aligned(stack, len(sizes)).repeat(1, *sizes)


def _tiled(stack: Tensor, *sizes: Any) -> Tensor:
    """As `_repeated`, but the first axes may be left out."""
    sizes = _numbers(sizes)
    return _repeated(stack, *(1,) * (stack.ndim - 1 - len(sizes)), *sizes)


def _rolled(stack: Tensor, shifts: Any, dims: Any) -> Tensor:
    if dims is None or dims == ():  # of all elements in a row
        raise NoRule
    return stack.roll(shifts, _axes(stack, dims))


def _summed_up(stack: Tensor, dim: Any, *, dtype: Any = None) -> Tensor:
    if not (dtype is None or dtype.is_floating_point):  # integers have no derivatives
        raise NoRule
    return stack.cumsum(_axis(stack, dim), dtype=dtype)


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


def _reduced(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A sum or a mean over all axes of the value, or over some."""

    def reduced(
        stack: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
    ) -> Tensor:
        # Integers have no derivatives, and a number has no axes.
        if stack.ndim == 1 or not (dtype is None or dtype.is_floating_point):
            raise NoRule
        return reduce(stack, _axes(stack, dim), keepdim, dtype=dtype)

    return reduced


for _names, _move in {
    ("reshape",): _shaped,
    ("reshape_as",): lambda stack, other: _shaped(stack, *other.shape),
    ("view",): _viewed,
    ("permute",): _permuted,
    ("expand",): _expanded,
    ("repeat",): _repeated,
    ("tile",): _tiled,
    ("squeeze",): _squeezed,
    ("flatten",): _flattened,
    ("transpose", "swapaxes", "swapdims"): _swapped,
    ("sum",): _reduced(torch.sum),
    ("mean",): _reduced(torch.mean),
    ("clone",): _copied,
    ("contiguous",): _contiguous,
    ("t",): _turned,
    ("neg", "negative", "__neg__"): lambda stack: -stack,
    ("view_as",): lambda stack, other: _shaped(stack, *other.shape),
    ("expand_as",): lambda stack, other: _expanded(stack, *other.shape),
    ("unflatten",): lambda stack, dim, sizes: stack.unflatten(_axis(stack, dim), sizes),
    ("unsqueeze",): lambda stack, dim: stack.unsqueeze(axis(dim, stack.ndim)),
    ("chunk",): lambda stack, chunks, dim=0: tuple(stack.chunk(chunks, _axis(stack, dim))),
    ("split",): lambda stack, size, dim=0: tuple(stack.split(size, _axis(stack, dim))),
    ("unbind",): lambda stack, dim=0: tuple(stack.unbind(_axis(stack, dim))),
    ("narrow",): lambda stack, dim, start, length: stack.narrow(_axis(stack, dim), start, length),
    ("select",): lambda stack, dim, index: stack.select(_axis(stack, dim), index),
    ("split_with_sizes",): lambda stack, split_sizes, dim=0: tuple(
        stack.split_with_sizes(split_sizes, _axis(stack, dim))
    ),
    ("repeat_interleave",): lambda stack, repeats, dim, *, output_size=None: (
        stack.repeat_interleave(repeats, _axis(stack, dim), output_size=output_size)
    ),
    ("roll",): _rolled,
    ("flip",): lambda stack, *places, dims=None: stack.flip(
        _axes(stack, _numbers(places or (dims,)))
    ),
    ("cumsum",): _summed_up,
    ("index_select",): lambda stack, dim, index: stack.index_select(_axis(stack, dim), index),
}.items():
    _register(every(*_names), _move, _names[0] in COPIES)
_register((Tensor.T.__get__,), _reversed)  # pyright: ignore[reportAttributeAccessIssue]
_register((Tensor.mT.__get__, *every("adjoint")), _transposed)  # pyright: ignore


_PIXELS = every("pixel_shuffle", "pixel_unshuffle")


@rule_of_each(
    *every("avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate", "upsample"),
    *every("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *_PIXELS,
)
def _of_samples(function: Function, x: Jet, *args: Any, **named: Any) -> Jet:
    """A linear function that treats every sample alone."""
    # Of one sample, the components would be more channels.
    if x.ndim < 4 and function in _PIXELS:
        raise NoRule
    return like_samples(lambda samples: function(samples, *args, **named), x)


@rule(F.pad)
def _pad(x: Jet, pad: Any, mode: str = "constant", value: float | None = None) -> Jet:
    if len(pad) > 2 * x.ndim:
        raise NoRule
    if mode == "constant":
        if not value:
            return x.like(F.pad(x.stack, pad))
        # The derivatives of a number are zero.
        first = F.pad(x.stack[:1], pad, value=value)
        return x.like(torch.cat([first, F.pad(x.stack[1:], pad)]))
    # These know a batch, and none of the components.
    if x.ndim < 3 or len(pad) > 2 * (x.ndim - 1):
        raise NoRule
    return like_samples(lambda samples: F.pad(samples, pad, mode), x)


@rule(torch.broadcast_tensors, several=True)
def _broadcast(*tensors: Any) -> tuple[Any, ...]:
    shape = torch.broadcast_shapes(*(each.shape for each in tensors))
    return tuple(
        call(Tensor.expand, (each, shape), {}) if isinstance(each, Jet) else each.expand(shape)
        for each in tensors
    )


@rule_of_each(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def dropped(
    function: Function, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """x by one of PyTorch's dropouts."""
    if not training or p == 0:
        return x
    # One mask for the value and its derivatives.
    found = x.like(x.stack * function(torch.ones_like(x.stack[0]), p))
    return written(x, found) if inplace else found


@rule(Tensor.__iter__)
def _iterator(x: Jet) -> Any:
    if x.ndim == 0:
        raise NoRule
    return iter([share(x, x.like(row)) for row in x.stack.unbind(1)])
