r"""The two engines: value, directional derivative, third-order part and products of a field.

Formula, along w = σ v:
    taylor    the network is given a `Jet` of x; G is the gradient of w·D, reverse over that.
    reverse   g = (∂f/∂x)ᵀ c for a leaf c is linear in c, so ∂(w·g)/∂c = ∂f/∂x w = D, the Jacobian
              itself and not its transpose; at c = w the same pass gives ∂(w·g)/∂x = G.

    In place of G the taylor engine can carry C = ∂²f[w, w], the Laplacian form, without a pass
    back. Where the sum of G, or of C, over the directions is enough, it takes one pass back, or
    carries one second derivative: the directions share the value.

    With products, for the value f and c = cotangent(f) held fixed:
    pulled = (∂f/∂x)ᵀ c    by a pass back from f, with its graph
    pushed = ∂f/∂x c       as the gradient of pulled·c in c, in which pulled is linear

    The network is called once. In reverse mode pulled is at hand: D is its gradient in c as well,
    and f is shared by all directions. Beside another engine each direction has its own copy of x
    where it has G, and so its own dropout mask.

Cost of a step with products and K directions, in network evaluations, where one of order one is 3:
    order 2    6 + 3 K in reverse mode, 6 + 6 K in the taylor engine
    order 3    7 + 9 K in reverse mode, 20 K in the taylor engine, each direction with its own f,
               or with C in the place of G 7 + 14 K

Under a transform of torch.func everything is taken by torch.func, which knows what surrounds it.

Source:
    Pearlmutter, "Fast exact multiplication by the Hessian" (1994); the double reverse pass is
    the "double backward trick" of J. Townsend (2017).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hosm_losses import _torch_internals as internals
from hosm_losses._checks import DerivativeError, over_elements
from hosm_losses.derivatives.backward import (
    LOST_TWICE,
    add_remedies,
    may_train,
    pull_back,
    refuse_dropped,
)
from hosm_losses.derivatives.kinks import watch_once
from hosm_losses.taylor import propagate

Cotangent = Callable[[Tensor], Tensor]


class Field(Protocol):
    """A function of x (B, *), every sample alone, with its conditions bound."""

    def __call__(self, x: Tensor) -> Tensor:
        """The value at x (B, *)."""
        ...

    @property
    def owner(self) -> object:
        """The network, for which a choice of the engine is remembered."""
        ...

    @property
    def native(self) -> "Field":
        """The same with PyTorch's own operators, whose values and first derivatives are right."""
        ...

    def repeat(self, count: int) -> "Field":
        """The field of `count` copies of the batch, for x of shape (count · B, *)."""
        ...


class Derivatives(NamedTuple):
    """What an engine returns.

    Attributes:
        value: f, of shape (1, B, *) where the directions share it, (K, B, *) where each has its
            own.
        directional: D = ∂f/∂x w, of shape (K, B, *).
        third: G = ∇_x (wᵀ ∂f/∂x w), or C = ∂²f[w, w] where that was asked for and the engine can
            take it, of shape (K, B, *), or where the sum is enough perhaps that, (1, B, *); None
            at order 2.
    """

    value: Tensor
    directional: Tensor
    third: Tensor | None = None


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


def leaf(x: Tensor, wanted: bool) -> Tensor:
    """A point to differentiate at: x itself where a gradient of the result may go to it."""
    if wanted and x.requires_grad:
        return x
    return x.detach().requires_grad_()


def repeat_rows(field: Field, x: Tensor, direction: Tensor) -> tuple[Field, Tensor, Tensor]:
    """The field, x and the directions with the K directions as one larger batch."""
    count = len(direction)
    rows = x.repeat(count, *(1,) * (x.ndim - 1))
    return (field.repeat(count) if count > 1 else field), rows, direction.flatten(0, 1)


def split_directions(parts: Iterable[Tensor], shape: Sequence[int]) -> list[Tensor]:
    """The parts of what was folded, each (K, B, *), K and B the first two of a shape."""
    return [part.unflatten(0, shape[:2]) for part in parts]


def detach_unless(parts: Iterable[Tensor], wanted: bool) -> list[Tensor]:
    """Return the parts, without their graph unless that is wanted."""
    return [part if wanted else part.detach() for part in parts]


def taylor(
    field: Field,
    x: Tensor,
    direction: Tensor,
    order: int,
    laplacian: bool = False,
    summed: bool = False,
) -> Derivatives:
    """The value and its derivatives in one batch; TaylorError where they cannot be carried."""
    wanted, count = torch.is_grad_enabled(), len(direction)
    if order == 3 and not laplacian:
        return Derivatives(*_taylor_gradient(field, x, direction, wanted, summed))
    pairs = "none" if order == 2 else "sum" if summed else "squares"
    stack = propagate(watch_once(field, order, wanted), x, direction, pairs)
    parts = stack.split((1, count, len(stack) - 1 - count))
    return Derivatives(*detach_unless([part for part in parts if len(part)], wanted))


def _taylor_gradient(
    field: Field, x: Tensor, direction: Tensor, wanted: bool, summed: bool
) -> list[Tensor]:
    """f, D and G: of each direction on its own copy of x, or of all on x that they share."""
    rows, w = x, direction
    if not summed:
        field, rows, w = repeat_rows(field, x, direction)
        w = w.unsqueeze(0)

    def form(rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        stack = propagate(watch_once(field, 3, wanted), rows, w)
        return (w * stack[1:]).sum(), (stack[:1], stack[1:])

    number, parts, back, wanted = _pullback(form, rows, wanted)
    parts = detach_unless([*parts, back(torch.ones_like(number)).unsqueeze(0)], wanted)
    if summed:
        return parts
    return split_directions([part.squeeze(0) for part in parts], direction.shape)


def _pullback(
    function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor, wanted: bool, again: bool = False
) -> tuple[Tensor, Any, Callable[[Tensor], Tensor], bool]:
    """What a function returns at x, a value and more, its pass back, and whether it trains.

    The pass back has a graph if one is `wanted` and something may be trained, or is needed
    `again`. It gives zero where the value does not depend on x, as the form of a linear network.
    """
    if internals.traced():
        found: Any = torch.func.vjp(function, x, has_aux=True)
        value, back, more = found
        return value, more, lambda cotangent: back(cotangent)[0], wanted
    with torch.enable_grad(), add_remedies():
        point = leaf(x, wanted)
        value, more = function(point)
    wanted = wanted and may_train(value, x, point)

    @add_remedies()
    def pull(cotangent: Tensor) -> Tensor:
        options: Any = {"retain_graph": True, "materialize_grads": True}
        options["create_graph"] = wanted or again
        return torch.autograd.grad(value, point, cotangent, **options)[0]

    return value, more, pull, wanted


def reverse(field: Field, x: Tensor, direction: Tensor, order: int, *_: object) -> Derivatives:
    """Two passes back, for G and never for C; DerivativeError where autograd cannot follow."""
    if internals.transformed():
        with add_remedies():
            return _reverse_in_transform(field, x, direction, order)
    if order == 2:  # any cotangent will do: what is pulled is linear in it
        return reverse_products(field, x, direction, order, torch.zeros_like, False).derived
    wanted = torch.is_grad_enabled()
    with torch.enable_grad(), add_remedies():
        point = leaf(x, wanted)
        copies, rows, w = repeat_rows(field, point, direction)
        value = watch_once(copies, order, wanted)(rows)
        refuse_dropped(value)
        wanted = wanted and (w.requires_grad or may_train(value, x, point))
        parts = split_directions((value, *back_along(value, rows, w, wanted)), direction.shape)
        return Derivatives(*detach_unless(parts, wanted))


def reverse_products(
    field: Field, x: Tensor, direction: Tensor, order: int, cotangent: Cotangent, push: bool
) -> Products:
    """The products in reverse mode; DerivativeError where autograd cannot follow."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad(), add_remedies():
        point = leaf(x, wanted)
        value = watch_once(field, order, wanted)(point)
        refuse_dropped(value)
        wanted = wanted and (direction.requires_grad or may_train(value, x, point))
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
    *parts, pulled = detach_unless([*parts, pulled.unsqueeze(0)], wanted)
    return Products(Derivatives(*parts), c, pulled, pushed)


def back_along(value: Tensor, x: Tensor, w: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """D and G along w (B, *), by two passes back from a value at x (B, *) that is at hand."""
    cotangent = leaf(w, wanted)
    pulled = pull_back(value, x, cotangent.unsqueeze(0))[0]
    refuse_dropped(pulled, wanted)
    directional, gradient = torch.autograd.grad(
        pulled, (cotangent, x), w, create_graph=wanted, retain_graph=True, allow_unused=True
    )
    if directional is None:
        raise DerivativeError(LOST_TWICE)
    # None as of a linear network.
    return directional, torch.zeros_like(x) if gradient is None else gradient


def _reverse_in_transform(field: Field, x: Tensor, direction: Tensor, order: int) -> Derivatives:
    """The same by torch.func.vjp, which a transform around it can follow."""
    copies, rows, w = (field, x, direction) if order == 2 else repeat_rows(field, x, direction)
    start = torch.zeros_like(x) if order == 2 else w

    def evaluated(point: Tensor) -> Tensor:
        value = watch_once(copies, order, torch.is_grad_enabled())(point)
        refuse_dropped(value)
        return value

    def pull(point: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        pulled: Any = torch.func.vjp(evaluated, point)
        value, back = pulled
        return back(cotangent)[0], value

    found: Any = torch.func.vjp(pull, rows, start, has_aux=True)
    _, back, value = found
    if order == 2:
        return Derivatives(value.unsqueeze(0), torch.stack([back(each)[1] for each in direction]))
    gradient, directional = back(w)
    return Derivatives(*split_directions((value, directional, gradient), direction.shape))


def quadratic_forms(
    field: Field, x: Tensor, directions: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """The value (B, *) of a field, and wᵀ ∂f/∂x w for each w: the forms (K, B).

    One forward pass, and one pass back for each chunk (k, B, *) of directions. A DerivativeError
    where autograd cannot follow the output to x, or the graph of the result is dropped.
    """
    if internals.transformed():
        pulled: Any = torch.func.vjp(watch_once(field, 2, torch.is_grad_enabled()), x)
        value, back = pulled
        found = [over_elements(torch.stack([back(each)[0] for each in w]) * w) for w in directions]
        return value, torch.cat(found)
    wanted = torch.is_grad_enabled()
    with torch.enable_grad(), add_remedies():
        point = leaf(x, wanted)
        value = watch_once(field, 2, wanted)(point)
        # Behind the point are all earlier evaluations of a path.
        in_turn = refuse_dropped(value, wanted, point)
        found = [
            over_elements(pull_back(value, point, w, wanted, in_turn=in_turn) * w)
            for w in directions
        ]
    value, forms = detach_unless((value, torch.cat(found)), wanted)
    return value, forms


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
        field, x, direction = repeat_rows(field, x, direction)
        direction = direction.unsqueeze(0)

    def chosen(value: Tensor) -> Tensor:
        return cotangent(value.reshape(shape)).detach().reshape(value.shape)

    def value_and_parts(point: Tensor) -> tuple[Tensor, list[Tensor]]:
        value, *parts = derive(field, point, direction)
        refuse_dropped(value)
        return value[0], [value[:1], *[part for part in parts if part is not None]]

    wanted = torch.is_grad_enabled()
    value, parts, back, wanted = _pullback(value_and_parts, x, wanted, push)
    c = chosen(value)
    # Differentiated in c, in which it is linear: so a Function that drops the graph is noticed.
    pulled, _, again, _ = _pullback(lambda c: (back(c), ()), c, False)
    pushed = again(c).detach().reshape(shape) if push else None
    *parts, pulled = detach_unless([*parts, pulled], wanted)
    if apart:
        parts = split_directions([part.squeeze(0) for part in parts], shape)
    return Products(Derivatives(*parts), c.reshape(shape), pulled.reshape(shape), pushed)
