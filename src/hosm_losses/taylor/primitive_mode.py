r"""The mode that puts the safe primitives in, and the checkpoint that carries it.

What:
    A `TorchFunctionMode` replaces the operators of `primitives` where a network calls them, while
    a loss evaluates the network and in its thread alone. Nothing is patched. An activation
    checkpoint evaluates its part of the network again in the backward pass, when the mode is off:
    `recomputable` puts it on there.

Source:
    The documentation of `torch.overrides`; that of `torch.utils.checkpoint` for `context_fn`.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hosm_losses.taylor._torch import carries_gradient, checkpoint_hook, is_traced
from hosm_losses.taylor.errors import DerivativeError
from hosm_losses.taylor.hooks import guard_hook
from hosm_losses.taylor.registry import OF_ONE, PRIMITIVES
from hosm_losses.taylor.unknown import refuse_constant

CHECKPOINT_ADVICE = (
    "checkpoint: expected hosm_losses.checkpoint inside a network that is trained with order "
    "two or three; got torch's own, which recomputes with other operators. Use the other "
    "(diffusers: "
    "model.enable_gradient_checkpointing(gradient_checkpointing_func=hosm_losses.checkpoint)), "
    "or checkpoint around the loss module."
)


_DATA = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]


class ForeignCheckpointError(DerivativeError):
    """Torch's own checkpoint is inside the network, around what it cannot recompute."""


class _Thread(threading.local):
    """What is on in a thread."""

    def __init__(self) -> None:
        # Not of the class: torch.compile guards what there is, and none is to be added later.
        self.modes: tuple[_SafePrimitives, ...] = ()


_thread = _Thread()


class _SafePrimitives(TorchFunctionMode):
    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table
        self.around: object = None  # the checkpoint's hook that surrounds the mode

    def __enter__(self) -> Self:
        super().__enter__()
        self.around = checkpoint_hook()
        _thread.modes = (*_thread.modes, self)
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.modes = _thread.modes[:-1]
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.register_hook:
            tensor, hook = *args, *(kwargs or {}).values()
            return tensor.register_hook(guard_hook(hook))
        if func == _DATA and is_traced():  # which is shallow, as .detach_() is
            return args[0].detach()
        if func in (Tensor.detach_, torch.detach_) and is_traced():
            raise DerivativeError(
                "network: got .detach_(), which is wrong under torch.func. Write x = x.detach()."
            )
        primitive = self.table.get(func)
        if primitive is not None:
            _refuse_foreign_checkpoint()
        result = (primitive or func)(*args, **(kwargs or {}))
        if type(result) is Tensor and not result.requires_grad and self.table is not OF_ONE:
            arguments = *args, *(kwargs or {}).values()
            if torch.is_grad_enabled() and any(map(carries_gradient, arguments)):
                refuse_constant(func, result)
        return result


def _refuse_foreign_checkpoint() -> None:
    """Raise where torch's own checkpoint surrounds what it cannot recompute as the loss did.

    That is a primitive. One that was on before the mode is ours, or surrounds the loss: it enters
    the mode again and is right.
    """
    if checkpoint_hook() not in (None, _thread.modes[-1].around):
        raise ForeignCheckpointError(CHECKPOINT_ADVICE)


def safe_primitives(
    enabled: bool = True, *, of_one_sample: bool = False
) -> AbstractContextManager[Any]:
    """A block in which this thread has the primitives in place of the operators, if `enabled`.

    They may be those alone that a first derivative of one sample needs.
    """
    return _SafePrimitives(OF_ONE if of_one_sample else PRIMITIVES) if enabled else nullcontext()


def refuse_constants() -> AbstractContextManager[Any]:
    """A block with no primitive, in which operators without a derivative are refused."""
    return _SafePrimitives({})


def recomputable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's non-reentrant checkpoint; its recomputation has the primitives if this call has.

    The first computation enters the mode again, inside the hooks that save its tensors.
    """
    tables = [mode.table for mode in _thread.modes]

    def mode() -> AbstractContextManager[Any]:
        return _SafePrimitives(tables[-1]) if tables else nullcontext()

    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (mode(), mode()), **kwargs
    )
