"""Operations on stacks (C, B, *): a value, its first derivatives and any second derivatives."""

from typing import Literal

import torch
from torch import Tensor

# The second derivatives in a stack: none, one for each direction, or the sum over directions.
Pairs = Literal["none", "squares", "sum"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast a float16 or bfloat16 tensor to float32; return any other tensor unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def components(stack: Tensor, firsts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a stack into the value, the first derivatives and any second derivatives."""
    # The gradient of a split is one stack; each slice's gradient would be mostly zeros.
    sizes = 1, firsts, stack.shape[0] - 1 - firsts
    value, tangents, seconds = stack.split_with_sizes(sizes)
    return value, tangents, seconds


def collect(squares: Tensor, pairs: Pairs) -> Tensor:
    """Sum `squares` over directions if `pairs` is "sum"; otherwise return `squares` unchanged."""
    return squares.sum(0, keepdim=True) if pairs == "sum" else squares


def extend(stack: Tensor, count: int) -> Tensor:
    """Append zero derivatives to a stack until it has `count` components."""
    missing = count - stack.shape[0]
    return torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])]) if missing else stack


def align(stack: Tensor, ndim: int) -> Tensor:
    """Insert axes of size one after the first axis, so that the value has at least `ndim` axes."""
    missing = ndim + 1 - stack.ndim
    if missing <= 0:
        return stack
    count, *shape = stack.shape
    return stack.reshape(count, *(1,) * missing, *shape)


def total(stack: Tensor) -> Tensor:
    """The sum of all components, as a stack with one component."""
    return stack if len(stack) == 1 else stack.sum(0, keepdim=True)


def add_products(whole: Tensor, left: Tensor, right: Tensor, value: float = 1.0) -> None:
    """Add the products of two stacks to `whole` in place.

    If `whole` has one component, the sum of the products is added. If `right` has only one
    component, it multiplies every component of `left`. If `left` has only one component and
    `right` has several, `whole` must also have several; the component of `left` then multiplies
    every component of `right`.
    """
    if len(whole) > 1 or len(left) == len(right) == 1:
        whole.addcmul_(left, right, value=value)
    elif len(right) == 1:
        whole.addcmul_(total(left), right, value=value)
    else:
        for a, b in zip(left.split(1), right.split(1), strict=True):
            whole.addcmul_(a, b, value=value)
