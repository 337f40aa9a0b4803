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
from hosm_losses.derivatives.taylor.jet import Jet, like_samples
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


def _shape(output: Tensor, dim: int) -> list[int]:
    """That in which a bias is broadcast against an output."""
    shape = [1] * output.ndim
    shape[dim] = output.shape[dim]
    return shape


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
    @rule(function)
    def convolved(x: Any, weight: Any, bias: Any = None, *args: Any, **named: Any) -> Any:
        if isinstance(weight, Jet) or isinstance(bias, Jet) or x.ndim != axes + 2:
            raise NoRule

        def biased(samples: Tensor) -> Tensor:
            output = function(samples, weight, None, *args, **named)
            return _with_bias(output, bias, x.shape[0], 1)

        return like_samples(biased, x)


for _axes in (1, 2, 3):
    for _name in ("conv", "conv_transpose"):
        _convolution(getattr(F, f"{_name}{_axes}d"), _axes)
