r"""The one list of casts: what changes the type or the device of a tensor.

A cast to another floating type casts every component. One to integers or to bool has no
derivatives, as in PyTorch: its result is a plain tensor, and casting that back brings none. One to
complex numbers is refused by `Jet.make`.
"""

__all__: list[str] = []

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hosm_losses.derivatives.taylor.jet import Jet, TaylorError, on_values
from hosm_losses.derivatives.taylor.table import NoRule, every, rule

_CASTS = (
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "short"),
    *("char", "byte", "bool", "cfloat", "cdouble", "chalf", "cpu", "cuda"),
)
_LAYOUTS = (torch.channels_last, torch.channels_last_3d)


def _casting(function: Callable[..., Any]) -> None:
    def cast(x: Any, *args: Any, **named: Any) -> Any:
        if not isinstance(x, Jet):  # a plain tensor in the type of a Jet
            return on_values(function, (x, *args), named)
        given = [each.stack if isinstance(each, Jet) else each for each in args]
        named = {k: v.stack if isinstance(v, Jet) else v for k, v in named.items()}
        if named.get("memory_format") in _LAYOUTS:
            # Which is that of a sample, and the components are so many batches.
            if x.ndim == 0:
                raise NoRule
            flat = function(x.stack.flatten(0, 1), *given, **named)
            found = flat.unflatten(0, x.stack.shape[:2])
        else:
            found = function(x.stack, *given, **named)
        if not isinstance(found, Tensor):  # the name that .type() tells
            return found
        kept = found.is_floating_point() or found.is_complex()
        return x.like(found) if kept else found[0]

    rule(function)(cast)


for _function in every(*_CASTS):
    _casting(_function)


@rule(torch.as_tensor, torch.asarray)
def _as_tensor(x: Any, dtype: Any = None, device: Any = None) -> Any:
    """Only torch.compile asks for it here. Elsewhere it is made below autograd, and refused."""
    found = x.stack.to(dtype=dtype, device=device)
    return x.like(found) if found.is_floating_point() else found[0]


@rule(Tensor.view)
def _view(x: Any, *shape: Any, size: Any = None, dtype: Any = None) -> Any:
    given = shape or ((dtype,) if size is None else (size,))
    if not isinstance(x, Jet):
        raise NoRule
    if len(given) == 1 and isinstance(given[0], torch.dtype):
        raise TaylorError("view: another dtype for the same bits has no derivative.")
    sizes = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    return x.like(x.stack.reshape(len(x.stack), *sizes))
