r"""Attention: two products of matrices and a softmax, whose result is kept."""

import math
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.composites import composite
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.tensor import Jet


@composite(F.scaled_dot_product_attention, primitive=True)
def _attention(
    ops: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if isinstance(attn_mask, Jet) or (is_causal and attn_mask is not None):
        raise NoRule
    if enable_gqa:  # each key and value serves several heads of the query
        if min(query.ndim, key.ndim) < 4 or query.shape[-3] % key.shape[-3]:
            raise NoRule
        times = query.shape[-3] // key.shape[-3]
        key, value = (ops.repeat_interleave(each, times, -3) for each in (key, value))
    if is_causal:
        places = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(places, dtype=torch.bool, device=query.device).tril()
    return _attend(ops, query, key, value, attn_mask, dropout_p, scale)[0]


def _attend(
    ops: Any, query: Any, key: Any, value: Any, mask: Any, dropout_p: float, scale: Any = None
) -> tuple[Any, Any]:
    """Attention and its weights; both are zero where a row of the mask allows nothing."""
    factor: Any = query.shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(query, Jet):
        # A vector where a number would do: autograd saves it, and the native kernel saves nothing
        # like it. So torch's own checkpoint, which recomputes with that, sees the difference.
        factor = query.new_full(query.shape[-1:], factor)
    logits = ops.matmul(ops.mul(query, factor), ops.transpose(key, -2, -1))
    logits = ops.to(logits, torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        logits = ops.add(logits, _additive_mask(mask, logits.dtype))
    weights = ops.dropout(ops.to(ops.softmax(logits, -1), value.dtype), dropout_p, True)
    mixed = ops.matmul(weights, value)
    return (mixed if mask is None else ops.mul(mixed, _allows_any(mask))), weights


def _allows_any(attn_mask: Tensor) -> Tensor:
    """Whether each row of a mask allows anything: the others are zeros in PyTorch's attention."""
    allowed = attn_mask if attn_mask.dtype == torch.bool else ~attn_mask.isneginf()
    return allowed.any(-1, keepdim=True)


def _additive_mask(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask of attention adds to logits: nothing in a row of -inf alone, which makes NaN."""
    rows = _allows_any(attn_mask)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf)
    return attn_mask.masked_fill(~rows, 0.0).to(dtype)


def _merge_masks(attn_mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """Both masks of nn.MultiheadAttention, in which True blocks, as one that is added."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, heads)) if attn_mask.ndim == 3 else attn_mask)
    if padding is not None:
        masks.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
    masks = [torch.where(x, -math.inf, 0.0) if x.dtype == torch.bool else x for x in masks]
    return sum(masks[1:], masks[0]) if masks else None


_PARAMETERS = signature(F.multi_head_attention_forward).parameters.values()
_NAMES = [each.name for each in _PARAMETERS]
_DEFAULTS = {each.name: each.default for each in _PARAMETERS}


@composite(F.multi_head_attention_forward, primitive=True)
def _multi_head_attention(ops: Any, *args: Any, **named: Any) -> tuple[Any, Any]:
    given = _DEFAULTS | dict(zip(_NAMES, args, strict=False)) | named
    query, key, value = given["query"], given["key"], given["value"]
    heads, need_weights = given["num_heads"], given["need_weights"]
    masks = given["attn_mask"], given["key_padding_mask"]
    added = [given[name] for name in ("bias_k", "bias_v", "static_k", "static_v")]
    if any(each is not None for each in added) or given["add_zero_attn"] or query.ndim != 3:
        raise NoRule
    if any(isinstance(each, Jet) for each in masks) or (given["is_causal"] and masks[0] is None):
        raise NoRule
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    separate = given["use_separate_proj_weight"]
    if query is key is value and not separate:
        parts = ops.chunk(ops.linear(query, weight, bias), 3, -1)
    else:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"] if separate else weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        parts = map(ops.linear, (query, key, value), weights, biases)
    # (L, N, E) as (N, heads, L, E/heads)
    q, k, v = (ops.permute(ops.unflatten(x, -1, (heads, -1)), (1, 2, 0, 3)) for x in parts)
    mask = _merge_masks(*masks, heads)
    if need_weights and mask is not None:  # where PyTorch makes NaN of a row without weights
        mask = _additive_mask(mask, q.dtype).masked_fill(~_allows_any(mask), math.nan)
    dropout_p = given["dropout_p"] if given["training"] else 0.0
    mixed, weights = _attend(ops, q, k, v, mask, dropout_p)
    output = ops.flatten(ops.permute(mixed, (2, 0, 1, 3)), -2)
    output = ops.linear(output, given["out_proj_weight"], given["out_proj_bias"])
    if not need_weights:
        return output, None
    return output, ops.mean(weights, 1) if given["average_attn_weights"] else weights
