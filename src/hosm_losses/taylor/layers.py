r"""Rules for layers of weights, and for gates.

A layer of weights is one call on the value and its derivatives as one larger batch; the bias
belongs to the value alone.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor._torch import traced
from hosm_losses.taylor.arithmetic import multiply
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.jet import Jet
from hosm_losses.taylor.pointwise import apply, sigmoid
from hosm_losses.taylor.table import axis, rule


class _AddInPlace(torch.autograd.Function):
    """Add a bias to the first rows of what a layer has just made, without a copy of the rest."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor, rows: int) -> Tensor:
        ctx.rows, ctx.shape, ctx.dtype = rows, bias.shape, bias.dtype
        output[:rows].add_(bias)  # not +=, which copies the rows onto themselves
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        return cotangent, cotangent[: ctx.rows].sum_to_size(ctx.shape).to(ctx.dtype), None


def with_bias(output: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The output of a layer, changed, with the bias on its first rows."""
    if bias is None:
        return output
    if traced():
        return torch.cat([(output[:rows] + bias).to(output.dtype), output[rows:]])
    return _AddInPlace.apply(output, bias, rows)  # pyright: ignore[reportReturnType]


@rule(F.linear)
def linear(x: Any, weight: Any, bias: Any = None) -> Jet:
    """The layer of a weight and a bias."""
    if weight.ndim != 2 or x.ndim == 0:
        raise NoRule
    return x.like(with_bias(F.linear(x.stack, weight), bias, 1))


@rule(F.glu)
def _glu(x: Jet, dim: int = -1) -> Jet:
    dim = axis(dim, x.ndim)
    if x.shape[dim] % 2:
        raise ValueError(f"glu: expected an even size in dimension {dim}; got {tuple(x.shape)}.")
    value, gate = x.stack.chunk(2, dim)
    return multiply(x.like(value), apply(sigmoid, x.like(gate)))
