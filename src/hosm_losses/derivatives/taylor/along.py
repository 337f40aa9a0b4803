r"""Derivatives along directions by nested torch.func.jvp, for functions without a rule."""

__all__ = ["Pairs", "along"]

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hosm_losses._torch_internals import forward_mode, pytree

# Which products of two first derivatives have a second one: none; that of each direction with
# itself; that of each of the first half with its fellow in the second half.
Pairs = Literal["none", "squares", "halves"]
Tensors = tuple[Tensor, ...]


def along(
    function: Callable[..., tuple[Tensors, Tensors]],
    values: Tensors,
    derivatives: Tensors,
    firsts: int,
    pairs: Pairs,
) -> tuple[list[Tensor], Tensors]:
    """The stacks of results, value first, and what has no derivative; in one evaluation.

    Args:
        function: of the values; returns what has a derivative and what has none.
        values: the arguments.
        derivatives: of each, (C - 1, *): its first and, unless they are zero, second ones.
        firsts: the number of first ones.
        pairs: which second ones there are.
    """

    def first(tangents: Tensors) -> Any:
        return torch.func.jvp(function, values, tangents, has_aux=True)

    def second(left: Tensors, right: Tensors, both: Tensors) -> Any:
        def inner(*given: Any) -> Any:
            found: Any = torch.func.jvp(function, *given, has_aux=True)
            value, tangent, constants = found
            return (value, tangent), constants

        found: Any = torch.func.jvp(inner, (values, left), (right, both), has_aux=True)
        (value, to_left), (to_right, to_both), constants = found
        return value, to_left, to_right, to_both, constants

    if pairs == "none":
        value, *parts, constants = _mapped(first, derivatives)
    else:
        count = firsts if pairs == "squares" else firsts // 2
        left = tuple(each[:count] for each in derivatives)
        right = tuple(each[firsts - count : firsts] for each in derivatives)
        both = tuple(
            each[firsts:] if len(each) > firsts else torch.zeros_like(each[:count])
            for each in derivatives
        )
        value, *parts, constants = _mapped(second, left, right, both)
        if pairs == "squares":
            del parts[1]
    stacks = zip(value, *parts, strict=True)
    return [torch.cat([one.unsqueeze(0), *rest]) for one, *rest in stacks], constants


def _mapped(function: Callable[..., Any], *args: Tensors) -> Any:
    """(value, *derivatives, constants) of a function for several directions.

    Under vmap where there are several: one mask of a dropout then serves all of them.
    """
    with forward_mode():
        if len(args[0][0]) > 1:
            outs: Any = (None, *(0,) * (1 if len(args) == 1 else 3), None)
            return torch.func.vmap(function, out_dims=outs, randomness="same")(*args)
        single = pytree.tree_map(lambda stack: stack[0], args)
        value, *derivatives, constants = function(*single)
    return value, *pytree.tree_map(lambda part: part.unsqueeze(0), derivatives), constants
