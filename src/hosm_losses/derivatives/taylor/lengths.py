r"""Rules for lengths of vectors, and for what is made of them: distances, angles and spreads.

PyTorch's own formulas in forward mode cannot be differentiated again where they fill in a zero.

At zero a length has no derivative; as in PyTorch it is taken to be constant there.
"""

from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses._checks import at_least_float32
from hosm_losses.derivatives.taylor.arithmetic import add, multiply
from hosm_losses.derivatives.taylor.jet import Jet
from hosm_losses.derivatives.taylor.pointwise import absolute, apply, power
from hosm_losses.derivatives.taylor.selection import masked_fill
from hosm_losses.derivatives.taylor.table import NoRule, axes, every, rule


def _sum_of_powers(x: Any, p: float, dim: Any, keepdim: bool) -> Jet:
    """Σ |x|^p in float32 at least, in which the square of a small number is not zero."""
    if x.ndim == 0:
        raise NoRule
    wide = x.like(at_least_float32(x.stack))
    if p == 2:
        powers = multiply(wide, wide)
    else:
        powers = apply(absolute, wide)
        powers = powers if p == 1 else apply(partial(power, exponent=p), powers)
    return x.like(powers.stack.sum(axes(dim, x.ndim), keepdim))


def _root(powers: Jet, p: float = 2) -> Jet:
    """The p-th root of what is zero or more, constant at zero."""
    zero = powers.stack[0] == 0
    root = apply(partial(power, exponent=1 / p), masked_fill(powers, zero, 1.0))
    return masked_fill(root, zero, 0.0)


@rule(F.normalize)
def _normalize(x: Any, p: Any = 2.0, dim: Any = 1, eps: float = 1e-12) -> Jet:
    if not isinstance(p, float | int) or p != 2:
        raise NoRule
    squares = _sum_of_powers(x, 2, dim, keepdim=True)
    # A norm below eps counts as eps, which does not depend on x.
    squares = masked_fill(squares, squares.stack[0] <= eps**2, eps**2)
    return multiply(x, apply(partial(power, exponent=-0.5), squares)).typed(x.dtype)


@rule(torch.linalg.vector_norm)
def _vector_norm(
    x: Any,
    ord: Any = 2,  # noqa: A002
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Jet:
    if not isinstance(ord, float | int) or not 1 <= ord < float("inf") or dtype is not None:
        raise NoRule
    powers = _sum_of_powers(x, ord, dim, keepdim)
    return (powers if ord == 1 else _root(powers, ord)).typed(x.dtype)


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
    vector = isinstance(dim, int) or (dim is None and x.ndim == 1)
    if ord is not None and not vector:
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
    units = [
        _normalize(x, 2, dim, eps) if isinstance(x, Jet) else F.normalize(x, 2, dim, eps)
        for x in (x1, x2)
    ]
    product = multiply(*units)
    return product.like(product.stack.sum(axes(dim, product.ndim)))


@rule(F.pairwise_distance, several=True)
def _pairwise_distance(
    x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Jet:
    return _vector_norm(add(add(x1, x2, alpha=-1), eps), p, -1, keepdim)


def _variance(x: Any, dim: Any, unbiased: Any, keepdim: bool, correction: Any) -> Jet:
    """In float32 at least."""
    if isinstance(dim, bool):  # which is `unbiased` then
        raise NoRule
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    wide, dims = x.like(at_least_float32(x.stack)), axes(dim, x.ndim)
    centred = x.like(wide.stack - wide.stack.mean(dims, keepdim=True))
    count = prod([x.shape[each] for each in dims])
    if count <= correction:  # of which PyTorch says what it thinks of that
        raise NoRule
    squares = _sum_of_powers(centred, 2, dim, keepdim)
    return x.like(squares.stack / (count - correction))


@rule(*every("var"))
def _var(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Jet:
    return _variance(x, dim, unbiased, keepdim, correction).typed(x.dtype)


@rule(*every("std"))
def _std(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Jet:
    return _root(_variance(x, dim, unbiased, keepdim, correction)).typed(x.dtype)


@rule(torch.var_mean)
def _var_mean(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Jet, Jet]:
    spread = _var(x, dim, unbiased, keepdim, correction=correction)
    return spread, x.like(x.stack.mean(axes(dim, x.ndim), keepdim))


@rule(torch.std_mean)
def _std_mean(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Jet, Jet]:
    spread = _std(x, dim, unbiased, keepdim, correction=correction)
    return spread, x.like(x.stack.mean(axes(dim, x.ndim), keepdim))
