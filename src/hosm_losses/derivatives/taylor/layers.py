r"""Rules for layers: weights, attention and gates.

A layer of weights is one call on the value and its derivatives as one larger batch; the bias
belongs to the value alone.

Attention is two products of matrices and a softmax; its matrix of weights is kept.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses._torch_internals import traced
from hosm_losses.derivatives.primitives import attention_weights, causal_mask
from hosm_losses.derivatives.taylor.arithmetic import add, multiply
from hosm_losses.derivatives.taylor.jet import Jet
from hosm_losses.derivatives.taylor.matrices import matmul
from hosm_losses.derivatives.taylor.pointwise import apply, sigmoid
from hosm_losses.derivatives.taylor.selection import masked_fill
from hosm_losses.derivatives.taylor.softmax import softmax
from hosm_losses.derivatives.taylor.table import NoRule, axis, rule


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
def _linear(x: Any, weight: Any, bias: Any = None) -> Jet:
    if weight.ndim != 2 or x.ndim == 0:
        raise NoRule
    return x.like(with_bias(F.linear(x.stack, weight), bias, 1))


@rule(F.scaled_dot_product_attention, several=True)
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both.")
    if isinstance(attn_mask, Jet) or enable_gqa or query.ndim < 3:
        raise NoRule
    if not isinstance(query, Jet) and not isinstance(key, Jet):
        weights = attention_weights(query, key, attn_mask, is_causal, scale)
        return matmul(F.dropout(weights.to(value.dtype), dropout_p), value)
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    query = multiply(query, factor) if isinstance(query, Jet) else query * factor
    key = key.like(key.stack.mT) if isinstance(key, Jet) else key.mT
    logits = matmul(query, key)
    logits = logits.typed(torch.promote_types(logits.dtype, torch.float32))
    if is_causal:
        attn_mask = causal_mask(logits)
    if attn_mask is None:
        weights = softmax(logits, -1)
    elif attn_mask.dtype == torch.bool:
        masked = masked_fill(logits, ~attn_mask, torch.finfo(logits.dtype).min)
        weights = multiply(softmax(masked, -1), attn_mask.any(-1, keepdim=True))
    else:
        weights = softmax(add(logits, attn_mask), -1)
    if dropout_p:
        weights = multiply(weights, F.dropout(torch.ones_like(weights.stack[0]), dropout_p))
    return matmul(weights.typed(value.dtype), value)


@rule(F.glu)
def _glu(x: Jet, dim: int = -1) -> Jet:
    dim = axis(dim, x.ndim)
    if x.shape[dim] % 2:
        raise ValueError(f"glu: expected an even size in dimension {dim}; got {tuple(x.shape)}.")
    value, gate = x.stack.chunk(2, dim)
    return multiply(x.like(value), apply(sigmoid, x.like(gate)))
