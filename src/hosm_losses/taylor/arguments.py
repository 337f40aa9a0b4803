"""What rules ask of several arguments, and of an argument as a batch of samples."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor.along import lengthened
from hosm_losses.taylor.jet import Jet


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
    values = [x.stack[0] if isinstance(x, Jet) else x for x in (a, b)]
    # torch.compile does not trace torch.result_type.
    return promoted(*values) if torch.compiler.is_compiling() else torch.result_type(*values)


def promoted(a: Any, b: Any) -> torch.dtype:
    """What torch.result_type finds for two tensors or real numbers, by PyTorch's rules.

    A tensor with axes goes before one without, and that before a number. The type of what goes
    before is that of the result, unless the other is of a higher kind: mask, integer, real.
    """
    (before, one), (after, other) = (_ranked(x) for x in (a, b))
    if before == after:
        return torch.promote_types(one, other)
    high, low = (one, other) if before > after else (other, one)
    higher = high == torch.bool or low.is_floating_point or low.is_complex
    stays = high.is_complex or (high.is_floating_point and not low.is_complex) or not higher
    return high if stays else torch.promote_types(high, low)


def _ranked(x: Any) -> tuple[int, torch.dtype]:
    """The place of a tensor or of a number, the highest first, and its type."""
    if isinstance(x, Tensor):
        return (2 if x.ndim else 1), x.dtype
    if isinstance(x, bool):
        return 0, torch.bool
    return 0, torch.int64 if isinstance(x, int) else torch.get_default_dtype()


def like_samples(function: Callable[[Tensor], Tensor], x: Jet) -> Jet:
    """A function that treats every sample alone, with the components of x as more samples."""
    return x.like(function(x.stack.flatten(0, 1)).unflatten(0, x.stack.shape[:2]))
