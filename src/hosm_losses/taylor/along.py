r"""Derivatives along directions by nested torch.func.jvp, for functions without a rule.

With the words for second derivatives, and sums of stacks, that rules use too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hosm_losses.taylor._torch import forward_mode, pytree

# Which products of two first derivatives have a second one: none; that of each direction with
# itself; the sum of those; that of each of the first half with its fellow in the second half; that
# of each but the last with the last.
Pairs = Literal["none", "squares", "sum", "halves", "last"]
Tensors = tuple[Tensor, ...]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 where its type is shorter, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def lengthened(stack: Tensor, count: int) -> Tensor:
    """A stack of `count` components, of which those added are derivatives of zero."""
    missing = count - stack.shape[0]
    return torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])]) if missing else stack


def summed(stack: Tensor) -> Tensor:
    """The sum of all components, as a stack of one."""
    return stack if len(stack) == 1 else stack.sum(0, keepdim=True)


def add_products(total: Tensor, left: Tensor, right: Tensor, value: float = 1.0) -> None:
    """Add the products of two stacks to a third in place, all of them to a stack of one.

    For several components of the left there may be one of the right, and in a stack of several one
    of either.
    """
    if len(total) > 1 or len(left) == len(right) == 1:
        total.addcmul_(left, right, value=value)
    elif len(right) == 1:
        total.addcmul_(summed(left), right, value=value)
    else:
        whole = total[0]
        for one, other in zip(left.unbind(), right.unbind(), strict=True):
            whole.addcmul_(one, other, value=value)


def along(
    function: Callable[..., Any], values: Tensors, derivatives: Tensors, firsts: int, pairs: Pairs
) -> list[Tensor]:
    """The stacks of the results of a function, value first; in one evaluation.

    `derivatives` has for each value the stack of its `firsts` first derivatives and, unless they
    are zero, of its second ones.
    """

    def first(tangents: Tensors) -> Any:
        return torch.func.jvp(function, values, tangents)

    def second(left: Tensors, right: Tensors, both: Tensors) -> Any:
        inner = partial(torch.func.jvp, function)
        found: Any = torch.func.jvp(inner, (values, left), (right, both))
        (value, to_left), (to_right, to_both) = found
        return value, to_left, to_right, to_both

    if pairs == "none":
        value, *parts = _mapped(first, derivatives)
    else:
        count = {"halves": firsts // 2, "last": firsts - 1}.get(pairs, firsts)
        left = tuple(each[:count] for each in derivatives)
        right = tuple(each[firsts - count : firsts] for each in derivatives)
        if pairs == "last":
            right = tuple(each[-1:].expand_as(each) for each in right)
        both = tuple(
            # Of a sum the first direction has it all.
            lengthened(each[firsts:], count)
            for each in derivatives
        )
        value, *parts = _mapped(second, left, right, both)
        if pairs in ("squares", "sum"):
            del parts[1]
        if pairs == "last":
            parts[1] = pytree.tree_map(lambda part: part[:1], parts[1])
        if pairs == "sum":
            parts[1] = pytree.tree_map(lambda part: part.sum(0, keepdim=True), parts[1])
    stacks = zip(value, *parts, strict=True)
    return [torch.cat([one.unsqueeze(0), *rest]) for one, *rest in stacks]


def aligned(stack: Tensor, ndim: int) -> Tensor:
    """A stack with axes of size one after its first, for a value of `ndim` axes at least."""
    missing = ndim + 1 - stack.ndim
    if missing <= 0:
        return stack
    count, *shape = stack.shape
    return stack.reshape(count, *(1,) * missing, *shape)


def _mapped(function: Callable[..., Any], *args: Tensors) -> Any:
    """(value, *derivatives) of a function for several directions.

    Under vmap where there are several: one mask of a dropout then serves all of them.
    """
    with forward_mode():
        if torch.compiler.is_compiling():
            # PyTorch asks for the offset of a view, which it does not know for all sizes.
            args = pytree.tree_map(torch.clone, args)
        if len(args[0][0]) > 1:
            outs: Any = (None, *(0,) * (1 if len(args) == 1 else 3))
            return torch.func.vmap(function, out_dims=outs, randomness="same")(*args)
        value, *parts = function(*pytree.tree_map(lambda stack: stack[0], args))
    return value, *pytree.tree_map(lambda part: part.unsqueeze(0), parts)
