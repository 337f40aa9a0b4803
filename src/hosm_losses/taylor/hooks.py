"""Hooks on tensors and modules inside a network: they may look at gradients, not change them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hosm_losses.taylor._torch import versions
from hosm_losses.taylor.errors import ConstantError, DerivativeError

CHANGING_HOOK = (
    "network: expected hooks that look at gradients; got one that changes them inside it, and "
    "so the loss. Change gradients of the parameters, after loss.backward()."
)


class ChangedGradientError(DerivativeError):
    """A hook that changes a gradient; with another engine it would change the loss."""


class ScriptedError(DerivativeError):
    """A part of torch.jit; another engine would not see the norms inside it either."""


GIVE_THE_SOURCE = (
    "Inside it PyTorch takes higher derivatives of norms, which versions 2.6 to 2.13 get wrong "
    "without an error. Use the module that it was made of."
)
# What no other engine does better.
FINAL = (ChangedGradientError, ScriptedError, ConstantError)


def check_unchanged(returned: Sequence[Any], incoming: Sequence[Any]) -> None:
    """Compare what comes out of a module's hooks with what went in."""
    for one, other in zip(returned, incoming, strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one is not other:
            raise ChangedGradientError(CHANGING_HOOK)


def guard_hook(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """A hook that raises where the given one changes a gradient."""

    def guarded(gradient: Tensor) -> None:
        before = versions([gradient])
        found = hook(gradient)
        same = found is None or found is gradient
        if not same or versions([gradient]) != before:
            raise ChangedGradientError(CHANGING_HOOK)

    return guarded
