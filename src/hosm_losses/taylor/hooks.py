"""Hooks on tensors and modules inside a network: they may look at gradients, not change them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hosm_losses.taylor._torch import share_memory, versions
from hosm_losses.taylor.errors import DerivativeError

CHANGING_HOOK = (
    "network: expected hooks that look at gradients; got one that changes them inside it, and "
    "so the loss. Change gradients of the parameters, after loss.backward()."
)


class ChangedGradientError(DerivativeError):
    """A hook that changes a gradient; with another engine it would change the loss."""


class ScriptedError(DerivativeError):
    """A part of torch.jit; another engine would not see the norms inside it either."""


GIVE_THE_SOURCE = (
    "PyTorch's own higher derivatives of norms are taken inside it, which are wrong without an "
    "error. Use the module that it was made of."
)
# What no other engine does better.
FINAL = (ChangedGradientError, ScriptedError)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or share_memory(one, other)


def check_unchanged(returned: Sequence[Any], incoming: Sequence[Any]) -> None:
    """Compare what comes out of a module's hooks with what went in."""
    for one, other in zip(returned, incoming, strict=True):
        given = isinstance(one, Tensor) and isinstance(other, Tensor)
        if given and not _is_same(one, other):
            raise ChangedGradientError(CHANGING_HOOK)


def guard_hook(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """A hook that raises where the given one changes a gradient."""

    def guarded(gradient: Tensor) -> None:
        before = versions([gradient])
        found = hook(gradient)
        same = found is None or _is_same(found, gradient)
        if not same or versions([gradient]) != before:
            raise ChangedGradientError(CHANGING_HOOK)

    return guarded
