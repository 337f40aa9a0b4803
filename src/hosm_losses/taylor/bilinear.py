r"""Products that are linear in both factors, with the gradients of their gradients.

Formula, for a product a·b and a cotangent c of it:
    ⟨c, a·b⟩ is linear in each of the three. A gradient in one is linear in the two others, and so
    are its own gradients: with p in its place, ⟨p, ∂_a⟨c, a·b⟩⟩ = ⟨c, p·b⟩, and so on. So three
    functions give all derivatives, of any order, and only what they are given is kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses.taylor._torch import without_autocast
from hosm_losses.taylor.recompute import asked_for

Some = Tensor | None
Part = Callable[[Tensor, Tensor], Tensor]


class Form(NamedTuple):
    """The gradients of ⟨c, a·b⟩."""

    of_a: Part  # from b and c
    of_b: Part  # from a and c
    product: Part  # a·b, from a and b


def plain(*tensors: Tensor) -> bool:
    """Whether these are no subclasses of Tensor with a meaning of their own."""
    return all(type(each) in (Tensor, torch.nn.Parameter) for each in tensors)


def product(form: Form, a: Tensor, b: Tensor) -> Tensor:
    """The product of a and b, whose derivatives are parts of the form."""
    found: Any = _Gradient.apply(form, 2, a, b)
    return found


class _Gradient(torch.autograd.Function):
    """The gradient of a form in one of three places, from what is in the others."""

    @staticmethod
    def forward(ctx: Any, form: Form, place: int, *others: Tensor) -> Tensor:
        ctx.form, ctx.place = form, place
        ctx.save_for_backward(*others)
        return _evaluated(form, place, *others)

    @staticmethod
    def backward(ctx: Any, *cotangents: Some) -> tuple[Some, ...]:
        others: list[Any] = list(ctx.saved_tensors)
        needed = asked_for(ctx, others)
        others.insert(ctx.place, cotangents[0])
        needed.insert(ctx.place, False)
        # Where gradients are off a transform may be around, under which no Function is applied.
        evaluate: Any = _Gradient.apply if torch.is_grad_enabled() else _evaluated
        found = [
            evaluate(ctx.form, place, *others[:place], *others[place + 1 :]) if need else None
            for place, need in enumerate(needed)
        ]
        del found[ctx.place]
        return None, None, *found


def _evaluated(form: Form, place: int, *others: Tensor) -> Tensor:
    """In the types that the product was given, also in a backward pass under autocast."""
    with without_autocast(others[0].device.type):
        return form[place](*others)
