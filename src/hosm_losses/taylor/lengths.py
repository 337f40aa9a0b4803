r"""Rules for lengths of vectors, and for what is made of them: distances, angles and spreads.

PyTorch's own formulas in forward mode cannot be differentiated again where they fill in a zero.

At zero a length has no derivative; as in PyTorch it is taken to be constant there.
"""

from collections.abc import Callable
from functools import partial, wraps
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.along import aligned, at_least_float32
from hosm_losses.taylor.arithmetic import add, multiply
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.jet import Jet
from hosm_losses.taylor.pointwise import absolute, apply, power
from hosm_losses.taylor.selection import masked_fill
from hosm_losses.taylor.table import axes, every, rule


def _wide(x: Jet) -> Jet:
    return x.like(at_least_float32(x.stack))


def _sum_of_powers(x: Jet, p: float, dim: Any, keepdim: bool) -> Jet:
    """Σ |x|^p."""
    if p == 2:
        powers = multiply(x, x)
    else:
        powers = apply(absolute, x)
        powers = powers if p == 1 else apply(partial(power, exponent=p), powers)
    return x.like(powers.stack.sum(axes(dim, x.ndim), keepdim))


def _root(powers: Jet, p: float = 2) -> Jet:
    """The p-th root of what is zero or more, constant at zero."""
    zero = powers.stack[0] == 0
    root = apply(partial(power, exponent=1 / p), masked_fill(powers, zero, 1.0))
    return masked_fill(root, zero, 0.0)


def _over_largest(x: Jet, dim: Any) -> tuple[Jet, Tensor]:
    """x in float32 at least over the largest element of each row, and that.

    A length is homogeneous, so the divisor counts as constant. Without it the powers that are in
    derivatives of short vectors are out of float32's range.
    """
    if x.ndim == 0:
        raise NoRule
    wide = _wide(x)
    largest = wide.stack[0].detach().abs().amax(axes(dim, x.ndim), keepdim=True)
    largest = largest.where((largest > 0) & largest.isfinite(), 1.0)
    return wide.like(wide.stack / largest), largest


def _length(x: Jet, p: float, dim: Any, keepdim: bool) -> Jet:
    """(Σ |x|^p)^(1/p)."""
    over, largest = _over_largest(x, dim)
    powers = _sum_of_powers(over, p, dim, keepdim)
    root = powers if p == 1 else _root(powers, p)
    largest = largest if keepdim else largest.squeeze(axes(dim, x.ndim))
    return root.like(root.stack * largest)


@rule(F.normalize)
def _normalize(x: Any, p: Any = 2.0, dim: Any = 1, eps: float = 1e-12) -> Jet:
    if not isinstance(p, float | int) or not 1 <= p < float("inf"):
        raise NoRule
    over, largest = _over_largest(x, dim)
    length = _root(_sum_of_powers(over, p, dim, keepdim=True), p)
    # A length below eps counts as eps, which does not depend on x.
    short = length.stack[0] * largest <= eps
    inverse = apply(partial(power, exponent=-1), masked_fill(length, short, 1.0))
    factor = torch.where(short, largest / eps, 1.0)
    return multiply(over, inverse.like(inverse.stack * factor)).typed(x.dtype)


@rule(torch.linalg.vector_norm)
def _vector_norm(
    x: Any,
    ord: Any = 2,  # noqa: A002
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Jet:
    if not isinstance(ord, float | int) or not 1 <= ord < float("inf"):
        raise NoRule
    if dtype is not None and not dtype.is_floating_point:
        raise NoRule
    x = x if dtype is None else x.typed(dtype)
    return _length(x, ord, dim, keepdim).typed(x.dtype)


@rule(Tensor.norm, torch.norm)
def _vector_or_matrix_norm(
    x: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Jet:
    # For a matrix norm, and "fro" of more than two axes, PyTorch has rules of its own.
    several = isinstance(dim, tuple | list) and len(dim) > 2
    return _vector_norm(x, 2 if p == "fro" and not several else p, dim, keepdim, dtype=dtype)


@rule(torch.linalg.norm)
def _norm(
    x: Any,
    ord: Any = None,  # noqa: A002
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Jet:
    count = x.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
    if ord is not None and count != 1:
        if count != 2:
            raise NoRule
        return _matrix_norm(x, ord, (-2, -1) if dim is None else dim, keepdim, dtype=dtype)
    return _vector_norm(x, 2 if ord is None else ord, dim, keepdim, dtype=dtype)


@rule(torch.linalg.matrix_norm)
def _matrix_norm(
    x: Any,
    ord: Any = "fro",  # noqa: A002
    dim: Any = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Jet:
    if ord != "fro" or not isinstance(dim, tuple | list) or len(dim) != 2:
        raise NoRule
    return _vector_norm(x, 2, dim, keepdim, dtype=dtype)


@rule(F.cosine_similarity, several=True)
def _cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Jet:
    shape = torch.broadcast_shapes(x1.shape, x2.shape)
    units = [
        _normalize(x.like(aligned(x.stack, len(shape)).expand(-1, *shape)), 2, dim, eps)
        if isinstance(x, Jet)
        else F.normalize(x.expand(shape), 2, dim, eps)
        for x in (x1, x2)
    ]
    product = multiply(*units)
    return product.like(product.stack.sum(axes(dim, product.ndim)))


@rule(F.pairwise_distance, several=True)
def _pairwise_distance(
    x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Jet:
    return _vector_norm(add(add(x1, x2, alpha=-1), eps), p, -1, keepdim)


@rule(torch.dist, Tensor.dist, several=True)
def _dist(x: Any, other: Any, p: float = 2) -> Jet:
    return _vector_norm(add(x, other, alpha=-1), p)


def _dims(dim: Any) -> Any:
    """The dimensions of a spread: a flag in their place is `unbiased`."""
    return None if isinstance(dim, bool) else dim


def _centred(x: Any, dim: Any, unbiased: Any, correction: Any) -> tuple[Jet, float]:
    """x less its mean, in float32 at least, and by what its sum of squares is divided."""
    if isinstance(dim, bool):
        unbiased = dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    wide, dims = _wide(x), axes(_dims(dim), x.ndim)
    count = prod([x.shape[each] for each in dims])
    if count <= correction:  # of which PyTorch says what it thinks of that
        raise NoRule
    return x.like(wide.stack - wide.stack.mean(dims, keepdim=True)), count - correction


@rule(*every("var"))
def _var(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Jet:
    centred, count = _centred(x, dim, unbiased, correction)
    squares = _sum_of_powers(centred, 2, _dims(dim), keepdim)
    return x.like(squares.stack / count).typed(x.dtype)


@rule(*every("std"))
def _std(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Jet:
    centred, count = _centred(x, dim, unbiased, correction)
    length = _length(centred, 2, _dims(dim), keepdim)
    return x.like(length.stack / count**0.5).typed(x.dtype)


def _with_mean(spread: Callable[..., Jet]) -> Callable[..., tuple[Jet, Jet]]:
    @wraps(spread)
    def both(
        x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, **named: Any
    ) -> tuple[Jet, Jet]:
        mean = x.stack.mean(axes(_dims(dim), x.ndim), keepdim)
        return spread(x, dim, unbiased, keepdim, **named), x.like(mean)

    return both


rule(torch.var_mean)(_with_mean(_var))
rule(torch.std_mean)(_with_mean(_std))
