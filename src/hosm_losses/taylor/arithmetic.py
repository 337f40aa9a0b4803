r"""Rules for sums and products.

Formula, for a product y = a · b that is linear in a and in b:
    y_l = a_l · b + a · b_l        y_lr = a_lr · b + a · b_lr + a_l · b_r + a_r · b_l

A plain tensor has no derivatives: the product with one is the product of the whole stack.

The type of a result is that of PyTorch for the values: a number without axes does not widen a
tensor with some, though its stack has an axis.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor.along import Pairs, aligned, at_least_float32
from hosm_losses.taylor.arguments import result_type, stacks_of
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.jet import Jet, components, gathered, halves
from hosm_losses.taylor.pointwise import apply, power, powers
from hosm_losses.taylor.recompute import recomputed
from hosm_losses.taylor.table import Function, every, rule


def ndim_of(x: Any) -> int:
    """The axes of a tensor; none of a number."""
    return x.ndim if isinstance(x, Tensor) else 0


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


@rule(*every("add", "__add__", "__radd__"), several=True)
def add(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    """a + alpha · b, of which one at least is a Jet."""
    ndim, dtype = _operands(a, b), _type(a, b)
    jet, plain = (a, b) if isinstance(a, Jet) else (b, a)
    if isinstance(plain, Jet) or ndim_of(plain):
        first, second = stacks_of((a, b))
        total = torch.add(aligned(first, ndim), aligned(second, ndim), alpha=alpha)
        return jet.like(total.to(dtype))
    # As a stack a number would be rounded to a type, and a tensor without axes, which may be on
    # another device, would have one.
    stack = aligned(jet.stack, ndim)
    if alpha != 1:
        stack, plain = (stack, plain * alpha) if jet is a else (stack * alpha, plain)
    value, rest = stack.split((1, len(stack) - 1))
    value = value.squeeze(0) + plain
    rest = rest.expand(-1, *value.shape).to(value.dtype)
    return jet.like(torch.cat([value.unsqueeze(0), rest]).to(dtype))


def product_rule(a: Any, b: Any, product: Callable[[Tensor, Tensor], Tensor], ndim: int) -> Jet:
    """A product linear in both, of stacks that broadcast over their first axis."""
    if not isinstance(b, Jet):
        return a.like(product(aligned(a.stack, ndim), b))
    if not isinstance(a, Jet):
        return b.like(product(a, aligned(b.stack, ndim)))
    first, second = aligned(a.stack, ndim), aligned(b.stack, ndim)
    firsts, pairs = a.firsts, a.pairs
    a_value, a_tangents, _ = components(first, firsts)
    b_value, b_tangents, _ = components(second, firsts)
    # All of a with the value of b; then what the derivatives of b add.
    value, tangents, seconds = components(product(first, b_value), firsts)
    added = product(a_value, second[1:])
    tangents = tangents + added[:firsts]
    if pairs == "none":
        return a.like(torch.cat([value, tangents]))
    (a_left, a_right), (b_left, b_right) = halves(a_tangents, pairs), halves(b_tangents, pairs)
    both = gathered(product(a_left, b_right), pairs)
    symmetric = pairs in ("squares", "sum")
    both = 2 * both if symmetric else both + product(a_right, b_left)
    for part in (seconds, added[firsts:]):
        both = both + part if len(part) else both
    return a.like(torch.cat([value, tangents, both]))


@rule(*every("sub", "subtract", "__sub__"), several=True)
def _sub(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    # Of which PyTorch says that masks are not subtracted.
    if any(
        isinstance(each, bool) or getattr(each, "dtype", None) == torch.bool for each in (a, b)
    ):
        raise NoRule
    return add(a, b, alpha=-alpha)


@rule(*every("mul", "multiply", "__mul__", "__rmul__"), several=True)
def multiply(a: Any, b: Any) -> Jet:
    """a b, of which one at least is a Jet."""
    ndim = _operands(a, b)
    if a is b:
        return apply(partial(power, exponent=2), a)
    return product_rule(a, b, torch.mul, ndim).typed(_type(a, b))


@rule(*every("div", "divide", "true_divide", "__truediv__"), several=True)
def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Jet:
    if rounding_mode is not None:
        raise NoRule
    ndim, dtype = _operands(a, b), _type(a, b)
    if not isinstance(b, Jet):
        return product_rule(a, b, torch.div, ndim).typed(dtype)
    if isinstance(a, Jet):
        above = a.stack
    elif ndim_of(a):
        above = a.unsqueeze(0)
    else:  # a number, or a tensor that may be on another device
        wide = None if isinstance(a, Tensor) else torch.promote_types(dtype, torch.float32)
        above = torch.as_tensor(a, dtype=wide, device=b.device).unsqueeze(0)
    stacks = (aligned(each, ndim) for each in (above, b.stack))
    return b.like(recomputed(partial(_quotient, b.firsts, b.pairs), *stacks)).typed(dtype)


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
    (left, right), (b_left, b_right) = halves(tangents, pairs), halves(b_tangents, pairs)
    rest = gathered(left * b_right + right * b_left, pairs)
    rest = rest + value * b_seconds if len(b_seconds) else rest
    seconds = (a_seconds - rest if len(a_seconds) else -rest) / b_value
    return torch.cat([value, tangents, seconds])


@rule(*every("pow", "__pow__"))
def _pow(x: Any, exponent: Any) -> Jet:
    if isinstance(exponent, Tensor):
        return _to_a_tensor(x, exponent)
    if not isinstance(exponent, float | int) or isinstance(exponent, bool):
        raise NoRule
    return apply(partial(power, exponent=exponent), x)


@rule(*every("float_power"))
def _float_power(x: Any, exponent: Any) -> Jet:
    return _pow(x.typed(torch.float64), exponent)


def _to_a_tensor(x: Jet, exponent: Tensor) -> Jet:
    """x to what does not depend on it.

    PyTorch's own takes the derivative in the exponent as well, times zero: NaN for x below zero.
    """
    constant = not isinstance(exponent, Jet) and not exponent.requires_grad
    if not constant or exponent.dtype == torch.bool or exponent.is_complex():
        raise NoRule
    x = x.typed(result_type(x, exponent))
    shape = torch.broadcast_shapes(x.shape, exponent.shape)
    stack = aligned(x.stack, len(shape)).expand(-1, *shape)
    return apply(partial(powers, exponents=exponent), x.like(stack))


@rule(*every("addcmul"), several=True)
def _addcmul(x: Any, a: Any, b: Any, *, value: float = 1) -> Jet:
    product = multiply(a, b) if isinstance(a, Jet) or isinstance(b, Jet) else a * b
    return add(x, product, alpha=value)


def swapped(function: Function) -> Function:
    """A rule for the operator that is called with its arguments in the other order."""
    return wraps(function)(lambda a, b, **named: function(b, a, **named))


rule(*every("__rsub__", "rsub"), several=True)(swapped(_sub))
rule(*every("__rdiv__", "__rtruediv__"), several=True)(swapped(_div))
