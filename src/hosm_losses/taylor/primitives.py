r"""The few operators whose higher derivatives PyTorch gets wrong, written so that all are right.

What:
    PyTorch does not differentiate layer norm, batch norm (in training) and instance norm rightly
    more than twice: the parameter gradient of a loss on a directional derivative, at order three
    sometimes the derivative's own value, is off by several to more than a hundred percent, in
    silence. Group norm, attention and the gated linear unit fail loudly on common inputs. Composed
    of means, products and softmax, each is right by every route. `primitive_mode` puts them in.

Source:
    PyTorch issues 175754, 186256, 196699 and 196700; pull request 176234.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor._torch import autocast_of_now, operators, traced
from hosm_losses.taylor.along import at_least_float32
from hosm_losses.taylor.errors import DerivativeError
from hosm_losses.taylor.recompute import recomputed


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """x minus its mean, over its standard deviation, both over `dims`, in float32 at least."""
    x = at_least_float32(x)
    # Sums divided afterwards: the gradient of a mean is written out, that of a sum is a view.
    count = math.prod([x.shape[dim] for dim in dims])
    centred = x - x.sum(dims, keepdim=True) / count
    variance = (centred * centred).sum(dims, keepdim=True) / count
    return centred * torch.rsqrt(variance + eps)


def _affine(
    standard: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    if weight is not None and bias is not None:
        standard = torch.addcmul(bias.reshape(shape), standard, weight.reshape(shape))
    elif weight is not None:
        standard = standard * weight.reshape(shape)
    elif bias is not None:
        standard = standard + bias.reshape(shape)
    return standard.to(dtype)


def per_channel(x: Tensor) -> tuple[int, ...]:
    """The shape in which a number for each channel is broadcast against x (B, C, *)."""
    return (1, x.shape[1], *(1,) * (x.ndim - 2))


def _refuse(name: str, expected: str, x: Tensor) -> None:
    raise ValueError(f"{name}: expected {expected}; got {tuple(x.shape)}.")


def _layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Iterable[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Tensor:
    shape = tuple(normalized_shape)
    if tuple(input.shape[-len(shape) :]) != shape:
        _refuse("layer_norm", f"an input that ends in {shape}", input)
    dims = tuple(range(-len(shape), 0))
    return _affine(_standardise(input, dims, eps), weight, bias, shape, input.dtype)


def _group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Tensor:
    batch, channels = input.shape[:2]
    if channels % num_groups:
        _refuse("group_norm", f"channels that {num_groups} groups divide", input)
    grouped = input.reshape(batch, num_groups, -1)
    standard = _standardise(grouped, (-1,), eps).reshape(input.shape)
    return _affine(standard, weight, bias, per_channel(input), input.dtype)


def _tracking(
    native: Callable[..., Tensor], names: Iterable[str], flag: str, default: bool
) -> Callable[..., Tensor]:
    """Batch or instance norm; `flag`, or its default, says if it takes the input's statistics."""
    names = (*names, flag, "momentum", "eps")

    def norm(*args: Any, **named: Any) -> Tensor:
        given = dict(zip(names, args, strict=False)) | named
        x, of_input = given["input"], given.get(flag, default)
        statistics = given.get("running_mean"), given.get("running_var")
        affine = given.get("weight"), given.get("bias")
        eps = given.get("eps", 1e-5)
        options = of_input, given.get("momentum", 0.1), eps
        if not of_input:
            return native(x, *statistics, *affine, *options)
        dims = (0, *range(2, x.ndim)) if native is F.batch_norm else tuple(range(2, x.ndim))
        if statistics[0] is not None:
            # The operator updates the statistics itself, which it can do inside a transform.
            with torch.no_grad():
                native(x.detach(), *statistics, None, None, *options)
        elif math.prod([x.shape[dim] for dim in dims]) <= 1:
            _refuse(native.__name__, "more than one value for each mean", x)
        return _affine(_standardise(x, dims, eps), *affine, per_channel(x), x.dtype)

    return norm


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = attention_weights(query, key, attn_mask, is_causal, scale)
    mixed = F.dropout(weights.to(value.dtype), dropout_p) @ value
    return mixed if attn_mask is None else mixed * attends(attn_mask)


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The weights of scaled_dot_product_attention, in float32 at least.

    Where a row may attend to nothing they are finite: see `attends`.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both.")
    # A vector where a number would do: autograd saves it, and the native kernel saves nothing like
    # it. So torch's own checkpoint, which recomputes with the native kernel, sees the difference.
    factor = query.new_full(query.shape[-1:], query.shape[-1] ** -0.5 if scale is None else scale)
    logits = at_least_float32((query * factor) @ key.transpose(-2, -1))
    if is_causal:
        attn_mask = causal_mask(logits)
    if attn_mask is not None:
        logits = logits + added_to_logits(attn_mask, logits.dtype)
    return torch.softmax(logits, -1)


def attends(attn_mask: Tensor) -> Tensor:
    """Whether each row of a mask allows anything: the others are zeros in PyTorch's attention."""
    allowed = attn_mask if attn_mask.dtype == torch.bool else ~attn_mask.isneginf()
    return allowed.any(-1, keepdim=True)


def added_to_logits(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask of attention adds to logits: nothing in a row of -inf alone, which makes NaN."""
    rows = attends(attn_mask)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf)
    return attn_mask.masked_fill(~rows, 0.0).to(dtype)


def merged_masks(attn_mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """Both masks of nn.MultiheadAttention, in which True blocks, as one in which it allows."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, heads)) if attn_mask.ndim == 3 else attn_mask)
    if padding is not None:
        masks.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
    added = [mask for mask in masks if mask.is_floating_point()]
    blocked = [mask for mask in masks if mask.dtype == torch.bool]
    if not added:
        return ~reduce(torch.logical_or, blocked) if blocked else None
    total = sum(added[1:], added[0])
    return torch.where(blocked[0], -math.inf, total) if blocked else total


def causal_mask(logits: Tensor) -> Tensor:
    """What each place may attend to: those before it, and itself."""
    return torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()


def _multi_head_attention(
    *args: Any,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """Its own path that returns the weights, which does not call a fused kernel."""
    query, key, heads, rows = args[0], args[1], args[4], None
    longer = args[7] is not None or args[9]  # keys that no mask blocks
    mask = None if need_weights or longer else merged_masks(attn_mask, key_padding_mask, heads)
    if mask is not None:
        batch, length = query.shape[1:-1] or (1,), len(query)
        rows = attends(mask).expand(*batch, heads, length, 1)
        mask = added_to_logits(mask, query.dtype).expand(*batch, heads, length, len(key))
        attn_mask, key_padding_mask = mask.flatten(0, 1), None
    named |= {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    output, weights = F.multi_head_attention_forward(*args, need_weights=True, **named)
    if rows is not None:
        # What its other path makes of a row that attends to nothing; refused if one head does.
        some, every = (
            each.transpose(0, 1).reshape(*output.shape[:-1], 1)
            for each in (rows.any(1), rows.all(1))
        )
        output = torch.where(some, output, 0.0 if args[12] is None else args[12])
        output = output.masked_fill(some & ~every, math.nan)
    return output, weights if need_weights else None


def _glu(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002
    value, gate = input.chunk(2, dim)
    if value.shape != gate.shape:
        _refuse("glu", f"an even size in dimension {dim}", input)
    return value * torch.sigmoid(gate)


def _add_in_place(counter: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """Batch norm's count of batches: torch.func forbids the in-place method, not out=."""
    if counter.is_floating_point():
        return counter.add_(other, alpha=alpha)
    return torch.add(counter, other, alpha=alpha, out=counter)


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:  # noqa: A002
    """As a slice of one: the gradient of PyTorch's own through a vmap is wrong."""
    place = range(input.shape[dim])[index]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, place, place + 1)


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:  # noqa: A002
    """By a mask: PyTorch's own through a vmap is wrong where the value alone differs."""
    if not isinstance(value, Tensor):
        return input.index_fill(dim, index, value)
    mask = torch.zeros_like(input, dtype=torch.bool).index_fill(dim, index, True)
    return torch.where(mask, value.to(input.dtype), input)


def _mish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """By softplus: the second derivative of PyTorch's own is NaN above 88 in float32."""
    found = input * torch.tanh(F.softplus(input))
    return input.copy_(found) if inplace else found


def _logaddexp(input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
    """By softplus: the second derivative of PyTorch's own is NaN 88 apart in float32."""
    larger = input >= other
    high, low = torch.where(larger, input, other), torch.where(larger, other, input)
    infinite = (high == low) & high.isinf()
    return high + F.softplus((low - high).masked_fill(infinite, 0.0))  # not ∞ less ∞


def _logcumsumexp(input: Tensor, dim: int) -> Tensor:  # noqa: A002
    """Twice as many terms a round: the second derivative of PyTorch's own is NaN."""
    # Rounded once, at the end; a copy, for of one term there is no round, and a network may write
    # to what it gets.
    total = at_least_float32(input.clone())
    length, reach = (input.shape[dim] if input.ndim else 0), 1
    while reach < length:
        kept, later = total.split((reach, length - reach), dim)
        joined = _logaddexp(later, total.narrow(dim, 0, length - reach))
        total = torch.cat([kept, joined], dim)
        reach *= 2
    return total.to(input.dtype)


def _refused(*_: Any, **__: Any) -> Tensor:
    """What is below the functions of norms, and differentiated rightly by nothing."""
    raise DerivativeError(
        "network: expected norms as functions of torch.nn.functional, which the losses can "
        "differentiate; got one of torch.native_layer_norm, native_group_norm and "
        "native_batch_norm. Call F.layer_norm, F.group_norm or F.batch_norm."
    )


BATCH = ("training", False)
INSTANCE = ("use_input_stats", True)
FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias")
OF_TORCH = ("input", "weight", "bias", "running_mean", "running_var")
PRIMITIVES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _tracking(F.batch_norm, FUNCTIONAL, *BATCH),
    torch.batch_norm: _tracking(F.batch_norm, OF_TORCH, *BATCH),
    F.instance_norm: _tracking(F.instance_norm, FUNCTIONAL, *INSTANCE),
    torch.instance_norm: _tracking(F.instance_norm, OF_TORCH, *INSTANCE),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    F.glu: _glu,
    torch.Tensor.add_: _add_in_place,
    torch.select_scatter: _select_scatter,
    torch.Tensor.select_scatter: _select_scatter,
    **dict.fromkeys((torch.index_fill, torch.Tensor.index_fill), _index_fill),
    torch.Tensor.index_fill_: lambda x, *given, **named: x.copy_(_index_fill(x, *given, **named)),
    F.mish: _mish,
    **dict.fromkeys((torch.logaddexp, torch.Tensor.logaddexp), _logaddexp),
    **dict.fromkeys((torch.logcumsumexp, torch.Tensor.logcumsumexp), _logcumsumexp),
    torch.native_layer_norm: _refused,
    torch.native_group_norm: _refused,
    torch.native_batch_norm: _refused,
}
# As programs of torch.export call them, with the arguments of the functions of torch.
PRIMITIVES |= {
    operator: primitive
    for function, primitive in list(PRIMITIVES.items())
    if not function.__name__.endswith("_")
    for operator in operators(function.__name__)
}
PRIMITIVES |= dict.fromkeys(operators("_native_batch_norm_legit"), _refused)


def _at_first(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator that is PyTorch's own until its gradient is differentiated."""
    safe = PRIMITIVES[native]

    def primitive(*args: Any, **named: Any) -> Tensor:
        # A transform takes derivatives by itself, and a mask of dropout is not drawn again.
        dropout = args[4] if native is SDPA and len(args) > 4 else named.get("dropout_p")
        small = args and isinstance(args[0], Tensor) and args[0].numel() < SMALL
        if small or traced() or dropout:
            return safe(*args, **named)
        flat, names, count = [*args, *named.values()], tuple(named), len(args)
        places = [place for place, entry in enumerate(flat) if isinstance(entry, Tensor)]
        tensors = [flat[place] for place in places]
        autocast, types = autocast_of_now(tensors[0].device.type), list[torch.dtype]()
        # What is kept for the pass back is kept by autograd, which a checkpoint knows of.
        options = [None if isinstance(entry, Tensor) else entry for entry in flat]

        def evaluated(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
            filled = list(options)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            with autocast():
                found = function(*filled[:count], **dict(zip(names, filled[count:], strict=True)))
            types.append(found.dtype)
            return found.to(types[0])

        once, again = partial(evaluated, native), partial(evaluated, safe)
        return recomputed(once, *tensors, again=again)

    return primitive


SDPA = F.scaled_dot_product_attention
# Elements of what is called small: the composition takes less time than one more Function.
SMALL = 2**16
NORMS = (F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm)
# What PyTorch gets wrong once already: of one sample, in channels_last on the CPU.
NORMS_OF_ONE = (F.instance_norm, torch.instance_norm, *operators("instance_norm"))
OF_ONE = {each: PRIMITIVES[each] for each in NORMS_OF_ONE}
AT_FIRST = {**PRIMITIVES, **{each: _at_first(each) for each in (*NORMS, SDPA)}}
