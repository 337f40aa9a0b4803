"""What rules ask of several arguments, and of an argument as a batch of samples."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hosm_losses.derivatives.taylor.along import lengthened
from hosm_losses.derivatives.taylor.jet import Jet


def stacks_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Equally long stacks of Jets and plain tensors, which have derivatives of zero."""
    stacks = [each.stack if isinstance(each, Jet) else each.unsqueeze(0) for each in tensors]
    count = max([stack.shape[0] for stack in stacks])
    return [lengthened(stack, count) for stack in stacks]


def jet_among(candidates: Iterable[Any]) -> Jet:
    """The first Jet of several values, of which one is."""
    return next(each for each in candidates if isinstance(each, Jet))


def result_type(a: Any, b: Any) -> torch.dtype:
    """The type that PyTorch gives the values of a and b, Jets or not, together."""
    return torch.result_type(*(x.stack[0] if isinstance(x, Jet) else x for x in (a, b)))


def like_samples(function: Callable[[Tensor], Tensor], x: Jet) -> Jet:
    """A function that treats every sample alone, with the components of x as more samples."""
    return x.like(function(x.stack.flatten(0, 1)).unflatten(0, x.stack.shape[:2]))
