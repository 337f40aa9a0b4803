r"""The formula of norms over rows, and its gradients.

Formula over a row of N elements, with ⟨·⟩ its mean, · the sum of products over it, c = x − ⟨x⟩
(RMS norm: c = x) and ρ = (⟨c²⟩ + eps)^(−1/2):
    y = ρ c        y_l = J x_l        y_lr = J x_lr + bent(x_l, x_r)
    The first three derivatives of y, with h = N^(−1/2), s = h ρ y, Z = s·z for any z, and
    zw = z·J w = w·J z:
    J z = ρ (z − ⟨z⟩) − h Z y
    bent(z, w) = −h [J (Z w + W z) + s zw]
    third(z, w, v) = h² J [z (2 W V − ρ wv) + w (2 Z V − ρ zv) + v (2 Z W − ρ zw)]
                     + 2 h² s (Z wv + W zv + V zw)

Gradients, for cotangents a of y, b_l of y_l and d of y_lr:
    A derivative is symmetric in its directions and its result, and so pulls back as it is:
    in x_lr   J d
    in x_l    J b_l + bent(d, x_r) , and so for x_r
    in x      J a + Σ_l bent(b_l, x_l) + Σ [bent(d, x_lr) + third(d, x_l, x_r)]
    Gradients of those in x and x_l, for cotangents p and q_l of them, where there is no d:
    in a      J p
    in b_l    J q_l + bent(p, x_l)
    in x_l    bent(p, b_l)
    in x      bent(p, a) + Σ_l [bent(q_l, b_l) + third(p, b_l, x_l)]

J is linear: what it is applied to is added up first. It is one operator of PyTorch where a row is
the end of the shape, that of the backward pass of its layer norm. Autograd does not know how the
second derivative of that depends on x, so where there is a graph J is written out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import at_least_float32
from hosm_losses.derivatives.recompute import Needed, unseen
from hosm_losses.derivatives.taylor.along import Pairs, add_products, summed
from hosm_losses.derivatives.taylor.jet import components, gathered, halves
from hosm_losses.derivatives.taylor.layers import with_bias

Some = Tensor | None
_OF_LAYER_NORM = torch.ops.aten.native_layer_norm_backward.default


class Rows(NamedTuple):
    """What a norm is taken over."""

    shape: tuple[int, ...]  # in which the value is seen
    dims: tuple[int, ...]  # of the shape, counted from the back, that make up a row
    weights: tuple[int, ...]  # the shape of weight and bias, broadcast against it
    eps: float  # added to the variance
    centred: bool = True  # whether the mean is subtracted

    @property
    def length(self) -> int:
        """The elements of a row."""
        return math.prod([self.shape[dim] for dim in self.dims])

    def seen(self, stack: Tensor) -> Tensor:
        """A stack in this shape, in float32 at least."""
        return at_least_float32(stack).reshape(stack.shape[0], *self.shape)

    def total(self, x: Tensor) -> Tensor:
        """The sum over each row."""
        return x.sum(self.dims, keepdim=True)

    def about_mean(self, x: Tensor) -> Tensor:
        """A stack, less its mean where the norm subtracts that."""
        # Not times 1/N, which is rounded: of equal numbers nothing may be left.
        return x - self.total(x) / self.length if self.centred else x

    def at_the_end(self) -> tuple[int, ...]:
        """The shape of a row that ends the shape; none of another."""
        count = len(self.dims)
        return self.shape[-count:] if self.dims == tuple(range(-count, 0)) else ()

    def weighted(self, x: Tensor, weight: Some) -> Tensor:
        """A stack times the weight."""
        return x if weight is None else x * weight.reshape(self.weights)

    def of_weight(self, x: Tensor, weight: Some) -> Some:
        """The gradient in a weight or bias, of that in its product with ones."""
        if weight is None:
            return None
        return x.sum_to_size(self.weights).reshape(weight.shape).to(weight.dtype)


class _Norm:
    """The y, ρ, s, h and J of a value, a stack of one."""

    def __init__(self, rows: Rows, value: Tensor) -> None:
        self.rows, self.end, self.h = rows, (), rows.length**-0.5
        if rows.centred and unseen():
            self.end = rows.at_the_end()
        if self.end:
            self.value = value = value.contiguous()
            self.y, self.mean, self.rho = torch.native_layer_norm(
                value, self.end, None, None, rows.eps
            )
        else:
            centred = rows.about_mean(value)
            self.rho = torch.rsqrt(rows.total(centred * centred) / rows.length + rows.eps)
            self.y = centred * self.rho
        self._s: Some = None  # not a cached_property, whose lock breaks graphs of torch.compile

    @property
    def s(self) -> Tensor:
        """The s, computed once it is asked for."""
        found = self._s
        if found is None:
            found = self._s = self.h * self.rho * self.y
        return found

    def along(self, z: Tensor) -> Tensor:
        """The Z of each component."""
        return self.rows.total(self.s * z)

    def product(self, z: Tensor, turned: Tensor) -> Tensor:
        """The zw of each component, from z and J w."""
        return self.rows.total(z * turned)

    def turned(self, z: Tensor) -> Tensor:
        """The J z of each component."""
        if not self.end:
            centred = self.rho * self.rows.about_mean(z)
            return torch.addcmul(centred, self.y, self.along(z), value=-self.h)
        value, mean, rho = (
            # A copy: of an expanded mean the operator would take the wrong numbers, in silence.
            each if z.shape[0] == 1 else each.repeat(z.shape[0], *(1,) * (each.ndim - 1))
            for each in (self.value, self.mean, self.rho)
        )
        found = _OF_LAYER_NORM(z, value, self.end, mean, rho, None, None, [True, False, False])
        return found[0]

    def bent(self, inner: Tensor, products: Tensor) -> Tensor:
        """J of what is added up, and −h s times the products."""
        return torch.addcmul(self.turned(inner), self.s, products, value=-self.h)

    def factor(self, to_z: Tensor, to_w: Tensor, product: Tensor) -> Tensor:
        """The h² (2 Z W − ρ zw) of each component."""
        scale = self.h * self.h
        return torch.addcmul((-scale * self.rho) * product, to_z, to_w, value=2 * scale)

    def derivatives(self, tangents: Tensor, seconds: Tensor, pairs: Pairs) -> list[Tensor]:
        """The stacks of y_l and y_lr."""
        firsts = self.turned(tangents)
        if pairs == "none":
            return [firsts]
        (left, right), (_, of_right) = halves(tangents, pairs), halves(firsts, pairs)
        to_left, to_right = halves(self.along(tangents), pairs)
        inner = -self.h * gathered(torch.addcmul(left * to_right, right, to_left), pairs)
        inner = inner + seconds if seconds.shape[0] else inner
        return [firsts, self.bent(inner, gathered(self.product(left, of_right), pairs))]


def normalised(
    rows: Rows, firsts: int, pairs: Pairs, stack: Tensor, weight: Some, bias: Some
) -> Tensor:
    """The stack of a norm, with weight and bias; computed in float32 at least."""
    value, tangents, seconds = components(rows.seen(stack), firsts)
    norm = _Norm(rows, value)
    found = torch.cat([norm.y, *norm.derivatives(tangents, seconds, pairs)])
    bias = None if bias is None else bias.reshape(rows.weights)
    found = with_bias(rows.weighted(found, weight), bias, 1)
    return _as(found, stack)


def _plus(total: Tensor, *terms: tuple[float, Tensor, Tensor]) -> Tensor:
    """A stack with numbers times products: of each component, or all of them for one."""
    found = total.clone(memory_format=torch.preserve_format)
    for value, factor, stack in terms:
        add_products(found, factor, stack, value)
    return found


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
    value, c, seconds = components(rows.seen(stack), firsts)
    norm, raw = _Norm(rows, value), rows.seen(cotangent)
    a, b, d = components(rows.weighted(raw, weight), firsts)
    derivatives = norm.derivatives(c, seconds, pairs) if needed[1] or pairs != "none" else []
    along_c = norm.along(c)
    inner = _plus(a, (-norm.h, norm.along(b), c), (-norm.h, along_c, b))
    if pairs == "none":
        parts = [norm.turned(b)]
        products = summed(norm.product(c, parts[0]))
    else:
        given, of_c = (c, seconds, along_c), derivatives[0]
        parts, products = _with_pairs(norm, pairs, given, (b, d), of_c, inner)
    # Where second derivatives are zero there is no gradient of them.
    of_stack = torch.cat([norm.bent(inner, products), *parts])[: stack.shape[0]]
    of_weight = None
    if needed[1]:
        of_weight = raw[:1] * norm.y
        for part, other in zip(derivatives, components(raw, firsts)[1:], strict=False):
            add_products(of_weight, other, part)
        of_weight = rows.of_weight(of_weight, weight)
    of_bias = rows.of_weight(raw[:1], bias) if needed[2] else None
    return _as(of_stack, stack), of_weight, of_bias


def _with_pairs(
    norm: _Norm,
    pairs: Pairs,
    given: tuple[Tensor, Tensor, Tensor],
    cotangents: tuple[Tensor, Tensor],
    of_c: Tensor,
    inner: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """The gradients in x_l and x_lr; and what third adds to `inner`, in place, and to products."""
    (c, seconds, along_c), (b, d), h = given, cotangents, norm.h
    (left, right), (to_left, to_right) = halves(c, pairs), halves(along_c, pairs)
    to_d, of_d = norm.along(d), norm.turned(d)
    lr = norm.product(left, halves(of_c, pairs)[1])
    dl, dr = norm.product(left, of_d), norm.product(right, of_d)
    ends = gathered(lr, pairs) * to_d + gathered(to_left * dr + to_right * dl, pairs)
    products = torch.add(summed(norm.product(b, of_c)), summed(ends), alpha=-2 * h)
    add_products(inner, gathered(norm.factor(to_left, to_right, lr), pairs), d)
    add_products(inner, norm.factor(to_d, to_right, dr), left)
    add_products(inner, norm.factor(to_d, to_left, dl), right)
    if seconds.shape[0]:
        add_products(inner, to_d, seconds, -h)
        add_products(inner, norm.along(seconds), d, -h)
        products = products + summed(norm.product(seconds, of_d))
    of_b = b.clone()
    on_left, on_right = slice(len(left)), slice(len(c) - len(right), len(c))
    for place, other, along in ((on_left, right, to_right), (on_right, left, to_left)):
        add_products(of_b[place], to_d, other, -h)
        add_products(of_b[place], along, d, -h)
    of_b = norm.turned(of_b)
    for place, product in ((on_left, dr), (on_right, dl)):
        add_products(of_b[place], product, norm.s, -h)
    return [of_b, of_d], products


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
    sizes = 1, stack.shape[0] - 1
    value, c = rows.seen(stack).split_with_sizes(sizes)
    norm, raw = _Norm(rows, value), rows.seen(cotangent)
    given, other = rows.weighted(raw, weight), rows.seen(again)
    (a, b), (p, q) = given.split_with_sizes(sizes), other.split_with_sizes(sizes)
    to_given, to_other, to_c = norm.along(given), norm.along(other), norm.along(c)
    (_, to_b), to_p, h = to_given.split_with_sizes(sizes), to_other[:1], norm.h
    of_p, of_b = norm.turned(p), norm.turned(b)
    pb, pc, bc = norm.product(b, of_p), norm.product(c, of_p), norm.product(c, of_b)
    inner = summed(torch.addcmul(to_other * given, to_given, other)).mul_(-h)
    add_products(inner, summed(norm.factor(to_b, to_c, bc)), p)
    add_products(inner, norm.factor(to_p, to_c, pc), b)
    add_products(inner, norm.factor(to_p, to_b, pb), c)
    # pa and all qb, less what third adds.
    thirds = summed(torch.addcmul(torch.addcmul(to_p * bc, to_b, pc), to_c, pb))
    products = norm.product(a, of_p) + summed(norm.product(q, of_b))
    products = torch.add(products, thirds, alpha=-2 * h)
    of_firsts = norm.bent(torch.addcmul(to_p * b, to_b, p).mul_(-h), pb)
    of_stack = torch.cat([norm.bent(inner, products), of_firsts])
    of_tangents = norm.bent(_plus(q, (-h, to_p, c), (-h, to_c, p)), pc)
    of_outputs = torch.cat([of_p, of_tangents])
    of_weight = rows.of_weight(raw * of_outputs, weight) if needed[1] else None
    of_cotangent = rows.weighted(of_outputs, weight)
    of_bias = None if bias is None else torch.zeros_like(bias)
    return _as(of_stack, stack), of_weight, of_bias, _as(of_cotangent, cotangent)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """A stack with values in the shape of those of another, and in its type."""
    found = x.reshape(x.shape[0], *like.shape[1:])
    return found if found.dtype == like.dtype else found.to(like.dtype)
