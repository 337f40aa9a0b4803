r"""Products of the whole Jacobian with one vector that depends on the value.

Formula, with f the value and c = cotangent(f) held fixed:
    pulled = (∂f/∂x)ᵀ c    by a pass back from f, with its graph
    pushed = ∂f/∂x c       as the gradient of pulled·c in c, in which pulled is linear

    The network is called once. In reverse mode pulled is at hand: D is its gradient in c as well,
    and f is shared by all directions. Beside another engine each direction has a copy of x, and so
    a dropout mask, of its own where it has G.

Cost, in network evaluations of a step with K directions, where one of order one is 3:
    order 2    6 + 3 K in reverse mode, 6 + 6 K in the taylor engine
    order 3    7 + 9 K in reverse mode, 20 K in the taylor engine, each direction with its own f,
               or with C in the place of G 7 + 14 K
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._torch_internals import traced
from hosm_losses.derivatives.backward import LOST_TWICE, pull_back, refuse_dropped
from hosm_losses.derivatives.engines import (
    Derivatives,
    Field,
    back_along,
    explained,
    folded,
    kept,
    leaf,
    unfolded,
)
from hosm_losses.derivatives.kinks import watch_once

Cotangent = Callable[[Tensor], Tensor]


class Products(NamedTuple):
    """Derivatives at x (B, *), with the products. C is 1 where the directions share f, else K.

    Attributes:
        derived: of an engine, its value of shape (C, B, *).
        cotangent: c, of shape (C, B, *).
        pulled: (∂f/∂x)ᵀ c, of shape (C, B, *).
        pushed: ∂f/∂x c, of shape (C, B, *), without a graph; None where it was not asked for.
    """

    derived: Derivatives
    cotangent: Tensor
    pulled: Tensor
    pushed: Tensor | None


def reverse_products(
    field: Field, x: Tensor, direction: Tensor, order: int, cotangent: Cotangent, push: bool
) -> Products:
    """The products in reverse mode; DerivativeError where autograd cannot follow."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad(), explained():
        point = leaf(x, wanted)
        value = watch_once(field, order, wanted)(point)
        refuse_dropped(value)
        c = cotangent(value.unsqueeze(0)).detach()
        variable = leaf(c[0].clone(), False)
        pulled = pull_back(value, point, variable.unsqueeze(0))[0]
        refuse_dropped(pulled, wanted)
        pushed = pull_back(pulled, variable, c, False, LOST_TWICE) if push else None
        if order == 2:
            directional = pull_back(pulled, variable, direction, wanted, LOST_TWICE)
            parts = [value.unsqueeze(0), directional]
        else:
            # One after the other: G is that of each alone, and a batch would call f for each.
            found = [back_along(value, point, w, wanted) for w in direction]
            parts = [value.unsqueeze(0), *map(torch.stack, zip(*found, strict=True))]
    *parts, pulled = kept([*parts, pulled.unsqueeze(0)], wanted)
    return Products(Derivatives(*parts), c, pulled, pushed)


def products_beside(
    derive: Callable[[Field, Tensor, Tensor], Derivatives],
    field: Field,
    x: Tensor,
    direction: Tensor,
    cotangent: Cotangent,
    push: bool,
    apart: bool,
) -> Products:
    """The products beside what an engine derives, by passes back from its value.

    With `apart` each direction has a copy of x, and so there is one value for each.
    """
    shape = (1, *x.shape)
    if apart:
        shape = direction.shape
        field, x, direction = folded(field, x, direction)
        direction = direction.unsqueeze(0)

    def chosen(value: Tensor) -> Tensor:
        return cotangent(value.reshape(shape)).detach().reshape(value.shape)

    if traced():

        def parted(point: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            value, *parts = derive(field, point, direction)
            return value[0], (value[:1], *[part for part in parts if part is not None])

        found: Any = torch.func.vjp(parted, x, has_aux=True)
        value, back, parts = found
        c = chosen(value)
        if push:
            found = torch.func.vjp(lambda c: back(c)[0], c)
            pulled, again = found
            pushed = again(c)[0].detach()
        else:
            pulled, pushed = back(c)[0], None
    else:
        wanted = torch.is_grad_enabled()
        with torch.enable_grad(), explained():
            point = leaf(x, wanted)
            value, *parts = derive(field, point, direction)
            parts, value = [value[:1], *[part for part in parts if part is not None]], value[0]
            refuse_dropped(value)
            # Where it requires a gradient a Function that drops the graph is noticed.
            c = leaf(chosen(value), False) if push or wanted else chosen(value)
            # Zero where the value does not depend on x.
            options: Any = {"retain_graph": True, "materialize_grads": True}
            (pulled,) = torch.autograd.grad(
                value, point, c, create_graph=wanted or push, **options
            )
            pushed = None
            if push:
                (pushed,) = torch.autograd.grad(pulled, c, c.detach(), **options)
        *parts, pulled = kept([*parts, pulled], wanted)
    if apart:
        parts = unfolded([part.squeeze(0) for part in parts], shape)
    pulled, c = pulled.reshape(shape), c.detach().reshape(shape)
    return Products(
        Derivatives(*parts), c, pulled, None if pushed is None else pushed.reshape(shape)
    )
