r"""The few operators whose higher derivatives PyTorch gets wrong, written so that all are right.

What:
    PyTorch does not differentiate layer norm, batch norm (in training) and instance norm rightly
    more than twice: the parameter gradient of a loss on a directional derivative, at order three
    sometimes the derivative's own value, is off by several to more than a hundred percent, in
    silence. Group norm and scaled dot-product attention fail loudly on common inputs. Composed of
    means, products and softmax, each is right by every route.

How:
    A `TorchFunctionMode` puts the compositions in where the network calls the operators. It is
    on only while a loss evaluates the network and only in its thread; nothing is patched, and
    nothing is left behind. An activation checkpoint re-evaluates its part of the network later,
    in the backward pass: `checkpoint` carries the mode there.

Source:
    PyTorch issues 175754, 186256, 196699 and 196700.
"""

__all__ = ["checkpoint", "safe_primitives"]

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Subtract the mean and divide by the standard deviation over `dims`, in float32 at least."""
    x = _at_least_float32(x)
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(
    standard: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Iterable[int],
    dtype: torch.dtype,
) -> Tensor:
    shape = tuple(shape)
    if weight is not None:
        standard = standard * weight.reshape(shape)
    if bias is not None:
        standard = standard + bias.reshape(shape)
    return standard.to(dtype)


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
        raise ValueError(
            f"layer_norm: expected an input that ends in {shape}; got {tuple(input.shape)}."
        )
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
        raise ValueError(
            f"group_norm: expected channels that {num_groups} groups divide; got {channels}."
        )
    grouped = input.reshape(batch, num_groups, -1)
    standard = _standardise(grouped, (-1,), eps).reshape(input.shape)
    return _affine(standard, weight, bias, _per_channel(input), input.dtype)


def _per_channel(x: Tensor) -> tuple[int, ...]:
    return (1, x.shape[1], *(1,) * (x.ndim - 2))


def _batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        # The operator updates the statistics itself, which it can do inside a transform.
        with torch.no_grad():
            F.batch_norm(
                input.detach(), running_mean, running_var, None, None, True, momentum, eps
            )
    elif input.numel() <= input.shape[1]:
        raise ValueError(
            f"batch_norm: expected several values a channel in training; got {tuple(input.shape)}."
        )
    dims = (0, *range(2, input.ndim))
    return _affine(_standardise(input, dims, eps), weight, bias, _per_channel(input), input.dtype)


def _instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    if running_mean is not None:
        with torch.no_grad():
            F.instance_norm(
                input.detach(), running_mean, running_var, None, None, True, momentum, eps
            )
    elif math.prod(input.shape[2:]) <= 1:
        raise ValueError(
            f"instance_norm: expected more than one spatial element; got {tuple(input.shape)}."
        )
    dims = tuple(range(2, input.ndim))
    return _affine(_standardise(input, dims, eps), weight, bias, _per_channel(input), input.dtype)


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
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both.")
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    # A vector where a number would do: autograd saves it, and the native kernel saves nothing like
    # it. So torch's own checkpoint, which recomputes with the native kernel, sees the difference.
    factor = query.new_full(query.shape[-1:], query.shape[-1] ** -0.5 if scale is None else scale)
    logits = _at_least_float32((query * factor) @ key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is None:
        weights = torch.softmax(logits, -1)
    elif attn_mask.dtype == torch.bool:
        # A row with nothing to attend to is 0; an infinity there would make its derivatives NaN.
        logits = logits.masked_fill(~attn_mask, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, -1) * attn_mask.any(-1, keepdim=True)
    else:
        weights = torch.softmax(logits + attn_mask, -1)
    return F.dropout(weights.to(value.dtype), dropout_p) @ value


def _torch_batch_norm(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *options: Any,
    **named: Any,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, *options, **named)


def _torch_instance_norm(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *options: Any,
    **named: Any,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, *options, **named)


def _add_in_place(counter: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """Batch norm's count of batches: torch.func forbids the in-place method, not out=."""
    if counter.is_floating_point():
        return counter.add_(other, alpha=alpha)
    return torch.add(counter, other, alpha=alpha, out=counter)


PRIMITIVES: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.add_: _add_in_place,
}

_depth = threading.local()


class _SafePrimitives(TorchFunctionMode):
    def __enter__(self) -> Self:
        super().__enter__()
        _depth.value = getattr(_depth, "value", 0) + 1
        return self

    def __exit__(self, *exception: object) -> None:
        _depth.value -= 1
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return PRIMITIVES.get(func, func)(*args, **(kwargs or {}))


def safe_primitives(enabled: bool = True) -> AbstractContextManager[Any]:
    """Put the primitives in for the operators of this thread, while the block lasts.

    Args:
        enabled: False makes this a block like any other.

    Returns:
        A context manager that can be entered again.

    Example:
        >>> layer = torch.nn.LayerNorm(3).double()
        >>> x = torch.randn(2, 3, dtype=torch.float64)
        >>> with safe_primitives():
        ...     safe = layer(x)
        >>> torch.allclose(safe, layer(x))
        True
    """
    return _SafePrimitives() if enabled else nullcontext()


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Activation checkpointing for use inside a network that is trained with order two or three.

    It is torch's non-reentrant `torch.utils.checkpoint.checkpoint`, whose recomputation in the
    backward pass also uses the safe primitives if the first computation did. With torch's own
    checkpoint a network that needs a primitive ends in a CheckpointError. It works with the
    reverse engine, derivative="reverse", which "auto" chooses.

    Args:
        function: a part of the network.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        What `function` returns.

    Example:
        >>> layer = torch.nn.Linear(3, 3)
        >>> checkpoint(layer, torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    active = getattr(_depth, "value", 0) > 0

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), safe_primitives(active)

    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=contexts, **kwargs
    )
