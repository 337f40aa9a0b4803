r"""The gradients of a norm of a stack, and the gradients of these.

Formula of the gradients for cotangents h of y, h_l of y_l, g of y_lr; in x, times ρ and centred:
    h − ⟨y h⟩ y
    Σ s_l h_l − ⟨y h_l⟩ d_l − (3 s_l ⟨y h_l⟩ + ⟨h_l d_l⟩) y
    Σ b g − p_l d_l − p_r d_r − ⟨y g⟩ d_lr
      − (3 s_r ⟨g d_l⟩ + 3 s_l ⟨g d_r⟩ + (3 b + 6 s_l s_r) ⟨y g⟩ + ⟨g d_lr⟩) y
    with p_l = ⟨g d_r⟩ + 3 s_r ⟨y g⟩, p_r = ⟨g d_l⟩ + 3 s_l ⟨y g⟩; and in x_l, x_r and x_lr
    h_l − ⟨y h_l⟩ y + s_r g − p_l y − ⟨y g⟩ d_r,     the like in x_r,     g − ⟨y g⟩ y.

    What `pull_back` returns for h and h_l, with cotangents a of the gradient in x and e of that in
    x_l, has the gradients of ⟨h, y_a⟩ + ⟨h_l, y_al⟩ for derivatives a, x_l and second derivative
    e: the same formulas again.
"""

__all__ = ["pull_back", "pull_back_again"]

from collections.abc import Sequence

import torch
from torch import Tensor

from hosm_losses.derivatives.taylor.forward_mode import Pairs
from hosm_losses.derivatives.taylor.norm_formulas import (
    Norm,
    Rows,
    derivatives,
    second_derivatives,
)


class _Gradient:
    """A gradient in the making: cotangents and components, each times a number of the row."""

    def __init__(self, norm: Norm, wanted: bool) -> None:
        self.norm, self.wanted = norm, wanted
        self.cotangents: Tensor | None = None
        self.components: Tensor | None = None
        self.centre: Tensor | float = 0.0

    def cotangent(self, number: Tensor | None, cotangent: Tensor, mean: Tensor) -> None:
        """Add number · h, with the mean of h."""
        if not self.wanted:
            return
        mean = mean if number is None else mean * number
        self.centre = self.centre + mean
        self.cotangents = _plus(self.cotangents, cotangent, number)

    def component(self, number: Tensor, component: Tensor, centre: Tensor | float = 0.0) -> None:
        """Add number · ρ · component, centred."""
        if not self.wanted:
            return
        number = number * self.norm.rho
        self.centre = self.centre + number * centre
        self.components = _plus(self.components, component, number)

    def finish(self) -> Tensor:
        """Times ρ, with the weights on the cotangents."""
        norm = self.norm
        assert self.components is not None
        total = self.components * norm.rho
        if self.cotangents is not None:
            total.addcmul_(self.cotangents, norm.scale.expand_as(total))
        return total.sub_(norm.rho * self.centre) if norm.rows.centred else total


def _plus(total: Tensor | None, vector: Tensor, number: Tensor | None) -> Tensor:
    if total is None:
        return vector.clone() if number is None else vector * number
    return total.add_(vector) if number is None else total.addcmul_(vector, number)


class _Cotangent:
    """A cotangent with its products, of which the gradients of the weights are made as well."""

    def __init__(self, norm: Norm, cotangent: Tensor) -> None:
        self.norm, self.raw = norm, cotangent
        self.sums = norm.partly(cotangent)
        self.mean = norm.weighted(self.sums)
        self.products = norm.partly(cotangent * norm.c)
        self.on_y = norm.rho * norm.weighted(self.products)

    def on(self, component: Tensor) -> tuple[Tensor, Tensor]:
        """⟨h d⟩ of a component, and the product it comes from, centred."""
        products = self.norm.partly(self.raw * component) - self.sums * self.norm.centre(component)
        return self.norm.rho * self.norm.weighted(products), products


def _gradients(
    norm: Norm,
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    pairs: Pairs,
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[list[Tensor], Tensor]:
    """The gradients in the components that are wanted; that in the weight, by part of a row."""
    gradients = [_Gradient(norm, want) for want in wanted]
    value, *of_firsts = gradients[: 1 + len(firsts)]
    slopes = [norm.slope(first) for first in firsts]
    centres = [norm.centre(first) for first in firsts]
    along, of_weight = torch.zeros_like(norm.rho), torch.zeros_like(norm.rho)
    own, *others = (None if each is None else _Cotangent(norm, each) for each in cotangents)
    if own is not None:
        value.cotangent(None, own.raw, own.mean)
        along, of_weight = own.on_y, own.products
    for first, centre, slope, to, of_first in zip(
        firsts, centres, slopes, others[: len(firsts)], of_firsts, strict=True
    ):
        if to is None:
            continue
        on, products = to.on(first)
        value.cotangent(slope, to.raw, to.mean)
        value.component(-to.on_y, first, centre)
        along = along + 3 * slope * to.on_y + on
        of_weight = of_weight + products + slope * to.products
        of_first.cotangent(None, to.raw, to.mean)
        of_first.component(-to.on_y, norm.c)
    for pair, to in zip(
        second_derivatives(norm, firsts, seconds, slopes, pairs),
        others[len(firsts) :],
        strict=True,
    ):
        assert to is not None
        left, right, second, bend = pair
        on_left, left_products = to.on(firsts[left])
        on_right, right_products = to.on(firsts[right])
        to_left = -on_right - 3 * slopes[right] * to.on_y
        to_right = -on_left - 3 * slopes[left] * to.on_y
        value.cotangent(bend, to.raw, to.mean)
        value.component(to_left, firsts[left], centres[left])
        value.component(to_right, firsts[right], centres[right])
        of_weight = of_weight + bend * to.products
        of_weight = of_weight + slopes[right] * left_products + slopes[left] * right_products
        for which, other, number in ((left, right, to_left), (right, left, to_right)):
            of_firsts[which].cotangent(slopes[other], to.raw, to.mean)
            of_firsts[which].component(number, norm.c)
            of_firsts[which].component(-to.on_y, firsts[other], centres[other])
        along = along + 3 * (slopes[right] * on_left + slopes[left] * on_right)
        along = along + 3 * (bend + 2 * slopes[left] * slopes[right]) * to.on_y
        if second is not None:
            on, products = to.on(second)
            value.component(-to.on_y, second, norm.centre(second))
            along, of_weight = along + on, of_weight + products
            of_second = gradients[1 + len(firsts) + left]
            of_second.cotangent(None, to.raw, to.mean)
            of_second.component(-to.on_y, norm.c)
    value.component(-along, norm.c)
    return [each.finish() for each in gradients if each.wanted], norm.rho * of_weight


def pull_back(
    rows: Rows,
    firsts: int,
    pairs: Pairs,
    stack: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cotangent: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients in stack, weight and bias."""
    norm = Norm(rows, stack, weight)
    parts = norm.components(cotangent)
    first, second = norm.others[:firsts], norm.others[firsts:]
    found, of_weight = _gradients(norm, first, second, pairs, parts, (True,) * len(stack))
    return (
        _like(found, stack),
        _summed(rows, of_weight, weight),
        None if bias is None else _summed(rows, norm.partly(parts[0]), bias),
    )


def _like(found: list[Tensor], stack: Tensor) -> Tensor:
    return torch.stack(found).reshape(-1, *stack.shape[1:]).to(stack.dtype)


def _summed(rows: Rows, partial: Tensor, like: Tensor | None) -> Tensor | None:
    if like is None:
        return None
    return partial.sum_to_size(rows.weights).reshape(like.shape).to(like.dtype)


def pull_back_again(
    rows: Rows,
    stack: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cotangent: Tensor,
    again: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of the first result of `pull_back`, for a single first derivative."""
    norm = Norm(rows, stack, weight)
    (first,) = norm.others
    a, e = norm.components(again)
    to_first, to_second = norm.components(cotangent)
    found, of_weight = _gradients(
        norm,
        (a, first),
        (e,),
        "halves",
        (None, to_first, None, to_second),
        (True, False, True, False),
    )
    outer_value, _, outer_first = derivatives(norm, (a, first), (e,), "halves")
    return (
        _like(found, stack),
        _summed(rows, of_weight, weight),
        None if bias is None else torch.zeros_like(bias),
        _like([outer_value * norm.scale, outer_first * norm.scale], stack),
    )
