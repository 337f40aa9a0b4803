r"""Rules for norms."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.along import at_least_float32
from hosm_losses.taylor.arithmetic import add, multiply
from hosm_losses.taylor.errors import NoRule, TaylorError
from hosm_losses.taylor.jet import Jet
from hosm_losses.taylor.normalised import Rows, stack_of_norm
from hosm_losses.taylor.primitives import per_channel
from hosm_losses.taylor.table import axes, rule


def _norm(rows: Rows, x: Any, weight: Any = None, bias: Any = None) -> Jet:
    return x.like(stack_of_norm(rows, x.firsts, x.pairs, x.stack, weight, bias))


@rule(F.layer_norm, torch.layer_norm)
def _layer_norm(
    x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Jet:
    return _over_last(x, normalized_shape, weight, bias, eps, centred=True)


# Whether the eps that PyTorch adds by itself for a short type is that of float32.
_WIDE = bool(F.rms_norm(torch.full((1, 1), 2**-8, dtype=torch.bfloat16, device="cpu"), (1,)) > 0.5)


@rule(F.rms_norm, torch.rms_norm)
def _rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Jet:
    if eps is None:
        eps = torch.finfo(at_least_float32(x.stack).dtype if _WIDE else x.dtype).eps
    return _over_last(x, normalized_shape, weight, None, eps, centred=False)


def _over_last(x: Any, shape: Any, weight: Any, bias: Any, eps: float, *, centred: bool) -> Jet:
    if not isinstance(shape, tuple | list) or not 0 < len(shape) < x.ndim:
        raise NoRule  # as where a row is not a part of a sample
    shape = tuple(shape)
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"norm: expected an input that ends in {shape}; got {tuple(x.shape)}.")
    dims = tuple(range(-len(shape), 0))
    return _norm(Rows(tuple(x.shape), dims, shape, eps, centred), x, weight, bias)


@rule(F.group_norm, torch.group_norm)
def _group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Jet:
    if x.ndim < 2:
        raise NoRule
    batch, channels, *_ = x.shape
    if channels % num_groups:
        raise ValueError(
            f"group_norm: expected channels that {num_groups} groups divide; got {channels}."
        )
    each = channels // num_groups
    shape = (batch, num_groups, each, x.shape[2:].numel())
    return _norm(Rows(shape, (-2, -1), (num_groups, each, 1), eps), x, weight, bias)


def _move_statistics(norm: Callable[..., Tensor], x: Jet, *statistics: Any) -> None:
    """Let the operator update its statistics, and refuse a single value a channel."""
    mean, variance, momentum, eps = statistics
    with torch.no_grad():
        norm(x.stack[0].detach(), mean, variance, None, None, True, momentum, eps)


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
) -> Jet:
    if x.ndim < 2:
        raise NoRule
    channels = per_channel(x)
    if training:
        _move_statistics(F.batch_norm, x, running_mean, running_var, momentum, eps)
        dims = axes((0, *range(2, x.ndim)), x.ndim)
        return _norm(Rows(tuple(x.shape), dims, channels, eps), x, weight, bias)
    if running_mean is None or running_var is None:
        raise TaylorError("batch_norm: expected its statistics, as in evaluation.")
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    scaled = multiply(x, scale.reshape(channels))
    return add(scaled, shift.reshape(channels)).typed(x.dtype)


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
) -> Jet:
    if x.ndim < 3:
        raise NoRule
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    _move_statistics(F.instance_norm, x, running_mean, running_var, momentum, eps)
    return _group_norm(x, x.shape[1], weight, bias, eps)
