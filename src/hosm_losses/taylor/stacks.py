"""Stacks (C, B, *): a value, its first derivatives along directions, and any second ones."""

from typing import Literal

import torch
from torch import Tensor

# Which second derivatives there are: none; that of each direction with itself; the sum of those.
Pairs = Literal["none", "squares", "sum"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast a tensor in a shorter dtype to float32; return any other unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def components(stack: Tensor, firsts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The value, first and second derivatives of a stack; there may be no second ones."""
    # The gradient of a split is one stack; slices would each give a stack, most of it zero.
    sizes = 1, firsts, stack.shape[0] - 1 - firsts
    value, tangents, seconds = stack.split_with_sizes(sizes)
    return value, tangents, seconds


def collect(squares: Tensor, pairs: Pairs) -> Tensor:
    """The squares of first derivatives needed by second ones: all of them, or their sum."""
    return squares.sum(0, keepdim=True) if pairs == "sum" else squares


def extend(stack: Tensor, count: int) -> Tensor:
    """Extend a stack to `count` components with zero derivatives."""
    missing = count - stack.shape[0]
    return torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])]) if missing else stack


def align(stack: Tensor, ndim: int) -> Tensor:
    """Insert axes of size one after the first, so that the value has at least `ndim` axes."""
    missing = ndim + 1 - stack.ndim
    if missing <= 0:
        return stack
    count, *shape = stack.shape
    return stack.reshape(count, *(1,) * missing, *shape)


def total(stack: Tensor) -> Tensor:
    """The sum of all components, as a stack of one."""
    return stack if len(stack) == 1 else stack.sum(0, keepdim=True)


def add_products(whole: Tensor, left: Tensor, right: Tensor, value: float = 1.0) -> None:
    """Add the products of two stacks to a third in place, all of them to a stack of one.

    If the left has several components, the right may have one, and if the stack has several,
    either may have one.
    """
    if len(whole) > 1 or len(left) == len(right) == 1:
        whole.addcmul_(left, right, value=value)
    elif len(right) == 1:
        whole.addcmul_(total(left), right, value=value)
    else:
        for a, b in zip(left.split(1), right.split(1), strict=True):
            whole.addcmul_(a, b, value=value)
