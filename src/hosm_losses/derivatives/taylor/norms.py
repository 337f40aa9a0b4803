"""Rules for norms; see `hosm_losses.derivatives.taylor.norm_formulas` for what they compute."""

__all__: list[str] = []

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.derivatives.primitives import at_least_float32, per_channel
from hosm_losses.derivatives.taylor.arithmetic import add, multiply
from hosm_losses.derivatives.taylor.jet import CHANGES, Jet, TaylorError
from hosm_losses.derivatives.taylor.norm_formulas import Rows, evaluate
from hosm_losses.derivatives.taylor.norm_gradients import pull_back, pull_back_again
from hosm_losses.derivatives.taylor.pointwise import apply, power
from hosm_losses.derivatives.taylor.recompute import Formula, recomputed
from hosm_losses.derivatives.taylor.table import NoRule, axes, rule


def _apply(rows: Rows, x: Jet, weight: Tensor | None, bias: Tensor | None) -> Jet:
    again = None
    if x.pairs == "none" and x.firsts == 1:
        again = Formula(partial(pull_back_again, rows))
    along = x.firsts, x.pairs
    formula = Formula(
        partial(evaluate, rows, *along),
        Formula(partial(pull_back, rows, *along), again),
    )
    return x.like(recomputed(formula, x.stack, weight, bias))


def _plain(*others: object) -> bool:
    return not any(isinstance(other, Jet) for other in others)


@rule(F.layer_norm, torch.layer_norm)
def _layer_norm(
    x: Any,
    normalized_shape: Iterable[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Any:
    return _over_last(x, normalized_shape, weight, bias, eps, centred=True)


# Whether the eps that PyTorch adds by itself for a short type is that of float32.
_WIDE = bool(F.rms_norm(torch.full((1, 1), 2**-8, dtype=torch.bfloat16, device="cpu"), (1,)) > 0.5)


def _is_short(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


@rule(F.rms_norm, torch.rms_norm)
def _rms_norm(
    x: Any, normalized_shape: Iterable[int], weight: Any = None, eps: float | None = None
) -> Any:
    if eps is None:
        eps = torch.finfo(torch.float32 if _WIDE and _is_short(x) else x.dtype).eps
    return _over_last(x, normalized_shape, weight, None, eps, centred=False)


def _over_last(
    x: Any, shape: Iterable[int], weight: Any, bias: Any, eps: float, *, centred: bool
) -> Jet:
    if not _plain(weight, bias) or not isinstance(shape, tuple | list):
        raise NoRule
    shape = tuple(shape)
    if not 0 < len(shape) < x.ndim:  # a row is a part of a sample
        raise NoRule
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"norm: expected an input that ends in {shape}; got {tuple(x.shape)}.")
    size = math.prod(shape)
    rows = (*x.shape[1 : -len(shape)], 1, size)
    return _apply(Rows(rows, (1, size), eps, centred), x, weight, bias)


@rule(F.group_norm, torch.group_norm)
def _group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Any:
    if not _plain(weight, bias) or x.ndim < 2:
        raise NoRule
    channels = x.shape[1]
    if channels % num_groups:
        raise ValueError(
            f"group_norm: expected channels that {num_groups} groups divide; got {channels}."
        )
    each = channels // num_groups
    rows = (num_groups, each, math.prod(x.shape[2:]))
    return _apply(Rows(rows, (num_groups, each, 1), eps, centred=True), x, weight, bias)


def _standardised_over(x: Jet, dims: tuple[int, ...], eps: float) -> Jet:
    """Centred and divided by the deviation over the batch and other axes, in float32 at least."""
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    order = (0, *(dim + 1 for dim in (*kept, *dims)))
    stack = x.stack.permute(order)
    shape = (*stack.shape[2 : 1 + len(kept)], 1, math.prod(stack.shape[1 + len(kept) :]))
    rows = Rows(shape, (), eps, centred=True)
    standard = _apply(rows, x.like(stack), None, None).stack
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.like(standard.permute(back))


def _affine(x: Jet, weight: Tensor | None, bias: Tensor | None) -> Jet:
    shape = per_channel(x)
    scaled = x if weight is None else multiply(x, weight.reshape(shape))
    shifted = scaled if bias is None else add(scaled, bias.reshape(shape))
    return x.like(shifted.stack.to(x.dtype))


@rule(F.batch_norm)
def _batch_norm(
    x: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if x.ndim < 2 or not isinstance(x, Jet) or not _plain(weight, bias, running_mean, running_var):
        raise NoRule
    if not training:
        if running_mean is None or running_var is None:
            raise TaylorError("batch_norm: expected its statistics, as in evaluation.")
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale
        return _affine(x, scale, shift if bias is None else shift + bias)
    value = x.stack[0].detach()
    with torch.no_grad():
        # The operator updates its statistics, and refuses a single value a channel.
        F.batch_norm(value, running_mean, running_var, None, None, True, momentum, eps)
    return _affine(_standardised_over(x, (0, *range(2, x.ndim)), eps), weight, bias)


@rule(F.instance_norm)
def _instance_norm(
    x: Any,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if x.ndim < 3 or not isinstance(x, Jet) or not _plain(weight, bias, running_mean, running_var):
        raise NoRule
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    with torch.no_grad():
        value = x.stack[0].detach()
        F.instance_norm(value, running_mean, running_var, None, None, True, momentum, eps)
    return _group_norm(x, x.shape[1], weight, bias, eps)


def _sum_of_squares(x: Any, dim: Any, keepdim: bool) -> Jet:
    """In float32 at least, in which the square of a small number is not zero."""
    if not isinstance(x, Jet) or x.ndim == 0:
        raise NoRule
    dims = axes(dim, x.ndim)
    wide = x.like(at_least_float32(x.stack))
    return x.like(multiply(wide, wide).stack.sum(dims, keepdim))


@rule(F.normalize)
def _normalize(
    x: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Jet:
    _not_into(out)
    if not isinstance(p, float | int) or p != 2:
        raise NoRule
    squares = _sum_of_squares(x, dim, keepdim=True).stack
    enough = squares[:1] > eps**2
    # A norm below eps counts as eps, which does not depend on x.
    floor = torch.cat([torch.full_like(squares[:1], eps**2), torch.zeros_like(squares[1:])])
    clamped = x.like(torch.where(enough, squares, floor))
    normalized = multiply(x, apply(partial(power, exponent=-0.5), clamped))
    return x.like(normalized.stack.to(x.dtype))


def _not_into(out: Any) -> None:
    if out is not None:
        raise TaylorError(f"out: {CHANGES}")


@rule(torch.linalg.vector_norm)
def _vector_norm(
    x: Any,
    ord: Any = 2,  # noqa: A002
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Jet:
    if not isinstance(ord, float | int) or ord != 2 or dtype is not None:
        raise NoRule
    return _length(x, dim, keepdim)


def _length(x: Any, dim: Any, keepdim: bool) -> Jet:
    squares = _sum_of_squares(x, dim, keepdim).stack
    # At zero a length has no derivative; PyTorch takes it to be constant there.
    none = squares[:1] == 0
    ones = torch.cat([torch.ones_like(squares[:1]), torch.zeros_like(squares[1:])])
    root = apply(partial(power, exponent=0.5), x.like(torch.where(none, ones, squares)))
    return x.like(root.stack.masked_fill(none, 0).to(x.dtype))


@rule(Tensor.norm)
def _norm_method(
    x: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Jet:
    # For a matrix norm, and "fro" of more than two axes, PyTorch has rules of its own.
    several = isinstance(dim, tuple | list) and len(dim) > 2
    if p == "fro" and not several:
        p = 2
    return _vector_norm(x, p, dim, keepdim, dtype=dtype)


@rule(torch.norm)
def _norm(
    x: Any,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: Any = None,
) -> Jet:
    _not_into(out)
    return _norm_method(x, p, dim, keepdim, dtype)
