r"""The formula of norms over rows, and its gradients.

Formula over a row of N elements, with c = x − ⟨x⟩, ⟨·⟩ the mean over the row (RMS norm: c = x),
ρ = (⟨c²⟩ + eps)^(−1/2), n = ρ c, and capitals for what lies along n, Z = ⟨n z⟩:
    y = n        y_l = J c_l        y_lr = J c_lr + bent(c_l, c_r)
    J z = ρ (z − n Z)
    bent(z, w) = −ρ² (Z w + W z + n (⟨z w⟩ − 3 Z W))

Gradients, for cotangents a of y, b_l of y_l and d of y_lr, all of them centred as c is:
    What is pulled back is N L, where L is a sum of ⟨a n⟩, of pairs ⟨z J w⟩ and of triples
    T(z, w, v) = ⟨z bent(w, v)⟩. Both are symmetric in their arguments. So the gradient in w is J z
    or bent(z, v), and with g = ∂L/∂n, all else held fixed, the gradient in x is
        J g − ρ n (Σ pairs + 2 Σ triples).
    The gradients in x and x_l have gradients too, for cotangents p and q_l: those of
        ⟨p J a⟩ + Σ_l ⟨q_l J b_l⟩ + Σ_l T(p, b_l, c_l),
    which is such a sum again.

Autograd reads and writes the activations half as often again for these gradients.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import at_least_float32
from hosm_losses.derivatives.taylor.along import Pairs
from hosm_losses.derivatives.taylor.jet import components, gathered, halves
from hosm_losses.derivatives.taylor.recompute import Needed

Some = Tensor | None


class Rows(NamedTuple):
    """What a norm is taken over."""

    shape: tuple[int, ...]  # in which the value is seen
    dims: tuple[int, ...]  # of the shape, counted from the back, over which a mean is taken
    weights: tuple[int, ...]  # the shape of weight and bias, broadcast against it
    eps: float  # added to the variance
    centred: bool = True  # whether the mean is subtracted

    def seen(self, stack: Tensor) -> Tensor:
        """A stack in this shape, in float32 at least."""
        return at_least_float32(stack).reshape(len(stack), *self.shape)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each row."""
        # The gradient of a mean is written out, that of a sum is a view.
        return x.sum(self.dims, keepdim=True) / math.prod([self.shape[dim] for dim in self.dims])

    def about_mean(self, x: Tensor) -> Tensor:
        """A stack, less its mean where the norm subtracts that."""
        return x - self.mean(x) if self.centred else x

    def weighted(self, x: Tensor, weight: Some) -> Tensor:
        """A stack times the weight."""
        return x if weight is None else x * weight.reshape(self.weights)

    def of_weight(self, x: Tensor, weight: Some) -> Some:
        """The gradient in a weight or bias, of that in its product with ones."""
        if weight is None:
            return None
        return x.sum_to_size(self.weights).reshape(weight.shape).to(weight.dtype)


def normalised(
    rows: Rows, firsts: int, pairs: Pairs, stack: Tensor, weight: Some, bias: Some
) -> Tensor:
    """The stack of a norm, with weight and bias; computed in float32 at least."""
    c = rows.about_mean(rows.seen(stack))
    value, tangents, seconds = components(c, firsts)
    rho = torch.rsqrt(rows.mean(value * value) + rows.eps)
    scale = rows.weighted(rho, weight)
    slopes = -rho * rho * rows.mean(value * tangents)
    scaled = value * scale
    parts = [
        scaled if bias is None else scaled + bias.reshape(rows.weights),
        torch.addcmul(tangents, value, slopes) * scale,
    ]
    if pairs != "none":
        (left, right), (to_left, to_right) = halves(tangents, pairs), halves(slopes, pairs)
        products = gathered(left * right, pairs)
        products = torch.addcmul(products, value, seconds) if len(seconds) else products
        bend = 3 * gathered(to_left * to_right, pairs) - rho * rho * rows.mean(products)
        sides = torch.addcmul(left * to_right, right, to_left)
        bent = torch.addcmul(gathered(sides, pairs), value, bend)
        parts.append((bent + seconds if len(seconds) else bent) * scale)
    return torch.cat(parts).reshape(-1, *stack.shape[1:]).to(stack.dtype)


class _Seen(NamedTuple):
    """A stack of centred rows z, and Z = ⟨n z⟩."""

    z: Tensor
    along: Tensor

    def split(self, *sizes: int) -> "list[_Seen]":
        """Its parts, of so many components."""
        return list(map(_Seen, self.z.split(sizes), self.along.split(sizes)))


class _Sum:
    """A sum L of pairs and triples, for its gradient in x."""

    def __init__(self, rows: Rows, value: Tensor) -> None:
        self.rows = rows
        self.rho = torch.rsqrt(rows.mean(value * value) + rows.eps)
        self.n = value * self.rho
        self.of_n: Any = None
        self.along_n: Tensor | float = 0.0

    def seen(self, z: Tensor) -> _Seen:
        """A stack of centred rows."""
        return _Seen(z, self.rows.mean(self.n * z))

    def turned(self, x: _Seen) -> Tensor:
        """The stack J z."""
        return torch.addcmul(x.z, self.n, x.along, value=-1).mul_(self.rho)

    def bent(self, x: _Seen, y: _Seen) -> Tensor:
        """What a triple adds to the gradient in its third."""
        along = self.rows.mean(x.z * y.z) - 3 * x.along * y.along
        sides = torch.addcmul(x.along * y.z, y.along, x.z)
        return torch.addcmul(sides, self.n, along).mul_(-self.rho.square())

    def add_pair(self, x: _Seen, y: _Seen) -> None:
        """Add Σ_l ⟨z J w⟩ to L."""
        for one, other in ((x, y), (y, x)):
            self.of_n = _plus(self.of_n, -self.rho * one.along, other.z)
        pair = self.rows.mean(x.z * y.z) - x.along * y.along
        self.along_n = self.along_n + (self.rho * pair).sum(0, keepdim=True)

    def add_triple(self, x: _Seen, y: _Seen, z: _Seen) -> None:
        """Add Σ_l T(z, w, v) to L."""
        factor, total = -self.rho.square(), 6 * x.along * y.along * z.along
        for one, two, three in ((x, y, z), (y, z, x), (z, x, y)):
            along = self.rows.mean(two.z * three.z) - 3 * two.along * three.along
            self.of_n = _plus(self.of_n, factor * along, one.z)
            total = total + one.along * along
        self.along_n = self.along_n + (2 * factor * total).sum(0, keepdim=True)

    def of_value(self, a: Some = None) -> Tensor:
        """The gradient in x of L, and of ⟨a n⟩."""
        of_n = self.of_n if a is None else self.of_n + a
        along = self.rows.mean(self.n * of_n) + self.along_n
        return torch.addcmul(of_n, self.n, along, value=-1).mul_(self.rho)


def _plus(total: Some, factor: Tensor, stack: Tensor) -> Tensor:
    """The total and Σ_l factor_l z_l, of shape (1, *); in place where there is one."""
    if len(factor) != 1 or len(stack) != 1:
        products = (factor * stack).sum(0, keepdim=True)
        return products if total is None else total.add_(products)
    return factor * stack if total is None else total.addcmul_(factor, stack)


def pull_back(
    rows: Rows,
    firsts: int,
    pairs: Pairs,
    needed: Needed,
    stack: Tensor,
    weight: Some,
    bias: Some,
    cotangent: Tensor,
) -> tuple[Some, ...]:
    """The gradients of `normalised` in the stack, the weight and the bias."""
    value, tangents, seconds = components(rows.about_mean(rows.seen(stack)), firsts)
    raw, total = rows.seen(cotangent), _Sum(rows, value)
    a, others = rows.about_mean(rows.weighted(raw, weight)).split((1, len(raw) - 1))
    b, d = total.seen(others).split(firsts, len(others) - firsts)
    c, s = total.seen(tangents), total.seen(seconds)
    total.add_pair(b, c)
    of_firsts, of_seconds, bent = total.turned(b), [], None
    if pairs != "none":
        sides = zip(halves(c.z, pairs), halves(c.along, pairs), strict=True)
        left, right = (_Seen(*side) for side in sides)
        total.add_triple(d, left, right)
        if left.z is right.z:
            of_firsts.add_(total.bent(d, right), alpha=2)
        else:
            to_left, to_right = total.bent(d, right), total.bent(d, left)
            if pairs == "last":
                to_right = to_right.sum(0, keepdim=True)
            of_firsts.add_(torch.cat([to_left, to_right]))
        bent = gathered(total.bent(left, right), pairs) if needed[1] else None
        if len(seconds):
            total.add_pair(d, s)
            of_seconds = [total.turned(d)]
            bent = bent if bent is None else bent.add_(total.turned(s))
    of_stack = torch.cat([total.of_value(a), of_firsts, *of_seconds])
    of_weight = None
    if needed[1]:
        of_weight = _plus(raw[:1] * total.n, raw[1 : 1 + firsts], total.turned(c))
        of_weight = of_weight if bent is None else _plus(of_weight, raw[1 + firsts :], bent)
        of_weight = rows.of_weight(of_weight, weight)
    of_bias = rows.of_weight(raw[:1], bias) if needed[2] else None
    return _as(of_stack, stack), of_weight, of_bias


def pull_back_again(
    rows: Rows,
    needed: Needed,
    stack: Tensor,
    weight: Some,
    bias: Some,
    cotangent: Tensor,
    again: Tensor,
) -> tuple[Some, ...]:
    """The gradients in the arguments of `pull_back` of what it returns first, for no pairs."""
    value, tangents = rows.about_mean(rows.seen(stack)).split((1, len(stack) - 1))
    raw, total = rows.seen(cotangent), _Sum(rows, value)
    c = total.seen(tangents)
    a, b = total.seen(rows.about_mean(rows.weighted(raw, weight))).split(1, len(tangents))
    p, q = total.seen(rows.about_mean(rows.seen(again))).split(1, len(tangents))
    total.add_pair(p, a)
    total.add_pair(q, b)
    total.add_triple(p, b, c)
    of_stack = torch.cat([total.of_value(), total.bent(p, b)])
    of_outputs = torch.cat([total.turned(p), total.turned(q).add_(total.bent(p, c))])
    of_weight = rows.of_weight(raw * of_outputs, weight) if needed[1] else None
    of_cotangent = rows.weighted(of_outputs, weight)
    of_bias = None if bias is None else torch.zeros_like(bias)
    return _as(of_stack, stack), of_weight, of_bias, _as(of_cotangent, cotangent)


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape).to(like.dtype)
