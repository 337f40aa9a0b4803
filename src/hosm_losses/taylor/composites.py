r"""Operators composed of a few others: one body serves Jets and plain tensors.

A body takes `ops` before the arguments of its operator. `ops.softmax(x, -1)` calls a function of
torch, of torch.nn.functional or a method of Tensor: as it is on plain tensors, by its rule on
Jets. Written as `torch.softmax(x, -1)` torch.compile would take a Jet for a plain tensor.

With `primitive=True` the body also takes the operator's place where reverse mode differentiates a
network: see `primitive_mode`.

Attention is two products of matrices and a softmax, whose result is kept. Of lengths of vectors,
and distances, angles and spreads made of them, PyTorch's own formulas in forward mode cannot be
differentiated again where they fill in a zero. At zero a length has no derivative; as in PyTorch
it is taken to be constant there.
"""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.registry import PRIMITIVES, RULES, Function, axes, functions_named, rule
from hosm_losses.taylor.tensor import Jet, call


def _on_jets(function: Function) -> Function:
    """A function by its rule, where an argument is a Jet or has one in a list."""

    def called(*args: Any, **named: Any) -> Any:
        for each in args:
            for one in each if isinstance(each, list) else (each,):
                if isinstance(one, Jet):
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
ON_JETS: Any = SimpleNamespace(**{name: _on_jets(each) for name, each in _FUNCTIONS.items()})
ON_TENSORS.value = Tensor.detach  # the plain value of what may be a Jet
ON_JETS.value = lambda x: (x.stack[0] if isinstance(x, Jet) else x).detach()


def composite(
    *names: str | Function, several: bool = True, primitive: bool = False
) -> Callable[[Function], Function]:
    """Register a body for functions of PyTorch.

    Args:
        names: of the functions, or these.
        several: whether other arguments than the first may be Jets.
        primitive: whether it takes their place in reverse mode as well.
    """

    def register(body: Function) -> Function:
        rule(*names, several=several, kind="composite")(partial(body, ON_JETS))
        for each in functions_named(*names) if primitive else ():
            PRIMITIVES[each] = partial(_primitive, each, body)
        return body

    return register


def _primitive(function: Function, body: Function, *args: Any, **named: Any) -> Any:
    taken = RULES[function].takes(args, named)
    if taken is not None:
        try:
            found = body(ON_TENSORS, *taken[0], **taken[1])
        except NoRule:
            pass
        else:
            return taken[0][0].copy_(found) if named.get("inplace") else found
    return function(*args, **named)


def refuse(name: str, expected: str, x: Tensor) -> None:
    """Raise for an argument whose shape an operator does not take."""
    raise ValueError(f"{name}: expected {expected}; got {tuple(x.shape)}.")


@composite(F.glu, primitive=True)
def _glu(ops: Any, input: Any, dim: int = -1) -> Any:  # noqa: A002
    if input.shape[dim] % 2:
        refuse("glu", f"an even size in dimension {dim}", input)
    value, gate = ops.chunk(input, 2, dim)
    return ops.mul(value, ops.sigmoid(gate))


@composite(F.mish, primitive=True)
def _mish(ops: Any, input: Any) -> Any:  # noqa: A002
    """By softplus: the second derivative of PyTorch's own is NaN above 88 in float32."""
    return ops.mul(input, ops.tanh(ops.softplus(input)))


@composite("logaddexp", primitive=True)
def _logaddexp(ops: Any, input: Any, other: Any) -> Any:  # noqa: A002
    """By softplus: the second derivative of PyTorch's own is NaN 88 apart in float32."""
    larger = ops.ge(input, other)
    high, low = ops.where(larger, input, other), ops.where(larger, other, input)
    infinite = ops.eq(high, low) & ops.isinf(high)
    return ops.add(high, ops.softplus(ops.masked_fill(ops.sub(low, high), infinite, 0.0)))


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
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both.")
    if isinstance(attn_mask, Jet):
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


def _wide(ops: Any, x: Any) -> Any:
    return ops.to(x, torch.promote_types(x.dtype, torch.float32))


def _over_largest(ops: Any, x: Any, dim: Any) -> tuple[Any, Tensor]:
    """x in float32 at least over the largest element of each row, and that.

    A length is homogeneous, so the divisor counts as constant. Without it the powers that are in
    derivatives of short vectors are out of float32's range.
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
    """The p-th root of what is zero or more, constant at zero."""
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
    """The length of vectors: other norms of matrices have no rule."""
    if p == "fro" and (dim is None or isinstance(dim, int) or len(dim) <= 2):
        p = 2
    floating = dtype is None or dtype.is_floating_point
    if not floating or not isinstance(p, float | int) or not 1 <= p < float("inf"):
        raise NoRule
    x = x if dtype is None else ops.to(x, dtype)
    return ops.to(_length(ops, x, p, dim, keepdim), x.dtype)


@composite(torch.linalg.vector_norm, several=False)
def _vector_norm(ops: Any, x: Any, p: Any = 2, *rest: Any, **named: Any) -> Any:
    return _norm(ops, x, None if p == "fro" else p, *rest, **named)


@composite(torch.linalg.norm, several=False)
def _vector_or_matrix_norm(
    ops: Any, x: Any, p: Any = None, dim: Any = None, *rest: Any, **named: Any
) -> Any:
    count = x.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
    if p is not None and (count > 2 or (p == "fro") != (count == 2)):
        raise NoRule
    return _norm(ops, x, 2 if p is None else p, dim, *rest, **named)


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
    """The variance over some axes, or its root, with the mean if asked for."""
    if isinstance(dim, bool):  # `unbiased` in its place
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    wide, dims = _wide(ops, x), axes(dim, x.ndim)
    count = prod([x.shape[each] for each in dims]) - correction
    if count <= 0:  # of which PyTorch says what it thinks of that
        raise NoRule
    centred = ops.sub(wide, ops.mean(wide, dims, True))
    if root:
        found = ops.div(_length(ops, centred, 2, dims, keepdim), count**0.5)
    else:
        found = ops.div(_sum_of_powers(ops, centred, 2, dims, keepdim), count)
    found = ops.to(found, x.dtype)
    return (found, ops.mean(x, dims, keepdim)) if with_mean else found


for _names in ("var", "std", "var_mean", "std_mean"):
    composite(_names, several=False)(partial(_spread, "std" in _names, "mean" in _names))
