"""Rules for what joins several tensors, of which a plain one has derivatives of zero."""

__all__: list[str] = []

from typing import Any

import torch
from torch import Tensor

from hosm_losses.derivatives.taylor.jet import Jet, aligned
from hosm_losses.derivatives.taylor.table import NoRule, axis, every, rule


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
    ndim = tensors[0].ndim
    # PyTorch passes over an empty tensor of one axis among others.
    if any(each.ndim != ndim for each in tensors):
        raise NoRule
    place = axis(dim, ndim)
    jet, stacks = _stacks(tensors)
    return jet.like(torch.cat(stacks, place))


@rule(torch.stack)
def _stack(tensors: Any, dim: int = 0) -> Jet:
    place = axis(dim, tensors[0].ndim + 1)
    jet, stacks = _stacks(tensors)
    return jet.like(torch.stack(stacks, place))


def _chosen(condition: Tensor, a: Any, b: Any, dtype: torch.dtype) -> Jet:
    """The elements of a where a condition holds and those of b elsewhere, of each component."""
    jet = a if isinstance(a, Jet) else b
    tensors = [
        each if isinstance(each, Tensor) else jet.stack.new_full((), each) for each in (a, b)
    ]
    ndim = max(condition.ndim, *(each.ndim for each in tensors))
    _, stacks = _stacks(tensors)
    chosen = torch.where(condition, *(aligned(stack, ndim) for stack in stacks))
    return jet.like(chosen.to(dtype))


def _known(condition: Any, *others: Any) -> bool:
    """Whether a condition is a mask, and the others are real numbers or tensors, one a Jet."""
    return (
        isinstance(condition, Tensor)
        and condition.dtype == torch.bool
        and any(isinstance(each, Jet) for each in others)
        and all(isinstance(each, Tensor | float | int) for each in others)
    )


@rule(torch.where)
def _where(condition: Any, a: Any, b: Any) -> Jet:
    if not _known(condition, a, b):
        raise NoRule
    values = [each.stack[0] if isinstance(each, Jet) else each for each in (a, b)]
    return _chosen(condition, a, b, torch.result_type(*values))


@rule(Tensor.where)
def _where_method(a: Any, condition: Any, b: Any) -> Jet:
    return _where(condition, a, b)


@rule(*every("masked_fill"))
def _masked_fill(x: Any, mask: Any, value: Any) -> Jet:
    number = not isinstance(value, Tensor) or value.ndim == 0
    if not _known(mask, x, value) or not number or not x.is_floating_point():
        raise NoRule
    return _chosen(mask, value, x, x.dtype)
