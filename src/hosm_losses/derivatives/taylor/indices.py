"""Rules for indices.

PyTorch moves the axes of several index tensors to the front where something stands between them,
and reads lists and arrays of NumPy in ways of its own. An index with at most one tensor keeps its
place, in a stack as in its value; every other goes to PyTorch as it stands.
"""

__all__: list[str] = []

from typing import Any

import torch
from torch import Tensor

from hosm_losses.derivatives.taylor.jet import Jet
from hosm_losses.derivatives.taylor.table import NoRule, rule

_INDICES = (torch.bool, torch.int64, torch.int32)


@rule(Tensor.__getitem__)
def _item(x: Any, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    gathers = 0
    for part in parts:
        if _gathers(part):
            gathers += 1
        elif not _slices(part):
            raise NoRule
    if not isinstance(x, Jet) or gathers > 1:
        raise NoRule
    return x.like(x.stack[(slice(None), *parts)])


def _slices(part: Any) -> bool:
    """Whether a part of an index is a place, a slice, a new axis or the dots."""
    if isinstance(part, bool):  # which makes a new axis, and is read as a mask
        return False
    return part is None or part is Ellipsis or isinstance(part, int | slice)


def _gathers(part: Any) -> bool:
    """Whether a part of an index is a tensor, or a list that PyTorch reads as one."""
    if isinstance(part, list):
        return all(isinstance(each, int) and not isinstance(each, bool) for each in part)
    return isinstance(part, Tensor) and not isinstance(part, Jet) and part.dtype in _INDICES


@rule(Tensor.__iter__)
def _iterator(x: Jet) -> Any:
    if x.ndim == 0:
        raise NoRule
    return iter([x.like(part) for part in x.stack.unbind(1)])
