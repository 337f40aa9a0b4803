r"""Rules for sums, products and quotients of elements, and for powers.

The type of a result is that of PyTorch for the values: a number without axes does not widen a
tensor with some, though its stack has an axis.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor.errors import NoRule, TaylorError
from hosm_losses.taylor.pointwise import apply, power
from hosm_losses.taylor.products import ndim_of, of_matrices, product_rule
from hosm_losses.taylor.recompute import with_recomputation
from hosm_losses.taylor.registry import rule, swapped
from hosm_losses.taylor.stacks import (
    Pairs,
    align,
    at_least_float32,
    collect,
    components,
)
from hosm_losses.taylor.tensor import Jet, result_type, stacks_of


def _operands(a: Any, b: Any) -> int:
    """The axes of what PyTorch computes with: tensors and real numbers, of which one is a Jet."""
    if not (isinstance(a, (Tensor, float, int)) and isinstance(b, (Tensor, float, int))):
        raise NoRule
    return max(ndim_of(a), ndim_of(b))


def _type(a: Any, b: Any) -> torch.dtype:
    """The type of a and b together, found at once where it is that of both."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype != b.dtype:
        return result_type(a, b)
    return (a if isinstance(a, Jet) else b).dtype


@rule("add __add__ __radd__", several=True, kind="linear")
def add(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    """a + alpha · b, of which one at least is a Jet."""
    ndim, dtype = _operands(a, b), _type(a, b)
    jet, plain = (a, b) if isinstance(a, Jet) else (b, a)
    if isinstance(plain, Jet) or ndim_of(plain):
        first, second = stacks_of((a, b))
        total = torch.add(align(first, ndim), align(second, ndim), alpha=alpha)
        return jet.like(total.to(dtype))
    # As a stack a number would be rounded to a type, and a tensor without axes, which may be on
    # another device, would have one.
    stack = align(jet.stack, ndim)
    if alpha != 1:
        stack, plain = (stack, plain * alpha) if jet is a else (stack * alpha, plain)
    value, rest = stack.split((1, len(stack) - 1))
    value = value.squeeze(0) + plain
    rest = rest.expand(-1, *value.shape).to(value.dtype)
    return jet.like(torch.cat([value.unsqueeze(0), rest]).to(dtype))


@rule("sub subtract __sub__", several=True, kind="linear")
def _sub(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    if any(getattr(each, "dtype", type(each)) in (bool, torch.bool) for each in (a, b)):
        raise NoRule  # of which PyTorch says that masks are not subtracted
    return add(a, b, alpha=-alpha)


@rule("mul multiply __mul__ __rmul__", several=True, kind="bilinear")
def multiply(a: Any, b: Any) -> Jet:
    """a b, of which one at least is a Jet."""
    ndim = _operands(a, b)
    if a is b:
        return apply(partial(power, exponent=2), a)
    return product_rule(a, b, torch.mul, ndim).with_dtype(_type(a, b))


@rule("div divide true_divide __truediv__", several=True, kind="stack")
def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Jet:
    if rounding_mode is not None:
        raise NoRule
    ndim, dtype = _operands(a, b), _type(a, b)
    if not isinstance(b, Jet):
        return product_rule(a, b, torch.div, ndim).with_dtype(dtype)
    if isinstance(a, Jet):
        above = a.stack
    elif ndim_of(a):
        above = a.unsqueeze(0)
    else:  # a number, or a tensor that may be on another device
        wide = None if isinstance(a, Tensor) else torch.promote_types(dtype, torch.float32)
        above = torch.as_tensor(a, dtype=wide, device=b.device).unsqueeze(0)
    stacks = (align(each, ndim) for each in (above, b.stack))
    return b.like(with_recomputation(partial(_quotient, b.firsts, b.pairs), *stacks)).with_dtype(
        dtype
    )


def _quotient(firsts: int, pairs: Pairs, a: Tensor, b: Tensor) -> Tensor:
    """The stack of y = a / b, without powers of 1/b, which may be out of range where y is not.

    From those of a = y b, as in y_l = (a_l − y b_l) / b.
    """
    (a_value, a_tangents, a_seconds), (b_value, b_tangents, b_seconds) = (
        components(at_least_float32(each), min(firsts, len(each) - 1)) for each in (a, b)
    )
    value = a_value / b_value
    rest = value * b_tangents
    tangents = (a_tangents - rest if len(a_tangents) else -rest) / b_value
    if pairs == "none":
        return torch.cat([value, tangents])
    rest = collect(2 * tangents * b_tangents, pairs)
    rest = rest + value * b_seconds if len(b_seconds) else rest
    seconds = (a_seconds - rest if len(a_seconds) else -rest) / b_value
    return torch.cat([value, tangents, seconds])


@rule("pow __pow__", kind="pointwise")
def _pow(x: Any, exponent: Any) -> Jet:
    constant = isinstance(exponent, Tensor) and not isinstance(exponent, Jet)
    if constant and not exponent.requires_grad:
        # Of which PyTorch's forward derivative is NaN for x below zero.
        raise TaylorError("pow: a power by a tensor. Take each power by a number, as in x**2.")
    if not isinstance(exponent, float | int) or isinstance(exponent, bool):
        raise NoRule
    return apply(partial(power, exponent=exponent), x)


@rule("addcmul", several=True, kind="composite")
def _addcmul(x: Any, a: Any, b: Any, *, value: float = 1) -> Jet:
    product = multiply(a, b) if isinstance(a, Jet) or isinstance(b, Jet) else a * b
    return add(x, product, alpha=value)


@rule("baddbmm addmm", several=True, kind="composite")
def _added(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Jet:
    if not isinstance(a, Jet) and not isinstance(b, Jet):
        raise NoRule
    found = multiply(of_matrices(a, b), alpha)
    if beta == 0:
        return found
    # Under autocast x may be in a wider type.
    return add(found, x, alpha=beta).with_dtype(found.dtype)


rule("__rsub__ rsub", several=True, kind="linear")(swapped(_sub))
rule("__rdiv__ __rtruediv__", several=True, kind="stack")(swapped(_div))
