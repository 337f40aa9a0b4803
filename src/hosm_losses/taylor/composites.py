r"""Operators composed of a few other operators; one body serves both Jets and plain tensors.

A body takes `ops` as its first argument, followed by the operator's own arguments. An attribute
of `ops`, such as `ops.softmax`, calls the function or method of the same name in torch,
torch.nn.functional or Tensor. For plain tensors, `ops` calls the function itself; for Jets, `ops`
calls the function's rule. If a body called `torch.softmax(x, -1)` directly, torch.compile would
mistake a Jet for a plain tensor.

With `primitive=True`, the body also replaces the operator when a network is differentiated in
reverse mode; see `primitives`.

Lengths of vectors, and quantities derived from lengths (distances, angles and spreads), are
composites. PyTorch's own forward-mode formulas set an undefined quotient to zero, and cannot be
differentiated again where the quotient is undefined. A length is not differentiable where it is
zero; as in PyTorch, it is treated as a constant there.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.jets import Jet, call
from hosm_losses.taylor.registry import (
    PRIMITIVES,
    RULES,
    Function,
    NoRule,
    axes,
    axis,
    functions_named,
    rule,
)


def _on_jets(function: Function) -> Function:
    """Wrap a function so that its rule is used if an argument is a Jet or a list with a Jet."""

    def called(*args: Any, **named: Any) -> Any:
        for arg in args:
            for item in arg if isinstance(arg, list) else (arg,):
                if isinstance(item, Jet):
                    return call(function, args, named)
        return function(*args, **named)

    return called


_FUNCTIONS = {
    name: function
    for home in (Tensor, F, torch)
    for name, function in ((name, getattr(home, name)) for name in dir(home))
    if callable(function) and not name.startswith("_")
}
ON_TENSORS: Any = SimpleNamespace(**_FUNCTIONS)
ON_JETS: Any = SimpleNamespace(**{name: _on_jets(f) for name, f in _FUNCTIONS.items()})
ON_TENSORS.value = Tensor.detach  # the plain value of an argument that may be a Jet
ON_JETS.value = lambda x: (x.stack[0] if isinstance(x, Jet) else x).detach()


def composite(
    *names: str | Function, several: bool = True, primitive: bool = False
) -> Callable[[Function], Function]:
    """Register the decorated function as the rule for PyTorch functions.

    Args:
        names: the functions, or their names.
        several: whether arguments other than the first may be Jets.
        primitive: whether the body also replaces the functions in reverse mode.
    """

    def register(body: Function) -> Function:
        rule(*names, several=several, kind="composite")(partial(body, ON_JETS))
        for function in functions_named(*names) if primitive else ():
            PRIMITIVES[function] = partial(_primitive, function, body)
        return body

    return register


def _primitive(function: Function, body: Function, *args: Any, **named: Any) -> Any:
    taken = RULES[function].takes(args, named)
    if taken is not None:
        try:
            return body(ON_TENSORS, *taken[0], **taken[1])
        except NoRule:
            pass
    return function(*args, **named)


@composite(F.glu, primitive=True)
def _glu(ops: Any, input: Any, dim: int = -1) -> Any:  # noqa: A002
    if input.shape[dim] % 2:
        raise NoRule  # PyTorch rejects this call
    value, gate = ops.chunk(input, 2, dim)
    return ops.mul(value, ops.sigmoid(gate))


@composite("logaddexp", primitive=True)
def _logaddexp(ops: Any, input: Any, other: Any) -> Any:  # noqa: A002
    """Use softplus; PyTorch's second derivative is NaN for float32 arguments over 88 apart."""
    larger = ops.ge(input, other)
    high, low = ops.where(larger, input, other), ops.where(larger, other, input)
    infinite = ops.eq(high, low) & ops.isinf(high)
    return ops.add(high, ops.softplus(ops.masked_fill(ops.sub(low, high), infinite, 0.0)))


@composite("prod", several=False)
def _prod(ops: Any, x: Any, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Repeatedly multiply half the factors by the other half.

    The third derivative of torch.prod is NaN if a factor is zero.
    """
    dim, dtype = axis(dim, x.ndim), dtype or x.dtype
    x, count = _wide(ops, ops.to(x, dtype)), x.shape[dim]
    if not count or not dtype.is_floating_point:
        raise NoRule
    while count > 1:
        left, right, rest = ops.split(x, [count // 2, count // 2, count % 2], dim)
        x = ops.cat([ops.mul(left, right), rest], dim)
        count = x.shape[dim]
    return ops.to(x if keepdim else ops.squeeze(x, dim), dtype)


# ----------------------------------------------------------------------------- lengths and spreads
def _wide(ops: Any, x: Any) -> Any:
    return ops.to(x, torch.promote_types(x.dtype, torch.float32))


def _over_largest(ops: Any, x: Any, dim: Any) -> tuple[Any, Tensor]:
    """Return x / d and d in at least float32, where d is the largest |x| in each row.

    A length is homogeneous in x, so d can be treated as a constant. Without the division, the
    derivatives for vectors of small norm would contain powers outside float32's range.
    """
    if x.ndim == 0:
        raise NoRule
    wide = _wide(ops, x)
    largest = ops.value(wide).abs().amax(axes(dim, x.ndim), keepdim=True)
    largest = largest.where((largest > 0) & largest.isfinite(), 1.0)
    return ops.div(wide, largest), largest


def _sum_of_powers(ops: Any, x: Any, p: float, dim: Any, keepdim: bool) -> Any:
    """Σ |x|^p."""
    powers = x if p == 2 else ops.abs(x)
    powers = powers if p == 1 else ops.pow(powers, p)
    return ops.sum(powers, axes(dim, x.ndim), keepdim)


def _root(ops: Any, powers: Any, p: float) -> Any:
    """The p-th root of nonnegative numbers, treated as a constant at zero."""
    zero = ops.value(powers) == 0
    root = ops.pow(ops.masked_fill(powers, zero, 1.0), 1 / p)
    return ops.masked_fill(root, zero, 0.0)


def _length(ops: Any, x: Any, p: float, dim: Any, keepdim: bool) -> Any:
    """(Σ |x|^p)^(1/p)."""
    over, largest = _over_largest(ops, x, dim)
    powers = _sum_of_powers(ops, over, p, dim, keepdim)
    root = powers if p == 1 else _root(ops, powers, p)
    return ops.mul(root, largest if keepdim else largest.squeeze(axes(dim, x.ndim)))


@composite(F.normalize, several=False)
def _normalize(ops: Any, x: Any, p: Any = 2.0, dim: Any = 1, eps: float = 1e-12) -> Any:
    if not isinstance(p, float | int) or not 1 <= p < float("inf"):
        raise NoRule
    over, largest = _over_largest(ops, x, dim)
    length = _root(ops, _sum_of_powers(ops, over, p, dim, True), p)
    # A length below eps counts as eps, which does not depend on x.
    short = ops.value(length) * largest <= eps
    factor = ops.div(torch.where(short, largest / eps, 1.0), ops.masked_fill(length, short, 1.0))
    return ops.to(ops.mul(over, factor), x.dtype)


@composite("norm", several=False)
def _norm(
    ops: Any, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """The lengths of vectors, or the Frobenius norm; other matrix norms have no rule."""
    if p == "fro" and (dim is None or isinstance(dim, int) or len(dim) <= 2):
        p = 2
    floating = dtype is None or dtype.is_floating_point
    if not floating or not isinstance(p, float | int) or not 1 <= p < float("inf"):
        raise NoRule
    x = x if dtype is None else ops.to(x, dtype)
    return ops.to(_length(ops, x, p, dim, keepdim), x.dtype)


@composite(torch.linalg.vector_norm, several=False)
def _vector_norm(ops: Any, x: Any, p: Any = 2, *args: Any, **named: Any) -> Any:
    return _norm(ops, x, None if p == "fro" else p, *args, **named)


@composite(torch.linalg.norm, several=False)
def _vector_or_matrix_norm(
    ops: Any, x: Any, p: Any = None, dim: Any = None, *args: Any, **named: Any
) -> Any:
    count = x.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
    if p is not None and (count > 2 or (p == "fro") != (count == 2)):
        raise NoRule
    return _norm(ops, x, 2 if p is None else p, dim, *args, **named)


@composite("cdist", primitive=True)
def _cdist(ops: Any, x1: Any, x2: Any, p: Any = 2.0, compute_mode: Any = None) -> Any:  # noqa: ARG001
    if min(x1.ndim, x2.ndim) < 2 or x1.shape[-1] != x2.shape[-1]:
        raise NoRule  # PyTorch rejects this call
    return _norm(ops, ops.sub(ops.unsqueeze(x1, -2), ops.unsqueeze(x2, -3)), p, -1)


@composite("cosine_similarity")
def _cosine_similarity(ops: Any, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """Treat a length below eps as eps, as PyTorch does when it computes the value."""
    dim = axis(dim, max(x1.ndim, x2.ndim))
    if min(x1.ndim, x2.ndim) < -dim or x1.shape[dim] != x2.shape[dim]:
        raise NoRule  # each length is computed after broadcasting
    rows = (_normalize(ops, x, 2, dim, eps) for x in (x1, x2))
    return ops.sum(ops.mul(*rows), dim)


@composite(F.huber_loss)
def _huber_loss(
    ops: Any,
    input: Any,  # noqa: A002
    target: Any,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Any = None,
) -> Any:
    """z²/2 where |z| < δ, and δ (|z| − δ/2) elsewhere, for z = input − target."""
    if weight is not None or delta <= 0 or reduction not in ("none", "mean", "sum"):
        raise NoRule
    z = ops.sub(input, target)
    far = ops.abs(z)
    curved, straight = ops.mul(ops.mul(z, z), 0.5), ops.mul(ops.sub(far, delta / 2), delta)
    loss = ops.where(ops.lt(far, delta), curved, straight)
    return loss if reduction == "none" else getattr(ops, reduction)(loss)


def _spread(
    root: bool,
    with_mean: bool,
    ops: Any,
    x: Any,
    dim: Any = None,
    unbiased: Any = None,
    keepdim: bool = False,
    *,
    correction: Any = None,
) -> Any:
    """The variance over some axes (its square root if `root`), with the mean if `with_mean`."""
    if isinstance(dim, bool):  # `unbiased` was passed in place of `dim`
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    wide, dims = _wide(ops, x), axes(dim, x.ndim)
    count = prod([x.shape[axis] for axis in dims]) - correction
    if count <= 0:  # PyTorch would warn and return NaN
        raise NoRule
    centred = ops.sub(wide, ops.mean(wide, dims, True))
    if root:
        spread = ops.div(_length(ops, centred, 2, dims, keepdim), count**0.5)
    else:
        spread = ops.div(_sum_of_powers(ops, centred, 2, dims, keepdim), count)
    spread = ops.to(spread, x.dtype)
    return (spread, ops.mean(x, dims, keepdim)) if with_mean else spread


for _names in ("var", "std", "var_mean", "std_mean"):
    composite(_names, several=False)(partial(_spread, "std" in _names, "mean" in _names))
