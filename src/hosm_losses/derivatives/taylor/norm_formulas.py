r"""The formulas of a norm of a stack.

Formula of a norm over a row of N elements, with c = x − ⟨x⟩, ⟨·⟩ the mean over the row:
    ρ = (⟨c²⟩ + eps)^(−1/2), y = c ρ, and with derivatives of c scaled alike, d_l = c_l ρ:
    s_l = −⟨y d_l⟩                            y_l = d_l + s_l y
    b = 3 s_l s_r − ⟨d_l d_r + y d_lr⟩        y_lr = d_lr + s_r d_l + s_l d_r + b y

    RMS norm is the same with c = x.

Cost:
    Everything is a combination of the given tensors with numbers of the rows, which follow from
    inner products: each tensor is read a few times, and few new ones are made. Means are not
    subtracted beforehand but from the result.
"""

__all__ = ["Norm", "Pair", "Rows", "derivatives", "evaluate", "second_derivatives"]

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses.derivatives.primitives import at_least_float32
from hosm_losses.derivatives.taylor.forward_mode import Pairs
from hosm_losses.derivatives.taylor.recompute import plus_product

BOTH = (-2, -1)


class Rows(NamedTuple):
    """What a norm is taken over, and the layout of its weights.

    Attributes:
        shape: that of a sample in which a row is the last two axes.
        weights: that of weight and bias, broadcast against the former.
        eps: added to the variance.
        centred: whether the mean is subtracted.
    """

    shape: tuple[int, ...]
    weights: tuple[int, ...]
    eps: float
    centred: bool


class Norm:
    """A norm at a value: c, ρ and what else of the row recurs."""

    def __init__(self, rows: Rows, stack: Tensor, weight: Tensor | None) -> None:
        self.rows, self.count = rows, rows.shape[-1] * rows.shape[-2]
        self.weight = None if weight is None else weight.reshape(rows.weights)
        value, *self.others = self.components(stack)
        self.c = value - self.mean(value) if rows.centred else value
        self.rho = torch.rsqrt(self.inner(self.c, self.c) + rows.eps)
        self.scale = self.rho if self.weight is None else self.rho * self.weight

    def components(self, stack: Tensor) -> tuple[Tensor, ...]:
        """The components of a stack in rows, in float32 at least."""
        return at_least_float32(stack).reshape(*stack.shape[:2], *self.rows.shape).unbind()

    def mean(self, x: Tensor) -> Tensor:
        """⟨x⟩."""
        return x.sum(BOTH, keepdim=True) / self.count

    def centre(self, x: Tensor) -> Tensor | float:
        """What is to be subtracted from x."""
        return self.mean(x) if self.rows.centred else 0.0

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨a b⟩."""
        return self.mean(a * b)

    def partly(self, product: Tensor) -> Tensor:
        """Sums over that part of a row which shares its weight."""
        one = self.weight is None or self.weight.shape[-1] == 1
        return product.sum(-1, keepdim=True) if one else product

    def weighted(self, partial: Tensor) -> Tensor:
        """The mean over a row, with its weights, from what `partly` gives."""
        return self.mean(partial if self.weight is None else partial * self.weight)

    def slope(self, tangent: Tensor) -> Tensor:
        """s of a first derivative."""
        return -self.rho.square() * self.inner(self.c, tangent)


class Pair(NamedTuple):
    """A second derivative: of which first ones it is, itself, and its number b."""

    left: int
    right: int
    second: Tensor | None
    bend: Tensor


def second_derivatives(
    norm: Norm,
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    slopes: Sequence[Tensor],
    pairs: Pairs,
) -> list[Pair]:
    """What the second derivatives are made of."""
    if pairs == "none":
        return []
    count = len(firsts) if pairs == "squares" else len(firsts) // 2
    found = []
    for left in range(count):
        right, second = left + len(firsts) - count, seconds[left] if seconds else None
        a, b = firsts[left], firsts[right]
        inner = norm.inner(a, b) - norm.centre(a) * norm.centre(b)
        if second is not None:
            inner = inner + norm.inner(norm.c, second)
        bend = 3 * slopes[left] * slopes[right] - norm.rho.square() * inner
        found.append(Pair(left, right, second, bend))
    return found


def evaluate(
    rows: Rows,
    firsts: int,
    pairs: Pairs,
    stack: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The stack of the norm, with weight and bias."""
    norm = Norm(rows, stack, weight)
    first, second = norm.others[:firsts], norm.others[firsts:]
    # Not in place: under vmap the bias may have a dimension that the value lacks.
    value = norm.c * norm.scale
    found = [value if bias is None else value + bias.reshape(rows.weights)]
    found += [part * norm.scale for part in derivatives(norm, first, second, pairs)]
    return torch.stack(found).reshape(-1, *stack.shape[1:]).to(stack.dtype)


def derivatives(
    norm: Norm, firsts: Sequence[Tensor], seconds: Sequence[Tensor], pairs: Pairs
) -> list[Tensor]:
    """The derivatives of y, divided by ρ."""
    slopes = [norm.slope(first) for first in firsts]
    found = [
        torch.addcmul(first, norm.c, slope).sub_(norm.centre(first))
        for first, slope in zip(firsts, slopes, strict=True)
    ]
    for left, right, second, bend in second_derivatives(norm, firsts, seconds, slopes, pairs):
        bent = norm.c * bend
        centre = slopes[right] * norm.centre(firsts[left])
        centre = centre + slopes[left] * norm.centre(firsts[right])
        bent = plus_product(bent, firsts[left], slopes[right])
        bent = plus_product(bent, firsts[right], slopes[left])
        if second is not None:
            bent.add_(second)
            centre = centre + norm.centre(second)
        found.append(bent.sub_(centre))
    return found
