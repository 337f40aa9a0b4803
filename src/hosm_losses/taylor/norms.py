r"""Norms over rows, and their gradients.

Formulas for a row, where ⟨·⟩ is the mean over the row, c = x − ⟨x⟩ (RMS norm: c = x), and
ρ = (⟨c c⟩ + eps)^(−1/2):
    y = ρ c        y_l = J c_l        y_ll = J c_ll + second(c_l, c_l)
    The maps J, second and third are the first three derivatives of y, along rows z, w and v that
    are already multiplied by ρ. Capitals denote the components along y, as in Z = ⟨y z⟩, and
    {z w} = ⟨z w⟩ − 3 Z W:
    J z = z − y Z
    second(z, w) = −(Z w + W z + y {z w})
    third(z, w, v) = −(z {w v} + w {z v} + v {z w} − 3 y (Z {w v} + W {z v} + V {z w} + 4 Z W V))

Gradients, for cotangents a of y, b_l of y_l and d_l of y_ll, all centred like c and multiplied by
ρ:
    The inner product of a derivative with a cotangent is symmetric in the directions and the
    cotangent, so each derivative is its own transpose:
    in x_ll   J d_l
    in x_l    J b_l + 2 second(d_l, c_l)
    in x      J a + Σ_l [second(b_l, c_l) + second(d_l, c_ll) + third(d_l, c_l, c_l)]
    Second gradients (of the gradients with respect to x and x_l), for cotangents p and q_l of
    these gradients, assuming that there is no y_ll:
    in a      J p
    in b_l    J q_l + second(p, c_l)
    in x_l    second(p, b_l)
    in x      second(p, a) + Σ_l [second(q_l, b_l) + third(p, b_l, c_l)]

If autograd differentiated a recomputed formula, activations would be read and written 1.6 times as
often as with these formulas.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.composites import ON_JETS, ON_TENSORS, composite
from hosm_losses.taylor.memory import Needed, with_recomputation
from hosm_losses.taylor.products import with_bias
from hosm_losses.taylor.registry import NoRule, axes
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
    """The rows over which a norm is computed."""

    shape: tuple[int, ...]  # the shape to which the value is reshaped
    dims: tuple[int, ...]  # the dimensions of a row, counted from the back
    weights: tuple[int, ...]  # the shape in which weight and bias broadcast
    eps: float  # added to the variance
    centred: bool = True  # whether the mean is subtracted

    @property
    def length(self) -> int:
        """The number of elements in a row."""
        return math.prod([self.shape[dim] for dim in self.dims])

    def reshape(self, stack: Tensor) -> Tensor:
        """Reshape a stack to `shape`, and cast it to at least float32."""
        return at_least_float32(stack).reshape(len(stack), *self.shape)

    def total(self, x: Tensor) -> Tensor:
        """The sum over each row."""
        return x.sum(self.dims, keepdim=True)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each row."""
        return x.mean(self.dims, keepdim=True)

    def standardize(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centred stack times ρ (its first component is y), and each row's ρ."""
        centred = self.reshape(stack)
        if self.centred:
            # Divided by N, not multiplied by a rounded 1/N: equal numbers must give exactly zero.
            centred = centred - self.total(centred) / self.length
        value = centred[:1]
        rho = torch.rsqrt(self.mean(value * value) + self.eps)
        return centred * rho, rho

    def multiply(self, x: Tensor, weight: Some) -> Tensor:
        """Multiply a stack by the weight, if there is one."""
        return x if weight is None else x * weight.reshape(self.weights)

    def scale_cotangents(self, cotangents: Tensor, rho: Tensor, weight: Some = None) -> Tensor:
        """Multiply cotangents by the weight and ρ; centre them if the norm subtracts the mean."""
        scaled = cotangents * self.multiply(rho, weight)
        return scaled.sub_(self.mean(scaled)) if self.centred else scaled

    def reduce_to(self, weight: Some, gradient: Tensor) -> Some:
        """Reduce a gradient to the shape of a weight or bias that was broadcast."""
        if weight is None:
            return None
        return gradient.sum_to_size(self.weights).reshape(weight.shape).to(weight.dtype)


class _Stack(NamedTuple):
    """A stack of rows z, with Z = ⟨y z⟩ for each row."""

    z: Tensor
    along: Tensor

    def split(self, *sizes: int) -> "list[_Stack]":
        """Split the stack into parts with the given numbers of components."""
        z, along = self.z.split_with_sizes(sizes), self.along.split_with_sizes(sizes)
        return list(map(_Stack, z, along))


class _Derivatives:
    """The maps J, −second and −third at a given y; the last two return lists of terms."""

    def __init__(self, rows: Rows, value: Tensor) -> None:
        self.rows, self.value = rows, value

    def stack(self, z: Tensor) -> _Stack:
        """Pair a stack of rows z with the Z of each row."""
        return _Stack(z, self.rows.mean(self.value * z))

    def product(self, x: _Stack, y: _Stack) -> Tensor:
        """The product {z w} for each component."""
        return torch.addcmul(self.rows.mean(x.z * y.z), x.along, y.along, value=-3)

    def jacobian(self, x: _Stack) -> Tensor:
        """The stack of J z."""
        return torch.addcmul(x.z, self.value, x.along, value=-1)

    def second(self, x: _Stack, y: _Stack, product: Some = None) -> list[Term]:
        """The terms of −second(z, w)."""
        product = self.product(x, y) if product is None else product
        return [(x.along, y.z), (y.along, x.z), (product, self.value)]

    def third(self, x: _Stack, y: _Stack) -> list[Term]:
        """The terms of −third(z, w, w)."""
        xy, yy = self.product(x, y), self.product(y, y)
        along = -3 * _third_along(x.along, y.along, y.along, xy, xy, yy)
        return [(yy, x.z), (2 * xy, y.z), (along, self.value)]

    def of_seconds(self, firsts: _Stack, seconds: Tensor, pairs: Pairs) -> Tensor:
        """Return y_ll: second(c_l, c_l), plus J c_ll if x has second derivatives."""
        second = collect(-2 * firsts.along * firsts.z, pairs)
        along = collect(self.product(firsts, firsts), pairs)
        if len(seconds):
            second, along = second + seconds, along + self.stack(seconds).along
        return torch.addcmul(second, self.value, along, value=-1)


def _third_along(x: Tensor, y: Tensor, z: Tensor, xy: Tensor, xz: Tensor, yz: Tensor) -> Tensor:
    """Z {w v} + W {z v} + V {z w} + 4 Z W V."""
    return torch.addcmul(torch.addcmul(x * yz, y, xz), z, torch.addcmul(xy, x, y, value=4))


def _add_terms(whole: Tensor, terms: Iterable[Term], value: float) -> Tensor:
    """Add `value` times each term to a stack in place.

    If the stack has only one component, the components of each term are first added up.
    """
    for factor, stack in terms:
        add_products(whole, factor, stack, value)
    return whole


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(other.shape).to(other.dtype)


class Norm(NamedTuple):
    """A norm of a stack, and the gradients of the norm, computed in at least float32."""

    rows: Rows
    firsts: int
    pairs: Pairs

    def evaluate(self, stack: Tensor, weight: Some, bias: Some) -> Tensor:
        """Return the norm's stack, with weight and bias applied."""
        rows = self.rows
        scaled, rho = rows.standardize(stack)
        value, tangents, seconds = components(scaled, self.firsts)
        norm = _Derivatives(rows, value)
        c = norm.stack(tangents)
        # Zero is subtracted from the value: joining value and derivatives would need a copy.
        along = torch.cat([torch.zeros_like(rho), c.along])
        output = norm.jacobian(_Stack(scaled[: len(along)], along))
        if self.pairs != "none":
            output = torch.cat([output, norm.of_seconds(c, seconds, self.pairs)])
        bias = None if bias is None else bias.reshape(rows.weights)
        output = with_bias(rows.multiply(output, weight), bias, 1)
        return output.reshape(-1, *stack.shape[1:]).to(stack.dtype)

    def pull_back(
        self, needed: Needed, stack: Tensor, weight: Some, bias: Some, cotangent: Tensor
    ) -> tuple[Some, ...]:
        """The gradients with respect to the stack, the weight and the bias."""
        rows, firsts, pairs = self
        scaled, rho = rows.standardize(stack)
        value, tangents, seconds = components(scaled, firsts)
        norm, cotangents = _Derivatives(rows, value), rows.reshape(cotangent)
        abd = norm.stack(rows.scale_cotangents(cotangents, rho, weight))
        _, b, d = abd.split(1, firsts, len(cotangents) - 1 - firsts)
        c = norm.stack(tangents)
        if len(stack) < len(cotangents):  # second derivatives are zero, and have no gradient
            abd = _Stack(abd.z[: len(stack)], abd.along[: len(stack)])
        of_stack = norm.jacobian(abd)
        of_value = of_stack[:1]
        _add_terms(of_value, norm.second(b, c), -1)
        if pairs != "none":
            _add_terms(of_stack[1 : 1 + firsts], norm.second(d, c), -2)
            _add_terms(of_value, norm.third(d, c), -1)
            if len(seconds):
                _add_terms(of_value, norm.second(d, norm.stack(seconds)), -1)
        of_weight = None
        if needed[1]:
            terms = [(cotangents[1 : 1 + firsts], norm.jacobian(c))]
            if pairs != "none":
                terms.append((cotangents[1 + firsts :], norm.of_seconds(c, seconds, pairs)))
            of_weight = _add_terms(cotangents[:1] * value, terms, 1)
            of_weight = rows.reduce_to(weight, of_weight)
        of_bias = rows.reduce_to(bias, cotangents[:1]) if needed[2] else None
        return _like(of_stack, stack), of_weight, of_bias

    def pull_back_again(
        self,
        needed: Needed,
        stack: Tensor,
        weight: Some,
        bias: Some,
        cotangent: Tensor,
        again: Tensor,
    ) -> tuple[Some, ...]:
        """The gradients of `pull_back`'s first result with respect to the tensors passed to it.

        This method assumes that the stack has no second derivatives.
        """
        rows, sizes = self.rows, (1, self.firsts)
        scaled, rho = rows.standardize(stack)
        value, tangents = scaled.split_with_sizes(sizes)
        norm, cotangents = _Derivatives(rows, value), rows.reshape(cotangent)
        c = norm.stack(tangents)
        ab = norm.stack(rows.scale_cotangents(cotangents, rho, weight))
        pq = norm.stack(rows.scale_cotangents(rows.reshape(again), rho))
        (a, b), (p, q) = ab.split(*sizes), pq.split(*sizes)
        pb, pc, bc = norm.product(p, b), norm.product(p, c), norm.product(b, c)
        # Join second(p, a), second(q_l, b_l) and third(p, b_l, c_l) into one term per stack.
        of_ab = torch.cat([p.along, q.along + pc])
        of_pq = torch.cat([a.along + total(bc), b.along])
        third = total(_third_along(p.along, b.along, c.along, pb, pc, bc))
        of_y = torch.add(total(norm.product(pq, ab)), third, alpha=-3)
        of_value = _add_terms(value * of_y, [(of_ab, ab.z), (of_pq, pq.z), (pb, c.z)], 1)
        of_firsts = _add_terms(b.z * p.along, [(b.along, p.z), (pb, value)], 1)
        of_stack = torch.cat([of_value, of_firsts]).neg_()
        of_outputs = norm.jacobian(pq)
        _add_terms(of_outputs[1:], norm.second(p, c, pc), -1)
        of_weight = rows.reduce_to(weight, cotangents * of_outputs) if needed[1] else None
        of_cotangent = rows.multiply(of_outputs, weight)
        of_bias = None if bias is None else torch.zeros_like(bias)
        return _like(of_stack, stack), of_weight, of_bias, _like(of_cotangent, cotangent)


# ------------------------------------------------------------------------------------ the norms
def _norm_of_jet(rows: Rows, x: Any, weight: Any = None, bias: Any = None) -> Any:
    if len(rows.dims) == len(rows.shape):
        raise NoRule  # a row is not part of a single sample
    norm = Norm(rows, x.firsts, x.pairs)
    pullbacks = [norm.pull_back, norm.pull_back_again] if x.pairs == "none" else [norm.pull_back]
    return x.like(with_recomputation(norm.evaluate, x.stack, weight, bias, pullbacks=pullbacks))


def _norm_of_tensor(rows: Rows, x: Tensor, weight: Some = None, bias: Some = None) -> Tensor:
    """Compute the norm in at least float32, with operators whose gradients are correct."""
    centred = at_least_float32(x).reshape(rows.shape)
    # Sums, divided afterwards: the gradient of a sum is a view, but a mean's gradient is a copy.
    if rows.centred:
        centred = centred - rows.total(centred) / rows.length
    variance = rows.total(centred * centred) / rows.length
    standard = rows.multiply(centred * torch.rsqrt(variance + rows.eps), weight)
    standard = standard if bias is None else standard + bias.reshape(rows.weights)
    return standard.reshape(x.shape).to(x.dtype)


ON_JETS.norm, ON_TENSORS.norm = _norm_of_jet, _norm_of_tensor
# Whether PyTorch's default eps for a 16-bit dtype is the eps of float32.
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
    channels = x.shape[1] // num_groups
    shape = (x.shape[0], num_groups, channels, x.shape[2:].numel())
    return ops.norm(Rows(shape, (-2, -1), (num_groups, channels, 1), eps), x, weight, bias)


def _move_statistics(norm: Any, ops: Any, x: Any, mean: Any, variance: Any, *options: Any) -> None:
    """Let PyTorch update the running statistics. Reject channels with a single value."""
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
