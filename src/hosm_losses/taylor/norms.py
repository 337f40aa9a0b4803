r"""Norms over rows, and their gradients.

Formula over a row of N elements, with c = x − ⟨x⟩ and ⟨·⟩ the mean over the row (RMS norm: c = x),
z·w the sum of products over the row, u = (c·c + N eps)^(−1/2), ρ = √N u, and capitals for what
lies along c, Z = u² c·z:
    y = ρ c        y_l = J c_l        y_ll = J c_ll + bent(c_l, c_l)
    The first three derivatives of y, with {z w} = u² z·w − 3 Z W:
    J z = ρ (z − c Z)
    bent(z, w) = −ρ (Z w + W z + c {z w})
    third(z, w, v) = −ρ (z {w v} + w {z v} + v {z w} − 3 c (Z {w v} + W {z v} + V {z w} + 4 Z W V))

Gradients, for cotangents a of y, b_l of y_l and d_l of y_ll, all of them centred as c is:
    A derivative is symmetric in its directions and its result, and so pulls back as it is:
    in x_ll   J d_l
    in x_l    J b_l + 2 bent(d_l, c_l)
    in x      J a + Σ_l [bent(b_l, c_l) + bent(d_l, c_ll) + third(d_l, c_l, c_l)]
    Gradients of those in x and x_l, for cotangents p and q_l of them, where there is no d:
    in a      J p
    in b_l    J q_l + bent(p, c_l)
    in x_l    bent(p, b_l)
    in x      bent(p, a) + Σ_l [bent(q_l, b_l) + third(p, b_l, c_l)]

Autograd, with the formula evaluated again, reads and writes the activations 1.6 times as often.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.composites import ON_JETS, ON_TENSORS, composite
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.products import with_bias
from hosm_losses.taylor.recompute import Needed, with_recomputation
from hosm_losses.taylor.registry import axes
from hosm_losses.taylor.stacks import (
    Pairs,
    add_products,
    at_least_float32,
    collect,
    components,
    total,
)

Some = Tensor | None
Term = tuple[Tensor, Tensor]  # a factor for each row, and a stack


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
        return at_least_float32(stack).reshape(len(stack), *self.shape)

    def total(self, x: Tensor) -> Tensor:
        """The sum over each row."""
        return x.sum(self.dims, keepdim=True)

    def measured(self, stack: Tensor, firsts: int) -> tuple[Tensor, Tensor, Tensor]:
        """A stack without its means, u and C_l of each row."""
        centred = self.seen(stack)
        if self.centred:
            # Not times 1/N, which is rounded: of equal numbers nothing may be left.
            centred = centred - self.total(centred) / self.length
        value, tangents, _ = components(centred, firsts)
        u = torch.rsqrt(self.total(value * value) + self.length * self.eps)
        return centred, u, u * u * self.total(value * tangents)

    def weighted(self, x: Tensor, weight: Some) -> Tensor:
        """A stack times the weight."""
        return x if weight is None else x * weight.reshape(self.weights)

    def cotangents(self, raw: Tensor, weight: Some = None) -> Tensor:
        """A stack times the weight, less its mean where the norm subtracts that."""
        weighted = self.weighted(raw, weight)
        if not self.centred:
            return weighted
        mean = weighted.mean(self.dims, keepdim=True)
        return weighted - mean if weight is None else weighted.sub_(mean)

    def of_weight(self, x: Tensor, weight: Some) -> Some:
        """The gradient in a weight or bias, of that in its product with ones."""
        if weight is None:
            return None
        return x.sum_to_size(self.weights).reshape(weight.shape).to(weight.dtype)


def normalize_stack(
    rows: Rows, firsts: int, pairs: Pairs, stack: Tensor, weight: Some, bias: Some
) -> Tensor:
    """The stack of a norm, with weight and bias; computed in float32 at least."""
    centred, u, along = rows.measured(stack, firsts)
    value, tangents, seconds = components(centred, firsts)
    norm, c = _Norm(rows, value, u), _Seen(tangents, along)
    parts = [value, norm.turned(c)]
    if pairs != "none":
        parts.append(norm.curved(c, seconds, pairs))
    bias = None if bias is None else bias.reshape(rows.weights)
    found = with_bias(torch.cat(parts) * rows.weighted(norm.rho, weight), bias, 1)
    return found.reshape(-1, *stack.shape[1:]).to(stack.dtype)


class _Seen(NamedTuple):
    """A stack of centred rows z, and Z = u² c·z."""

    z: Tensor
    along: Tensor

    def split(self, *sizes: int) -> "list[_Seen]":
        """Its parts, of so many components."""
        return list(map(_Seen, self.z.split_with_sizes(sizes), self.along.split_with_sizes(sizes)))


class _Norm:
    """J, −bent and −third of some rows, divided by ρ; the last two as lists of terms."""

    def __init__(self, rows: Rows, value: Tensor, u: Tensor) -> None:
        self.rows, self.value = rows, value
        self.square, self.rho = u * u, math.sqrt(rows.length) * u

    def seen(self, z: Tensor) -> _Seen:
        """A stack of centred rows."""
        return _Seen(z, self.square * self.rows.total(self.value * z))

    def product(self, x: _Seen, y: _Seen) -> Tensor:
        """The {z w} of each component."""
        product = self.square * self.rows.total(x.z * y.z)
        return torch.addcmul(product, x.along, y.along, value=-3)

    def turned(self, x: _Seen) -> Tensor:
        """The stack of J z."""
        return torch.addcmul(x.z, self.value, x.along, value=-1)

    def bent(self, x: _Seen, y: _Seen, product: Some = None) -> list[Term]:
        """The terms of −bent(z, w) / ρ."""
        product = self.product(x, y) if product is None else product
        return [(x.along, y.z), (y.along, x.z), (product, self.value)]

    def third(self, x: _Seen, y: _Seen) -> list[Term]:
        """The terms of −third(z, w, w) / ρ."""
        xy, yy = self.product(x, y), self.product(y, y)
        along = -3 * _third_along(x.along, y.along, y.along, xy, xy, yy)
        return [(yy, x.z), (2 * xy, y.z), (along, self.value)]

    def curved(self, firsts: _Seen, seconds: Tensor, pairs: Pairs) -> Tensor:
        """bent and J of second derivatives, if there are any, divided by ρ."""
        product = self.product(firsts, firsts)
        bent = torch.addcmul(2 * firsts.along * firsts.z, self.value, product)
        found = -collect(bent, pairs)
        return found + self.turned(self.seen(seconds)) if len(seconds) else found


def _third_along(x: Tensor, y: Tensor, z: Tensor, xy: Tensor, xz: Tensor, yz: Tensor) -> Tensor:
    """Z {w v} + W {z v} + V {z w} + 4 Z W V."""
    return torch.addcmul(torch.addcmul(x * yz, y, xz), z, torch.addcmul(xy, x, y, value=4))


def _added(whole: Tensor, terms: Iterable[Term], value: float) -> Tensor:
    """Add terms to a stack in place: of each component, or all of them to a stack of one."""
    for factor, stack in terms:
        add_products(whole, factor, stack, value)
    return whole


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
    """The gradients of a norm in the stack, the weight and the bias."""
    centred, u, along = rows.measured(stack, firsts)
    value, tangents, seconds = components(centred, firsts)
    norm, raw = _Norm(rows, value, u), rows.seen(cotangent)
    seen = norm.seen(rows.cotangents(raw, weight))
    _, b, d = seen.split(1, firsts, len(raw) - 1 - firsts)
    c = _Seen(tangents, along)
    if len(stack) < len(raw):  # where second derivatives are zero, of which there is no gradient
        seen = _Seen(seen.z[: len(stack)], seen.along[: len(stack)])
    of_stack = norm.turned(seen)
    of_value = of_stack[:1]
    _added(of_value, norm.bent(b, c), -1)
    if pairs != "none":
        _added(of_stack[1 : 1 + firsts], norm.bent(d, c), -2)
        _added(of_value, norm.third(d, c), -1)
        if len(seconds):
            _added(of_value, norm.bent(d, norm.seen(seconds)), -1)
    of_weight = None
    if needed[1]:
        terms = [(raw[1 : 1 + firsts], norm.turned(c))]
        if pairs != "none":
            terms.append((raw[1 + firsts :], norm.curved(c, seconds, pairs)))
        of_weight = _added(raw[:1] * value, terms, 1).mul_(norm.rho)
        of_weight = rows.of_weight(of_weight, weight)
    of_bias = rows.of_weight(raw[:1], bias) if needed[2] else None
    return _as(of_stack.mul_(norm.rho), stack), of_weight, of_bias


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
    centred, u, along = rows.measured(stack, len(stack) - 1)
    value, tangents, _ = components(centred, len(stack) - 1)
    norm, raw, sizes = _Norm(rows, value, u), rows.seen(cotangent), (1, len(tangents))
    c = _Seen(tangents, along)
    given = norm.seen(rows.cotangents(raw, weight))
    other = norm.seen(rows.cotangents(rows.seen(again)))
    (_, b), (p, _) = given.split(*sizes), other.split(*sizes)
    pb, pc, bc = norm.product(p, b), norm.product(p, c), norm.product(b, c)
    # bent(p, a), bent(q_l, b_l) and third(p, b_l, c_l) in one term for each stack.
    of_given, of_other = other.along.clone(), given.along.clone()
    of_given[1:].add_(pc)
    of_other[:1].add_(total(bc))
    third = total(_third_along(p.along, b.along, c.along, pb, pc, bc))
    of_c = torch.add(total(norm.product(other, given)), third, alpha=-3)
    terms = [(of_given, given.z), (of_other, other.z), (pb, c.z)]
    of_value = _added(value * of_c, terms, 1)
    of_firsts = _added(b.z * p.along, [(b.along, p.z), (pb, value)], 1)
    of_stack = torch.cat([of_value, of_firsts]).mul_(-norm.rho)
    of_outputs = norm.turned(other)
    _added(of_outputs[1:], norm.bent(p, c, pc), -1)
    of_outputs.mul_(norm.rho)
    of_weight = rows.of_weight(raw * of_outputs, weight) if needed[1] else None
    of_cotangent = rows.weighted(of_outputs, weight)
    of_bias = None if bias is None else torch.zeros_like(bias)
    return _as(of_stack, stack), of_weight, of_bias, _as(of_cotangent, cotangent)


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape).to(like.dtype)


# ------------------------------------------------------------------------------------ the norms
def _of_jet(rows: Rows, x: Any, weight: Any = None, bias: Any = None) -> Any:
    if len(rows.dims) == len(rows.shape):
        raise NoRule  # where a row is not a part of a sample
    pullbacks: list[Any] = [partial(pull_back, rows, x.firsts, x.pairs)]
    if x.pairs == "none":
        pullbacks.append(partial(pull_back_again, rows))
    function = partial(normalize_stack, rows, x.firsts, x.pairs)
    return x.like(with_recomputation(function, x.stack, weight, bias, pullbacks=pullbacks))


def _of_tensor(rows: Rows, x: Tensor, weight: Some = None, bias: Some = None) -> Tensor:
    """The norm by operators that PyTorch differentiates rightly, in float32 at least."""
    centred = at_least_float32(x).reshape(rows.shape)
    # Sums divided afterwards: the gradient of a mean is written out, that of a sum is a view.
    if rows.centred:
        centred = centred - rows.total(centred) / rows.length
    variance = rows.total(centred * centred) / rows.length
    standard = rows.weighted(centred * torch.rsqrt(variance + rows.eps), weight)
    standard = standard if bias is None else standard + bias.reshape(rows.weights)
    return standard.reshape(x.shape).to(x.dtype)


ON_JETS.norm, ON_TENSORS.norm = _of_jet, _of_tensor
# Whether the eps that PyTorch adds by itself for a short type is that of float32.
_WIDE = bool(F.rms_norm(torch.full((1, 1), 2**-8, dtype=torch.bfloat16, device="cpu"), (1,)) > 0.5)


def _over_last(
    ops: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float, **named: Any
) -> Any:
    shape = tuple(shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise NoRule
    dims = tuple(range(-len(shape), 0))
    return ops.norm(Rows(tuple(x.shape), dims, shape, eps, **named), x, weight, bias)


@composite("layer_norm", several=False, primitive=True)
def _layer_norm(
    ops: Any,
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Any:
    return _over_last(ops, x, normalized_shape, weight, bias, eps)


@composite("rms_norm", several=False)
def _rms_norm(
    ops: Any, x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    if eps is None:
        wide = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(wide if _WIDE else x.dtype).eps
    return _over_last(ops, x, normalized_shape, weight, None, eps, centred=False)


@composite("group_norm", several=False, primitive=True)
def _group_norm(
    ops: Any,
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Any:
    if x.ndim < 2 or x.shape[1] % num_groups:
        raise NoRule
    each = x.shape[1] // num_groups
    shape = (x.shape[0], num_groups, each, x.shape[2:].numel())
    return ops.norm(Rows(shape, (-2, -1), (num_groups, each, 1), eps), x, weight, bias)


def _move_statistics(norm: Any, ops: Any, x: Any, mean: Any, variance: Any, *options: Any) -> None:
    """Let the operator update its statistics; PyTorch refuses a single value a channel."""
    with torch.no_grad():
        if mean is not None:
            norm(ops.value(x), mean, variance, None, None, True, *options)
        elif x.shape[2:].numel() * (x.shape[0] if norm is F.batch_norm else 1) <= 1:
            raise NoRule


@composite(F.batch_norm, several=False, primitive=True)
def _batch_norm(
    ops: Any,
    x: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if x.ndim < 2:
        raise NoRule
    channels = (1, x.shape[1], *(1,) * (x.ndim - 2))
    if training:
        _move_statistics(F.batch_norm, ops, x, running_mean, running_var, momentum, eps)
        dims = axes((0, *range(2, x.ndim)), x.ndim)
        return ops.norm(Rows(tuple(x.shape), dims, channels, eps), x, weight, bias)
    if running_mean is None or running_var is None:
        raise NoRule
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    scaled = ops.mul(x, scale.reshape(channels))
    return ops.to(ops.add(scaled, shift.reshape(channels)), x.dtype)


@composite(F.instance_norm, several=False, primitive=True)
def _instance_norm(
    ops: Any,
    x: Any,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if x.ndim < 3:
        raise NoRule
    if not use_input_stats:
        return _batch_norm(ops, x, running_mean, running_var, weight, bias, eps=eps)
    _move_statistics(F.instance_norm, ops, x, running_mean, running_var, momentum, eps)
    return _group_norm(ops, x, x.shape[1], weight, bias, eps)
