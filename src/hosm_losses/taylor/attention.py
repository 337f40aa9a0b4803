r"""Rules for attention: two products of matrices and a softmax, whose result is kept."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from hosm_losses.taylor.arithmetic import add, multiply
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.jet import Jet
from hosm_losses.taylor.layers import linear
from hosm_losses.taylor.matrices import matmul
from hosm_losses.taylor.primitives import (
    added_to_logits,
    attends,
    attention_weights,
    causal_mask,
    merged_masks,
)
from hosm_losses.taylor.shapes import dropped
from hosm_losses.taylor.softmax import softmax
from hosm_losses.taylor.table import rule


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
    if isinstance(attn_mask, Jet) or query.ndim < 3:
        raise NoRule
    if enable_gqa:
        key, value = (_for_every_head(each, query) for each in (key, value))
    weights = _weights(query, key, attn_mask, is_causal, scale)
    return _mixed(_dropped(weights, dropout_p), value, attn_mask)


def _weights(
    query: Any, key: Any, attn_mask: Any, is_causal: bool = False, scale: float | None = None
) -> Any:
    """The weights of attention, in float32 at least; a Jet if query or key is one."""
    if not isinstance(query, Jet) and not isinstance(key, Jet):
        return attention_weights(query, key, attn_mask, is_causal, scale)
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    query = multiply(query, factor) if isinstance(query, Jet) else query * factor
    key = key.like(key.stack.mT) if isinstance(key, Jet) else key.mT
    logits = matmul(query, key)
    logits = logits.typed(torch.promote_types(logits.dtype, torch.float32))
    if is_causal:
        attn_mask = causal_mask(logits)
    if attn_mask is not None:
        logits = add(logits, added_to_logits(attn_mask, logits.dtype))
    return softmax(logits, -1)


def _for_every_head(x: Any, query: Any) -> Any:
    """Keys or values (…, heads, L, E), each repeated for the heads of the query that share it."""
    heads = x.shape[-3]
    if query.ndim != x.ndim or x.ndim < 4 or query.shape[-3] % heads:
        raise NoRule
    stack = x.stack if isinstance(x, Jet) else x
    stack = stack.repeat_interleave(query.shape[-3] // heads, -3)
    return x.like(stack) if isinstance(x, Jet) else stack


def _dropped(weights: Any, p: float) -> Any:
    return dropped(F.dropout, weights, p) if isinstance(weights, Jet) else F.dropout(weights, p)


def _mixed(weights: Any, value: Any, attn_mask: Any) -> Jet:
    dtype = value.dtype
    weights = weights.typed(dtype) if isinstance(weights, Jet) else weights.to(dtype)
    mixed = matmul(weights, value)
    return mixed if attn_mask is None else multiply(mixed, attends(attn_mask))


def _projected(x: Any, weight: Any, bias: Any) -> Any:
    return linear(x, weight, bias) if isinstance(x, Jet) else F.linear(x, weight, bias)


def _in_heads(x: Any, heads: int) -> Any:
    """(L, N, E) as (N, heads, L, E/heads)."""
    if isinstance(x, Jet):
        return x.like(x.stack.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4))
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


@rule(F.multi_head_attention_forward, several=True)
def _multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,  # noqa: ARG001
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Jet, Any]:
    added = (bias_k, bias_v, static_k, static_v)
    masks = (attn_mask, key_padding_mask)
    if any(each is not None for each in added) or add_zero_attn or query.ndim != 3:
        raise NoRule
    if any(isinstance(each, Jet) for each in masks) or (is_causal and attn_mask is None):
        raise NoRule
    separate = q_proj_weight, k_proj_weight, v_proj_weight
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    if query is key is value and not use_separate_proj_weight:
        joined = _projected(query, in_proj_weight, in_proj_bias)
        parts = [query.like(part) for part in joined.stack.chunk(3, -1)]
    else:
        weights = separate if use_separate_proj_weight else in_proj_weight.chunk(3)
        given = zip((query, key, value), weights, biases, strict=True)
        parts = [_projected(*each) for each in given]
    q, k, v = (_in_heads(part, num_heads) for part in parts)
    mask = merged_masks(attn_mask, key_padding_mask, num_heads)
    if need_weights and mask is not None:  # where PyTorch makes NaN of a row without weights
        mask = added_to_logits(mask, q.dtype).masked_fill(~attends(mask), math.nan)
    weights = _weights(q, k, mask)
    weights = _dropped(weights, dropout_p if training else 0.0)
    mixed = _mixed(weights, v, mask)
    joined = mixed.like(mixed.stack.permute(0, 3, 1, 2, 4).flatten(-2))
    output = linear(joined, out_proj_weight, out_proj_bias)
    if not need_weights:
        return output, None
    if not isinstance(weights, Jet):
        return output, weights.mean(1) if average_attn_weights else weights
    return output, weights.like(weights.stack.mean(2)) if average_attn_weights else weights
