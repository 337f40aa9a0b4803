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
from typing import Any

import torch
from torch import Tensor

from hosm_losses._torch_internals import traced
from hosm_losses.derivatives.backward import refuse_dropped
from hosm_losses.derivatives.engines import (
    Cotangent,
    Derivatives,
    Field,
    Products,
    explained,
    folded,
    kept,
    leaf,
    unfolded,
)


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
