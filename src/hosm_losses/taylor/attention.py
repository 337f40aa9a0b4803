r"""Softmax with its gradients, and attention, computed as two matrix products and a softmax.

Formulas for p = softmax(x), where ⟨z⟩ is the mean under p, z̃ = z − ⟨z⟩ and u_l = x̃_l:
    p_l = p u_l        p_ll = p c̃, where c = u_l² + x_ll

Gradients, for cotangents a of p, b_l of p_l and d_l of p_ll, where Σ without an index sums over
the softmax axis. With β_l = Σ p b_l, δ_l = Σ p d_l, σ_l = 2 Σ p_l (d_l − δ_l) and
w = p a + Σ_l [p_l (b_l − β_l − σ_l) + p_ll (d_l − δ_l)]:
    in x_ll   p (d_l − δ_l)
    in x_l    p (b_l − β_l − σ_l) + 2 p_l (d_l − δ_l)
    in x      w − p Σ w
    These formulas use the result but not x, so only the result is saved.

Second gradients: the gradients with respect to x and x_l are differentiated again, with respect
to the result and its cotangents. The formulas assume that the stack has no second derivatives
p_ll. For cotangents A and B_l of the gradients with respect to x and x_l, with Ã = A − Σ p A and
h_l = p_l Ã + p B_l:
    in a      p Ã
    in b_l    h_l − p Σ h_l
    in p_l    Ã (b_l − β_l)
    in p      Ã a − A Σ w + Σ_l [B_l (b_l − β_l) − b_l Σ h_l]

In attention, softmax and the product of weights and values both save the weights. They save the
same tensor unless rounding or dropout changes the weights in between. In half precision, gradients
are as accurate as PyTorch's, which are also computed from a rounded result.
"""

import math
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.composites import composite
from hosm_losses.taylor.jets import Jet
from hosm_losses.taylor.memory import Needed, with_recomputation
from hosm_losses.taylor.registry import NoRule, axis, rule
from hosm_losses.taylor.stacks import Pairs, add_products, at_least_float32, collect, components


class Softmax(NamedTuple):
    """Softmax of a stack along an axis, with gradients computed from its result."""

    dim: int
    firsts: int
    pairs: Pairs
    length: int  # of the stack

    def evaluate(self, stack: Tensor) -> Tensor:
        """The stack of p = softmax(x)."""
        logits, tangents, seconds = components(at_least_float32(stack), self.firsts)
        weights = torch.softmax(logits, self.dim)

        def subtract_mean(x: Tensor) -> Tensor:
            return x - (weights * x).sum(self.dim, keepdim=True)

        u = subtract_mean(tangents)
        parts = [weights, weights * u]
        if self.pairs != "none":
            c = collect(u * u, self.pairs)
            parts.append(weights * subtract_mean(c + seconds if len(seconds) else c))
        return torch.cat(parts).to(stack.dtype)

    def pull_back(self, _needed: Needed, result: Tensor, cotangent: Tensor) -> tuple[Tensor]:
        """The gradient with respect to the stack."""
        dtype, dim, firsts = result.dtype, self.dim, self.firsts
        result, cotangent = at_least_float32(result), at_least_float32(cotangent)
        weights, tangents, seconds = components(result, firsts)
        gradient = weights * cotangent
        sums = gradient[1:].sum(dim, keepdim=True)
        of_firsts, of_seconds = sums.split_with_sizes((firsts, len(sums) - firsts))
        b, d = (cotangent[1:] - sums).split_with_sizes((firsts, len(of_seconds)))
        of_value = gradient[:1]
        add_products(of_value, tangents, b)
        if self.pairs != "none":
            add_products(of_value, seconds, d)
            dp = 2 * d * tangents
            gradient[1 : 1 + firsts].add_(dp)
            dp = dp.sum(dim, keepdim=True)
            add_products(of_value, tangents, dp, -1)
            of_firsts = of_firsts + dp
        sums = torch.cat([of_value.sum(dim, keepdim=True), of_firsts, of_seconds])
        # Second derivatives that are zero everywhere are not stored, and have no gradient.
        gradient, sums = gradient[: self.length], sums[: self.length]
        return (gradient.addcmul_(weights, sums, value=-1).to(dtype),)

    def pull_back_again(
        self, _needed: Needed, result: Tensor, cotangent: Tensor, again: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the output of `pull_back` with respect to `result` and `cotangent`.

        This method assumes that the stack has no second derivatives.
        """
        dtype = result.dtype
        result, cotangent, again = map(at_least_float32, (result, cotangent, again))
        sizes = 1, len(result) - 1
        weights, tangents = result.split_with_sizes(sizes)
        a, b = cotangent.split_with_sizes(sizes)
        centred, of_firsts = again.split_with_sizes(sizes)
        total = partial(torch.sum, dim=self.dim, keepdim=True)
        of_cotangent = weights * again
        mean = total(of_cotangent[:1])
        of_cotangent[:1].addcmul_(weights, mean, value=-1)
        centred = centred - mean
        of_cotangent[1:].addcmul_(tangents, centred)
        sums = total(of_cotangent[1:])
        of_cotangent[1:].addcmul_(weights, sums, value=-1)
        of_result = centred * cotangent
        means = total(weights * b)
        of_result[1:].addcmul_(centred, means, value=-1)
        of_weights = of_result[:1]
        value = weights * a
        add_products(value, tangents, b - means)
        add_products(of_weights, again[:1], total(value), -1)
        add_products(of_weights, of_firsts, b - means)
        add_products(of_weights, b, sums, -1)
        return of_result.to(dtype), of_cotangent.to(dtype)


@rule("softmax", kind="stack")
def softmax(x: Any, dim: Any = None, dtype: Any = None, *, _stacklevel: int = 3) -> Jet:
    """exp(x) divided by its sum along an axis, with x first cast to `dtype`."""
    if dtype is not None and not dtype.is_floating_point:
        raise NoRule
    stack = x.stack if dtype is None else x.stack.to(dtype)
    row = Softmax(axis(dim, x.ndim), x.firsts, x.pairs, len(stack))
    pullbacks = [row.pull_back, row.pull_back_again] if x.pairs == "none" else [row.pull_back]
    return x.like(with_recomputation(row.evaluate, stack, pullbacks=pullbacks, by_result=True))


# --------------------------------------------------------------------------------------- attention
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
        key, value = (ops.repeat_interleave(tensor, times, -3) for tensor in (key, value))
    if is_causal:
        places = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(places, dtype=torch.bool, device=query.device).tril()
    return _attend(ops, query, key, value, attn_mask, dropout_p, scale)[0]


def _attend(
    ops: Any, query: Any, key: Any, value: Any, mask: Any, dropout_p: float, scale: Any = None
) -> tuple[Any, Any]:
    """Return attention's output and weights; the output is zero where the mask allows no key."""
    factor: Any = query.shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(query, Jet):
        # The factor is a vector, although a number would suffice. Autograd saves the vector, but
        # the native kernel saves no such tensor, so torch's own checkpoint, which recomputes with
        # the native kernel, detects the difference.
        factor = query.new_full(query.shape[-1:], factor)
    logits = ops.matmul(ops.mul(query, factor), ops.transpose(key, -2, -1))
    logits = ops.to(logits, torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        logits = ops.add(logits, _additive_mask(mask, logits.dtype))
    weights = ops.dropout(ops.to(ops.softmax(logits, -1), value.dtype), dropout_p, True)
    mixed = ops.matmul(weights, value)
    return (mixed if mask is None else ops.mul(mixed, _allows_any(mask))), weights


def _allows_any(attn_mask: Tensor) -> Tensor:
    """Which rows of a mask allow a key; in other rows, PyTorch's attention returns zero."""
    allowed = attn_mask if attn_mask.dtype == torch.bool else ~attn_mask.isneginf()
    return allowed.any(-1, keepdim=True)


def _additive_mask(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to logits; it is zero in rows that allow no key, to avoid NaN."""
    rows = _allows_any(attn_mask)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf)
    return attn_mask.masked_fill(~rows, 0.0).to(dtype)


def _merge_masks(attn_mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """Merge nn.MultiheadAttention's masks, where True means blocked, into one additive mask."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, heads)) if attn_mask.ndim == 3 else attn_mask)
    if padding is not None:
        masks.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
    masks = [torch.where(x, -math.inf, 0.0) if x.dtype == torch.bool else x for x in masks]
    return sum(masks[1:], masks[0]) if masks else None


_PARAMETERS = signature(F.multi_head_attention_forward).parameters.values()
_NAMES = [parameter.name for parameter in _PARAMETERS]
_DEFAULTS = {parameter.name: parameter.default for parameter in _PARAMETERS}


@composite(F.multi_head_attention_forward, primitive=True)
def _multi_head_attention(ops: Any, *args: Any, **named: Any) -> tuple[Any, Any]:
    arguments = _DEFAULTS | dict(zip(_NAMES, args, strict=False)) | named
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    heads, need_weights = arguments["num_heads"], arguments["need_weights"]
    masks = arguments["attn_mask"], arguments["key_padding_mask"]
    added = [arguments[name] for name in ("bias_k", "bias_v", "static_k", "static_v")]
    if any(extra is not None for extra in added) or arguments["add_zero_attn"] or query.ndim != 3:
        raise NoRule
    without_mask = arguments["is_causal"] and masks[0] is None
    if without_mask or any(isinstance(mask, Jet) for mask in masks):
        raise NoRule
    weight, bias = arguments["in_proj_weight"], arguments["in_proj_bias"]
    separate = arguments["use_separate_proj_weight"]
    if query is key is value and not separate:
        parts = ops.chunk(ops.linear(query, weight, bias), 3, -1)
    else:
        separate_weights = [arguments[f"{name}_proj_weight"] for name in "qkv"]
        weights = separate_weights if separate else weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        parts = map(ops.linear, (query, key, value), weights, biases)
    # Reshape (L, N, E) to (N, heads, L, E/heads).
    q, k, v = (ops.permute(ops.unflatten(x, -1, (heads, -1)), (1, 2, 0, 3)) for x in parts)
    mask = _merge_masks(*masks, heads)
    if need_weights and mask is not None:  # PyTorch returns NaN for a row that allows no key
        mask = _additive_mask(mask, q.dtype).masked_fill(~_allows_any(mask), math.nan)
    dropout_p = arguments["dropout_p"] if arguments["training"] else 0.0
    mixed, weights = _attend(ops, q, k, v, mask, dropout_p)
    output = ops.flatten(ops.permute(mixed, (2, 0, 1, 3)), -2)
    output = ops.linear(output, arguments["out_proj_weight"], arguments["out_proj_bias"])
    if not need_weights:
        return output, None
    return output, ops.mean(weights, 1) if arguments["average_attn_weights"] else weights
