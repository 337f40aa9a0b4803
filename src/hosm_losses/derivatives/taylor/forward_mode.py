r"""The derivatives of a function without a rule, by torch.func.jvp, in one evaluation of it.

What:
    For each direction w the pair (f, ∂f w), and for each pair of directions
    (f, ∂f l, ∂f r, ∂f s + ∂²f[l, r]) by nesting. One evaluation, under vmap where there are
    several: one mask of a dropout then serves the value and every derivative.
"""

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
    """The stacks of results, value first, and what has no derivative.

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
            value, tangent, others = found
            return (value, tangent), others

        found: Any = torch.func.jvp(inner, (values, left), (right, both), has_aux=True)
        (value, to_left), (to_right, to_both), others = found
        return value, to_left, to_right, to_both, others

    tangents = tuple(each[:firsts] for each in derivatives)
    if pairs == "none":
        value, *parts, others = _mapped(first, (tangents,), firsts)
    else:
        half = firsts if pairs == "squares" else firsts // 2
        left, right = (
            tuple(tangent[where] for tangent in tangents)
            for where in (slice(half), slice(firsts - half, firsts))
        )
        both = tuple(
            each[firsts:] if len(each) > firsts else torch.zeros_like(each[:half])
            for each in derivatives
        )
        value, to_left, to_right, to_both, others = _mapped(second, (left, right, both), half)
        parts = [to_left, *(() if pairs == "squares" else (to_right,)), to_both]
    stacks = zip(value, *parts, strict=True)
    return [torch.cat([one.unsqueeze(0), *rest]) for one, *rest in stacks], others


def _mapped(function: Callable[..., Any], args: Any, count: int) -> Any:
    """(value, *derivatives, others) of a function for `count` directions."""
    if count == 1:
        args = pytree.tree_map(lambda stack: stack[0], args)
        with forward_mode():
            value, *derivatives, others = function(*args)
        return value, *pytree.tree_map(lambda part: part.unsqueeze(0), derivatives), others
    outs: Any = (None, *(0,) * (1 if len(args) == 1 else 3), None)
    with forward_mode():
        return torch.func.vmap(function, out_dims=outs, randomness="same")(*args)
