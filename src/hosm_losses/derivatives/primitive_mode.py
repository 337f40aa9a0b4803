r"""The mode that puts the safe primitives in, and the checkpoint that carries it.

What:
    A `TorchFunctionMode` replaces the operators of `primitives` where a network calls them. It is
    on only while a loss evaluates the network and only in its thread; nothing is patched, and
    nothing is left behind. An activation checkpoint evaluates its part of the network
    again, in the backward pass, when the mode is off: `checkpoint` carries it there.

Source:
    The documentation of `torch.overrides`; that of `torch.utils.checkpoint` for `context_fn`.
"""

__all__ = [
    "CHECKPOINT_ADVICE",
    "FORWARD_ADVICE",
    "ForwardMode",
    "recomputable",
    "safe_primitives",
]

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from hosm_losses._checks import DerivativeError
from hosm_losses._torch_internals import checkpoint_hook
from hosm_losses.derivatives.primitives import PRIMITIVES

CHECKPOINT_ADVICE = (
    "checkpoint: expected hosm_losses.checkpoint inside a network that is trained with order two "
    "or three; got torch's own, which recomputes with other operators than the loss used. Hand "
    "hosm_losses.checkpoint to the network in its place (diffusers: "
    "model.enable_gradient_checkpointing(gradient_checkpointing_func=hosm_losses.checkpoint)), "
    "or checkpoint around the loss module."
)
FORWARD_ADVICE = (
    "checkpoint: expected derivative='reverse' or 'taylor' for a network with activation "
    "checkpoints inside; got forward mode, through which nothing can be recomputed. Leave "
    "derivative at 'auto' outside torch.compile, turn the checkpoints off, or checkpoint around "
    "the loss module."
)
_here = threading.local()


class _SafePrimitives(TorchFunctionMode):
    def __enter__(self) -> Self:
        super().__enter__()
        _here.around = (*getattr(_here, "around", ()), checkpoint_hook())
        return self

    def __exit__(self, *exception: object) -> None:
        _here.around = _here.around[:-1]
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        primitive = PRIMITIVES.get(func)
        if primitive is not None or getattr(_here, "forward", False):
            _refuse_foreign_checkpoint()
        return (primitive or func)(*args, **(kwargs or {}))


def _refuse_foreign_checkpoint() -> None:
    """Stop where torch's own checkpoint surrounds what it cannot recompute as the loss did.

    That is a primitive, and in forward mode everything. One that was on before the mode surrounds
    the loss, enters the mode again and is right.
    """
    hook = checkpoint_hook()
    if hook is not None and hook is not _here.around[-1] and not getattr(_here, "carried", 0):
        raise DerivativeError(
            FORWARD_ADVICE if getattr(_here, "forward", False) else CHECKPOINT_ADVICE
        )


class _Carried:
    """Around the first computation of our checkpoint: its recomputation will have the mode."""

    def __enter__(self) -> None:
        _here.carried = getattr(_here, "carried", 0) + 1

    def __exit__(self, *exception: object) -> None:
        _here.carried -= 1


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


class ForwardMode:
    """Tell `checkpoint`, in this thread and while the block lasts, that it cannot work."""

    def __enter__(self) -> None:
        self.before = getattr(_here, "forward", False)
        _here.forward = True

    def __exit__(self, *exception: object) -> None:
        _here.forward = self.before


def recomputable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's non-reentrant checkpoint, whose recomputation has the primitives if this call has.

    Args:
        function: a part of the network.
        args: its arguments.
        kwargs: its keyword arguments, and those of torch's checkpoint.

    Returns:
        What `function` returns.

    Raises:
        DerivativeError: in forward mode, unless autograd is off.
    """
    if getattr(_here, "forward", False):
        if torch.is_grad_enabled():
            raise DerivativeError(FORWARD_ADVICE)
        return function(*args, **kwargs)  # nothing is saved; torch's of 2.6 has no jvp
    active = bool(getattr(_here, "around", ()))

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return _Carried(), safe_primitives(active)

    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=contexts, **kwargs
    )
