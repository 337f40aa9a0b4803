r"""Products of the whole Jacobian with one vector that depends on the value.

Formula, with f the value and c = cotangent(f) held fixed:
    pulled = (∂f/∂x)ᵀ c    by a pass back from f, with its graph
    pushed = ∂f/∂x c       as the gradient of pulled·c in c, in which pulled is linear

    The network is not called again: dropout and batch norm see x once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._torch_internals import traced
from hosm_losses.derivatives.backward import refuse_dropped
from hosm_losses.derivatives.engines import Derivatives, explained, kept, leaf


class Products(NamedTuple):
    """Derivatives at x (B, *), with what they were asked for beside.

    Attributes:
        derived: of an engine, with one value that all directions share, (1, B, *).
        pulled: (∂f/∂x)ᵀ c, of shape (B, *).
        pushed: ∂f/∂x c, of shape (B, *), without a graph; None where it was not asked for.
    """

    derived: Derivatives
    pulled: Tensor
    pushed: Tensor | None


def with_products(
    derive: Callable[[Tensor], Derivatives],
    x: Tensor,
    cotangent: Callable[[Tensor], Tensor],
    *,
    push: bool,
) -> Products:
    """Derivatives at x, and the products of the value's Jacobian with `cotangent` of the value."""
    if traced():
        kinds: list[Any] = []

        def parted(point: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            derived = derive(point)
            kinds[:] = [type(derived)]
            return derived.value[0], tuple(part for part in derived if part is not None)

        found: Any = torch.func.vjp(parted, x, has_aux=True)
        value, back, parts = found
        derived = kinds[0](*parts)
        c = cotangent(value).detach()
        if not push:
            return Products(derived, back(c)[0], None)
        found = torch.func.vjp(lambda c: back(c)[0], c)
        pulled, again = found
        return Products(derived, pulled, again(c)[0].detach())
    wanted = torch.is_grad_enabled()
    with torch.enable_grad(), explained():
        point = leaf(x, wanted)
        derived = derive(point)
        value = derived.value[0]
        refuse_dropped(value)
        c = cotangent(value).detach().requires_grad_(push)
        (pulled,) = torch.autograd.grad(
            value, point, c, create_graph=wanted or push, retain_graph=True, materialize_grads=True
        )
        pushed = None
        if push:
            (pushed,) = torch.autograd.grad(
                pulled, c, c.detach(), retain_graph=True, materialize_grads=True
            )
    parts = [part for part in (*derived, pulled) if part is not None]
    *parts, pulled = kept(parts, wanted)
    return Products(type(derived)(*parts), pulled, pushed)
