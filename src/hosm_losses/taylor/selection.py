r"""Rules for what joins several tensors, chooses among them, or picks parts by an index.

A plain tensor among several has derivatives of zero.

PyTorch moves the axes of several index tensors to the front where something stands between them,
and reads lists and arrays of NumPy in ways of its own. An index with at most one tensor keeps its
place, in a stack as in its value; every other goes to PyTorch as it stands.
"""

from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor.aliases import share
from hosm_losses.taylor.along import aligned
from hosm_losses.taylor.arguments import jet_among, result_type, stacks_of
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.jet import Jet
from hosm_losses.taylor.table import Function, axis, every, rule, rule_of_each


@rule(*every("cat", "concat", "concatenate"), several=True)
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


@rule(torch.stack, several=True)
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
    stacks = (aligned(stack, ndim) for stack in stacks_of(tensors))
    return jet.like(torch.where(condition, *stacks).to(dtype))


rule(torch.where, several=True)(lambda condition, a, b: _chosen(condition, a, b))
rule(Tensor.where, several=True)(lambda a, condition, b: _chosen(condition, a, b))


@rule(*every("masked_fill"), several=True)
def masked_fill(x: Any, mask: Any, value: Any) -> Jet:
    """x with a number in its place where a mask holds."""
    if (isinstance(value, Tensor) and value.ndim) or not x.is_floating_point():
        raise NoRule
    return _chosen(mask, value, x, x.dtype)


_INDICES = (torch.bool, torch.int64, torch.int32)


@rule(Tensor.__getitem__)
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


@rule(*every("gather"))
def _gather(x: Any, dim: Any, index: Any) -> Jet:
    if isinstance(index, Jet) or index.ndim != x.ndim or not x.ndim:
        raise NoRule
    return x.like(x.stack.gather(axis(dim, x.ndim), index.expand(len(x.stack), *index.shape)))


@rule_of_each(*every("topk", "sort"))
def _ordered(function: Function, x: Jet, *args: Any, **named: Any) -> Any:
    found = function(x.stack[0], *args, **named)
    places = 1 if function in every("topk") else 0  # of the arguments before the dimension
    dim = named.get("dim", named.get("axis", args[places] if len(args) > places else -1))
    stack = x.stack.gather(
        axis(dim, x.ndim), found.indices.expand(len(x.stack), *found.indices.shape)
    )
    return type(found)((x.like(stack), found.indices))


@rule(*every("scatter_add"), several=True)
def _scatter_add(x: Any, dim: Any, index: Tensor, src: Any) -> Jet:
    if index.shape != src.shape:  # of which PyTorch finds no gradient
        raise NoRule
    stack, added = stacks_of((x, src))
    place = axis(dim, x.ndim)
    index = index.expand(len(stack), *index.shape)
    return jet_among((x, src)).like(stack.scatter_add(place, index, added))


@rule(*every("index_add"), several=True)
def _index_add(x: Any, dim: Any, index: Any, source: Any, *, alpha: float = 1) -> Jet:
    stack, added = stacks_of((x, source))
    found = stack.index_add(axis(dim, x.ndim), index, added, alpha=alpha)
    return jet_among((x, source)).like(found)
