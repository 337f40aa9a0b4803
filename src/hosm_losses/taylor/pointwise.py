r"""Rules for functions of one number: activations and their like.

Formula, for y = a(x):
    y_l = a'(x) x_l        y_ll = a'(x) x_ll + a''(x) x_l²

A new activation is a generator of a and its first three derivatives at x, registered under every
name by which networks call it; see `_tanh`. Gradients follow from the same four numbers, and only
the stack is kept for them. Where PyTorch has operators for a and a'(x) x_l, the activation can
name them; see `_silu`.

Formula of softplus:
    log(1 + eᵝˣ)/β, whose first derivative is 1/(1 + e^(−βx))
"""

import math
from collections.abc import Callable, Iterator
from functools import partial, wraps
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.recompute import Needed, with_recomputation
from hosm_losses.taylor.registry import Function, rule
from hosm_losses.taylor.stacks import Pairs, at_least_float32, collect, components
from hosm_losses.taylor.tensor import Jet

Series = Callable[[Tensor], Iterator[Tensor]]


class Operators(NamedTuple):
    """PyTorch's own for a function and for its first derivative."""

    value: Function  # of x
    slope: Function  # of a tensor and x: the derivative at x times that


def apply(series: Series, jet: Jet, operators: Operators | None = None) -> Jet:
    """The function of a Jet whose `series` yields it and its first three derivatives at x.

    With `operators` it yields the derivatives alone.
    """
    whole, derivatives = series, lambda x: islice(series(x), 1, None)
    if operators is not None:
        whole, derivatives = lambda x: chain([operators.value(x)], series(x)), series
    once: Function = partial(_evaluate, whole, jet.firsts, jet.pairs)
    again = once
    pullbacks: list[Function] = [partial(_pull_back, derivatives, jet.firsts, jet.pairs)]
    if jet.pairs == "none":
        pullbacks.append(partial(_pull_back_again, derivatives))
        if operators is not None:
            once = partial(_evaluate_by, operators, jet.firsts)
    return jet.like(with_recomputation(once, jet.stack, pullbacks=pullbacks, again=again))


def _evaluate(series: Series, firsts: int, pairs: Pairs, stack: Tensor) -> Tensor:
    dtype = stack.dtype
    point, tangents, seconds = components(at_least_float32(stack), firsts)
    numbers = series(point)
    value, slope = islice(numbers, 2)
    parts = [value, tangents * slope]
    if pairs != "none":
        bent = collect(tangents * tangents, pairs) * next(numbers)
        parts.append(torch.addcmul(bent, seconds, slope) if len(seconds) else bent)
    return torch.cat(parts).to(dtype)


def _evaluate_by(operators: Operators, firsts: int, stack: Tensor) -> Tensor:
    point, tangents, _ = components(at_least_float32(stack), firsts)
    # Expanded, for gelu_backward of oneDNN takes no shapes that broadcast.
    slopes = operators.slope(tangents, point.expand_as(tangents))
    return torch.cat([operators.value(point), slopes]).to(stack.dtype)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """Σ_l a_l b_l."""
    return a[0] * b[0] if len(a) == 1 else (a * b).sum(0)


def _pull_back(
    slopes: Series, firsts: int, pairs: Pairs, _needed: Needed, stack: Tensor, cotangent: Tensor
) -> Tensor:
    """The first derivative times the cotangents, and what the second and third add."""
    dtype = stack.dtype
    stack, cotangent = at_least_float32(stack), at_least_float32(cotangent)
    numbers = slopes(stack[0])
    slope, bend = islice(numbers, 2)
    gradient = cotangent[: len(stack)] * slope
    gradient[0].addcmul_(bend, _over(stack[1:], cotangent[1 : len(stack)]))
    if pairs != "none":
        tangents, bent = stack[1 : 1 + firsts], cotangent[1 + firsts :]
        gradient[0].addcmul_(next(numbers), _over(bent, collect(tangents * tangents, pairs)))
        gradient[1 : 1 + firsts].addcmul_(bent * bend, tangents, value=2)
    return gradient.to(dtype)


def _pull_back_again(
    slopes: Series, _needed: Needed, stack: Tensor, cotangent: Tensor, again: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients, in the stack and in the cotangent, of what `_pull_back` returns."""
    dtype = stack.dtype
    stack, cotangent, again = map(at_least_float32, (stack, cotangent, again))
    slope, bend, third = islice(slopes(stack[0]), 3)
    bent = bend * again[0]
    of_cotangent = again * slope
    of_cotangent[1:].addcmul_(stack[1:], bent)
    of_value = cotangent[0] * bent
    of_value.addcmul_(bend, _over(cotangent[1:], again[1:]))
    of_value.addcmul_(third * again[0], _over(stack[1:], cotangent[1:]))
    of_stack = torch.cat([of_value.unsqueeze(0), cotangent[1:] * bent])
    return of_stack.to(dtype), of_cotangent.to(dtype)


def _with(function: Function, args: tuple[Any, ...], named: dict[str, Any]) -> Function:
    """A function of tensors, with other arguments after them."""
    return (lambda *tensors: function(*tensors, *args, **named)) if args or named else function


def pointwise(
    *names: str | Function, operators: Operators | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the generator of a function and its derivatives, with that function's arguments.

    The `operators` take those arguments too; see `apply`.
    """

    def register(series: Callable[..., Any]) -> Callable[..., Any]:
        @rule(*names, kind="pointwise")
        @wraps(series)
        def evaluated(x: Jet, *args: Any, **named: Any) -> Jet:
            known = operators and Operators(*(_with(each, args, named) for each in operators))
            return apply(_with(series, args, named), x, known)

        return series

    return register


@pointwise("silu", operators=Operators(F.silu, torch.ops.aten.silu_backward.default))
def _silu(x: Tensor) -> Iterator[Tensor]:
    s = torch.sigmoid(x)
    q = torch.addcmul(s, s, s, value=-1)
    yield torch.addcmul(s, x, q)
    bent = torch.addcmul(q, q, s, value=-2)
    yield torch.addcmul(2 * q, x, bent)
    yield torch.addcmul(3 * bent, x, torch.addcmul(q, q, q, value=-6))


@pointwise("sigmoid")
def sigmoid(x: Tensor) -> Iterator[Tensor]:
    """The logistic function, and its derivatives."""
    s = torch.sigmoid(x)
    yield s
    q = s * (1 - s)
    yield q
    yield q * (1 - 2 * s)
    yield q * (1 - 6 * q)


@pointwise("tanh")
def _tanh(x: Tensor) -> Iterator[Tensor]:
    value = torch.tanh(x)
    yield value
    slope = 1 - value * value
    yield slope
    yield -2 * value * slope
    yield slope * (4 - 6 * slope)


@pointwise("gelu", operators=Operators(F.gelu, torch.ops.aten.gelu_backward.default))
def _gelu(x: Tensor, approximate: str = "none") -> Iterator[Tensor]:
    # x S(x), of a share S between 0 and 1.
    square = x * x
    if approximate == "none":
        share = 0.5 + 0.5 * torch.erf(x * math.sqrt(0.5))
        density = torch.exp(-0.5 * square) * (1 / math.sqrt(2 * math.pi))
        yield torch.addcmul(share, x, density)
        yield density * (2 - square)
        yield density * x * (square - 4)
        return
    if approximate != "tanh":
        raise NoRule
    # S is the logistic function of w, twice what the tanh is taken of.
    scale, cube = 2 * math.sqrt(2 / math.pi), 0.044715
    w = x * (scale * cube * square + scale)
    share = torch.sigmoid(w)
    w1 = 3 * scale * cube * square + scale  # derivatives of w
    other = torch.sigmoid(-w)  # 1 − S, exact where S is nearly 1
    q = share * other
    s1 = q * w1
    yield torch.addcmul(share, x, s1)
    w2 = 6 * scale * cube * x
    bent = q * (other - share)
    s2 = torch.addcmul(q * w2, bent * w1, w1)
    yield torch.addcmul(2 * s1, x, s2)
    inner = torch.addcmul(torch.addcmul(q, q, q, value=-6) * w1 * w1, bent, w2, value=3)
    s3 = torch.addcmul(6 * scale * cube * q, w1, inner)
    yield torch.addcmul(3 * s2, x, s3)


def piecewise_linear(value: Tensor, slope: Tensor) -> Iterator[Tensor]:
    """A function of straight pieces, whose further derivatives are zero."""
    yield value
    yield slope
    yield torch.zeros_like(value)
    yield torch.zeros_like(value)


@pointwise("relu")
def _relu(x: Tensor) -> Iterator[Tensor]:
    return piecewise_linear(torch.relu(x), (x > 0).to(x.dtype))


@pointwise("leaky_relu")
def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Iterator[Tensor]:
    slope = torch.where(x > 0, 1.0, negative_slope).to(x.dtype)
    return piecewise_linear(x * slope, slope)


@pointwise("hardsigmoid")
def _hardsigmoid(x: Tensor) -> Iterator[Tensor]:
    """PyTorch's has no second derivative, not even the one of zero."""
    inside = (x > -3) & (x < 3)
    return piecewise_linear(F.relu6(x + 3) / 6, inside.to(x.dtype) / 6)


@pointwise("abs", "__abs__", "absolute")
def absolute(x: Tensor) -> Iterator[Tensor]:
    """|x|, and its derivatives, which are zero at zero."""
    return piecewise_linear(torch.abs(x), torch.sign(x))


@pointwise("exp")
def _exp(x: Tensor) -> Iterator[Tensor]:
    return repeat(torch.exp(x), 4)


@pointwise("sin")
def _sin(x: Tensor) -> Iterator[Tensor]:
    sin, cos = torch.sin(x), torch.cos(x)
    yield from (sin, cos, -sin, -cos)


@pointwise("cos")
def _cos(x: Tensor) -> Iterator[Tensor]:
    sin, cos = torch.sin(x), torch.cos(x)
    yield from (cos, -sin, -cos, sin)


def power(x: Tensor, exponent: float) -> Iterator[Tensor]:
    """x to a number, and its derivatives."""
    factor, largest = 1.0, torch.finfo(x.dtype).max
    for order in range(4):
        # Not 0 · x^-1, which is NaN at 0.
        found = factor * x.pow(exponent - order) if factor else torch.zeros_like(x)
        if factor and order > max(exponent, 0):
            # Near zero it may be out of range, and is multiplied by what may be zero.
            found = torch.where(x == 0, found, found.clamp(-largest, largest))
        yield found
        factor *= exponent - order


@pointwise("log")
def _log(x: Tensor) -> Iterator[Tensor]:
    yield torch.log(x)
    yield from power(x, -1)


def _slope_of_softplus(along: Tensor, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    # Either may be a tensor of one number.
    return torch.ops.aten.softplus_backward.default(along, x, float(beta), float(threshold))


@pointwise("softplus", operators=Operators(F.softplus, _slope_of_softplus))
def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Iterator[Tensor]:
    scaled = beta * x
    s = torch.sigmoid(scaled)
    straight_on = scaled > threshold  # where PyTorch takes x itself
    yield s.masked_fill(straight_on, 1.0)
    q = (beta * s * torch.sigmoid(-scaled)).masked_fill(straight_on, 0.0)
    yield q
    yield beta * q * (1 - 2 * s)


@pointwise("clamp", "clip", "clamp_min")
def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Iterator[Tensor]:  # noqa: A002
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise NoRule
    value = torch.clamp(x, min, max)
    return piecewise_linear(value, (value == x).to(x.dtype))


@pointwise("clamp_max")
def _clamp_max(x: Tensor, max: Any) -> Iterator[Tensor]:  # noqa: A002
    return _clamp(x, None, max)


for _name, _exponent in {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1}.items():
    pointwise(_name)(partial(power, exponent=_exponent))
