"""Rules for layers of weights: one call on the value and its derivatives as one larger batch.

The bias belongs to the value alone.
"""

__all__: list[str] = []

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses._torch_internals import traced
from hosm_losses.derivatives.taylor.jet import Jet
from hosm_losses.derivatives.taylor.table import NoRule, rule


class _AddInPlace(torch.autograd.Function):
    """Add a bias to the first rows of what a layer has just made, without a copy of the rest."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor, rows: int, dim: int) -> Tensor:
        ctx.rows, ctx.shape, ctx.dtype = rows, _shape(output, dim), bias.dtype
        output[:rows] += bias.reshape(ctx.shape)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        own = cotangent[: ctx.rows].sum_to_size(ctx.shape).flatten().to(ctx.dtype)
        return cotangent, own, None, None


def _shape(output: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(
        size if axis == dim % output.ndim else 1 for axis, size in enumerate(output.shape)
    )


def _with_bias(output: Tensor, bias: Tensor | None, rows: int, dim: int) -> Tensor:
    if bias is None:
        return output
    if traced():
        value = output[:rows] + bias.reshape(_shape(output, dim))
        return torch.cat([value.to(output.dtype), output[rows:]])
    return _AddInPlace.apply(output, bias, rows, dim)  # pyright: ignore[reportReturnType]


@rule(F.linear)
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, Jet) or isinstance(bias, Jet) or weight.ndim != 2 or x.ndim == 0:
        raise NoRule
    return x.like(_with_bias(F.linear(x.stack, weight), bias, 1, -1))


def _convolution(function: Callable[..., Any], axes: int) -> None:
    def convolved(x: Any, weight: Any, bias: Any = None, *args: Any, **named: Any) -> Any:
        if isinstance(weight, Jet) or isinstance(bias, Jet) or x.ndim != axes + 2:
            raise NoRule
        count, batch = x.stack.shape[:2]
        output = function(x.stack.flatten(0, 1), weight, None, *args, **named)
        return x.like(_with_bias(output, bias, batch, 1).unflatten(0, (count, batch)))

    rule(function)(convolved)


for _axes, _functions in enumerate(
    (
        (F.conv1d, F.conv_transpose1d),
        (F.conv2d, F.conv_transpose2d),
        (F.conv3d, F.conv_transpose3d),
    ),
    start=1,
):
    for _function in _functions:
        _convolution(_function, _axes)
