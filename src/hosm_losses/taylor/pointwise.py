r"""Rules for elementwise functions, such as activations, and for arithmetic.

Formula, for y = a(x):
    y_l = a'(x) x_l        y_ll = a'(x) x_ll + a''(x) x_l²

To add an activation a, write a generator that yields a(x) and the first three derivatives of a.
Register the generator under every name by which networks call the activation; see `_tanh`.
Only the stack of x is stored for the backward pass, where the generator computes the derivatives
again. PyTorch's own operators for a(x) and a'(x) x_l, if they exist, can be passed as `operators`;
see `_silu`.

Formula for softplus:
    log(1 + eᵝˣ)/β, whose first derivative is 1/(1 + e^(−βx))

Arithmetic:
    The dtype of a result is the one that PyTorch's function would return for the values. As in
    PyTorch, a value without axes does not widen the dtype of a value with axes, even though the
    stacks of both values have axes.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial, wraps
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.jets import Jet, result_type, stacks_of
from hosm_losses.taylor.memory import Needed, with_recomputation
from hosm_losses.taylor.products import ndim_of, of_matrices, product_rule
from hosm_losses.taylor.registry import Function, NoRule, TaylorError, rule, swapped
from hosm_losses.taylor.stacks import Pairs, align, at_least_float32, collect, components, total

Series = Callable[[Tensor], Iterator[Tensor]]


class Operators(NamedTuple):
    """PyTorch's own operators for a function and for its first derivative."""

    value: Function  # of x
    slope: Function  # of a tensor and x: the tensor times the derivative at x


class Pointwise(NamedTuple):
    """An elementwise function of a stack, and the gradients of this function."""

    series: Series  # yields the function and its first three derivatives at x
    operators: Operators | None  # if not None, the series yields only derivatives
    firsts: int
    pairs: Pairs

    def derivatives(self, x: Tensor) -> Iterator[Tensor]:
        """An iterator over the first three derivatives at x."""
        series = self.series(x)
        if self.operators is None:
            next(series)
        return series

    def evaluate(self, stack: Tensor) -> Tensor:
        """y = a(x), y_l = a'(x) x_l and y_ll = a'(x) x_ll + a''(x) x_l²."""
        x, tangents, seconds = components(at_least_float32(stack), self.firsts)
        series = self.series(x)
        value = next(series) if self.operators is None else self.operators.value(x)
        slope = next(series)
        parts = [value, tangents * slope]
        if self.pairs != "none":
            curvature = collect(tangents * tangents, self.pairs) * next(series)
            if len(seconds):
                curvature = torch.addcmul(curvature, seconds, slope)
            parts.append(curvature)
        return torch.cat(parts).to(stack.dtype)

    def evaluate_by_operators(self, stack: Tensor) -> Tensor:
        """Compute the value and the first derivatives with PyTorch's own operators."""
        assert self.operators is not None
        x, tangents, _ = components(at_least_float32(stack), self.firsts)
        # Expanded, because oneDNN's gelu_backward does not accept shapes that broadcast.
        slopes = self.operators.slope(tangents, x.expand_as(tangents))
        return torch.cat([self.operators.value(x), slopes]).to(stack.dtype)

    def pull_back(self, _needed: Needed, stack: Tensor, cotangent: Tensor) -> tuple[Tensor]:
        """The stack's gradient: the cotangent times a'(x), plus terms with higher derivatives."""
        dtype, firsts = stack.dtype, self.firsts
        stack, cotangent = at_least_float32(stack), at_least_float32(cotangent)
        x, along = stack.split_with_sizes((1, len(stack) - 1))
        derivatives = self.derivatives(x)
        slope, curvature = next(derivatives), next(derivatives)
        gradient = cotangent[: len(stack)] * slope
        of_value = gradient[:1]
        of_value.addcmul_(curvature, total(along * cotangent[1 : len(stack)]))
        if self.pairs != "none":
            tangents, of_seconds = along[:firsts], cotangent[1 + firsts :]
            squares = collect(tangents * tangents, self.pairs)
            of_value.addcmul_(next(derivatives), total(of_seconds * squares))
            gradient[1 : 1 + firsts].addcmul_(of_seconds * curvature, tangents, value=2)
        return (gradient.to(dtype),)

    def pull_back_again(
        self, _needed: Needed, stack: Tensor, cotangent: Tensor, again: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the result of `pull_back` with respect to the stack and the cotangent.

        This method assumes that the stack has no second derivatives.
        """
        dtype = stack.dtype
        stack, cotangent, again = map(at_least_float32, (stack, cotangent, again))
        sizes = 1, self.firsts
        (x, tangents), (a, b), (p, q) = (
            part.split_with_sizes(sizes) for part in (stack, cotangent, again)
        )
        slope, curvature, third = islice(self.derivatives(x), 3)
        bend = curvature * p
        of_cotangent = again * slope
        of_cotangent[1:].addcmul_(tangents, bend)
        of_value = a * bend
        of_value.addcmul_(curvature, total(b * q))
        of_value.addcmul_(third * p, total(tangents * b))
        return torch.cat([of_value, b * bend]).to(dtype), of_cotangent.to(dtype)


def apply(series: Series, jet: Jet, operators: Operators | None = None) -> Jet:
    """Apply a function to a Jet; `series` yields the function's value and first three derivatives.

    If `operators` are passed, `series` yields only the derivatives.
    """
    rule = Pointwise(series, operators, jet.firsts, jet.pairs)
    if jet.pairs != "none":
        stack = with_recomputation(rule.evaluate, jet.stack, pullbacks=[rule.pull_back])
        return jet.like(stack)
    stack = with_recomputation(
        rule.evaluate if operators is None else rule.evaluate_by_operators,
        jet.stack,
        pullbacks=[rule.pull_back, rule.pull_back_again],
        again=rule.evaluate,
    )
    return jet.like(stack)


def _with(function: Function, args: tuple[Any, ...], named: dict[str, Any]) -> Function:
    """Bind the arguments that follow the tensors, and return a function of the tensors alone."""
    return (lambda *tensors: function(*tensors, *args, **named)) if args or named else function


def pointwise(
    *names: str | Function, operators: Operators | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a generator that takes x and yields a function's value and derivatives at x.

    The function's other arguments are passed to the generator and the `operators`; see `apply`.
    """

    def register(series: Callable[..., Any]) -> Callable[..., Any]:
        @rule(*names, kind="pointwise")
        @wraps(series)
        def evaluated(x: Jet, *args: Any, **named: Any) -> Jet:
            bound = operators and Operators(
                *(_with(operator, args, named) for operator in operators)
            )
            return apply(_with(series, args, named), x, bound)

        return series

    return register


@pointwise("silu", operators=Operators(F.silu, torch.ops.aten.silu_backward.default))
def _silu(x: Tensor) -> Iterator[Tensor]:
    s = torch.sigmoid(x)
    q = torch.addcmul(s, s, s, value=-1)
    yield torch.addcmul(s, x, q)
    curvature = torch.addcmul(q, q, s, value=-2)
    yield torch.addcmul(2 * q, x, curvature)
    yield torch.addcmul(3 * curvature, x, torch.addcmul(q, q, q, value=-6))


@pointwise(F.mish, operators=Operators(F.mish, torch.ops.aten.mish_backward.default))
def _mish(x: Tensor) -> Iterator[Tensor]:
    # x t, where t = tanh(softplus(x)).
    t, s = torch.tanh(F.softplus(x)), torch.sigmoid(x)
    product, complement = s * t, 1 - s
    t1 = torch.addcmul(s, product, t, value=-1)  # t1, t2 and t3 are derivatives of t
    yield torch.addcmul(t, x, t1)
    ratio = torch.sub(complement, product, alpha=2)
    t2 = t1 * ratio
    yield torch.addcmul(2 * t1, x, t2)
    q = s * complement
    bend = torch.addcmul(torch.addcmul(q, q, t, value=2), s, t1, value=2)  # −1 times ratio's slope
    t3 = torch.addcmul(t2 * ratio, t1, bend, value=-1)
    yield torch.addcmul(3 * t2, x, t3)


@pointwise("sigmoid")
def sigmoid(x: Tensor) -> Iterator[Tensor]:
    """The logistic function and its derivatives."""
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
    # The value is x S(x), where S, called `share`, is between 0 and 1.
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
    # S is the logistic function of w, which is twice the argument of the tanh.
    scale, cube = 2 * math.sqrt(2 / math.pi), 0.044715
    w = x * (scale * cube * square + scale)
    share = torch.sigmoid(w)
    w1 = 3 * scale * cube * square + scale  # w1 and w2 are derivatives of w
    complement = torch.sigmoid(-w)  # 1 − S, exact where S is nearly 1
    q = share * complement
    s1 = q * w1
    yield torch.addcmul(share, x, s1)
    w2 = 6 * scale * cube * x
    curvature = q * (complement - share)
    s2 = torch.addcmul(q * w2, curvature * w1, w1)
    yield torch.addcmul(2 * s1, x, s2)
    inner = torch.addcmul(torch.addcmul(q, q, q, value=-6) * w1 * w1, curvature, w2, value=3)
    s3 = torch.addcmul(6 * scale * cube * q, w1, inner)
    yield torch.addcmul(3 * s2, x, s3)


def piecewise_linear(value: Tensor, slope: Tensor) -> Iterator[Tensor]:
    """A piecewise linear function and its derivatives, which are zero beyond the first."""
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
    """This rule exists because PyTorch lacks hardsigmoid's second derivative, which is zero."""
    inside = (x > -3) & (x < 3)
    return piecewise_linear(F.relu6(x + 3) / 6, inside.to(x.dtype) / 6)


@pointwise("abs", "__abs__", "absolute")
def absolute(x: Tensor) -> Iterator[Tensor]:
    """|x| and its derivatives, which are all zero at x = 0."""
    return piecewise_linear(torch.abs(x), torch.sign(x))


@pointwise("exp")
def _exp(x: Tensor) -> Iterator[Tensor]:
    return repeat(torch.exp(x), 4)


@pointwise("sin")
def _sin(x: Tensor) -> Iterator[Tensor]:
    sin, cos = torch.sin(x), torch.cos(x)
    yield sin
    yield cos
    yield -sin
    yield -cos


@pointwise("cos")
def _cos(x: Tensor) -> Iterator[Tensor]:
    sin, cos = torch.sin(x), torch.cos(x)
    yield cos
    yield -sin
    yield -cos
    yield sin


def power(x: Tensor, exponent: float) -> Iterator[Tensor]:
    """The power of x with a constant exponent, and the derivatives of this power."""
    factor, largest = 1.0, torch.finfo(x.dtype).max
    for order in range(4):
        # Not 0 · x^-1, which is NaN at 0.
        derivative = factor * x.pow(exponent - order) if factor else torch.zeros_like(x)
        if factor and order > max(exponent, 0):
            # Near zero, the derivative may overflow, and may then be multiplied by zero.
            derivative = torch.where(x == 0, derivative, derivative.clamp(-largest, largest))
        yield derivative
        factor *= exponent - order


@pointwise("log")
def _log(x: Tensor) -> Iterator[Tensor]:
    yield torch.log(x)
    yield from power(x, -1)


def _slope_of_softplus(along: Tensor, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    # beta and threshold may be one-element tensors.
    return torch.ops.aten.softplus_backward.default(along, x, float(beta), float(threshold))


@pointwise("softplus", operators=Operators(F.softplus, _slope_of_softplus))
def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Iterator[Tensor]:
    scaled = beta * x
    s = torch.sigmoid(scaled)
    straight_on = scaled > threshold  # where PyTorch returns x itself
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


# ------------------------------------------------------------ sums, products, quotients and powers
def _operands(a: Any, b: Any) -> int:
    """Return the number of axes of the result of an operation on a and b.

    Raise NoRule unless a and b are tensors or real numbers.
    """
    if not (isinstance(a, (Tensor, float, int)) and isinstance(b, (Tensor, float, int))):
        raise NoRule
    return max(ndim_of(a), ndim_of(b))


def _type(a: Any, b: Any) -> torch.dtype:
    """Return the dtype that PyTorch's result would have."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype != b.dtype:
        return result_type(a, b)
    return (a if isinstance(a, Jet) else b).dtype


@rule("add __add__ __radd__", several=True, kind="linear")
def add(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    """a + alpha · b, where at least one of a and b is a Jet."""
    ndim, dtype = _operands(a, b), _type(a, b)
    jet, plain = (a, b) if isinstance(a, Jet) else (b, a)
    if isinstance(plain, Jet) or ndim_of(plain):
        first, second = stacks_of((a, b))
        total = torch.add(align(first, ndim), align(second, ndim), alpha=alpha)
        return jet.like(total.to(dtype))
    # In a stack, a number would be rounded to a dtype, and a tensor without axes, which may be on
    # another device, would get an axis.
    stack = align(jet.stack, ndim)
    if alpha != 1:
        stack, plain = (stack, plain * alpha) if jet is a else (stack * alpha, plain)
    value, derivatives = stack.split((1, len(stack) - 1))
    value = value.squeeze(0) + plain
    derivatives = derivatives.expand(-1, *value.shape).to(value.dtype)
    return jet.like(torch.cat([value.unsqueeze(0), derivatives]).to(dtype))


@rule("sub subtract __sub__", several=True, kind="linear")
def _sub(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    if any(getattr(operand, "dtype", type(operand)) in (bool, torch.bool) for operand in (a, b)):
        raise NoRule  # PyTorch raises an error: masks are not subtracted
    return add(a, b, alpha=-alpha)


@rule("mul multiply __mul__ __rmul__", several=True, kind="bilinear")
def multiply(a: Any, b: Any) -> Jet:
    """The product a b, where at least one of a and b is a Jet."""
    ndim = _operands(a, b)
    if a is b:
        return apply(partial(power, exponent=2), a)
    return product_rule(a, b, torch.mul, ndim).with_dtype(_type(a, b))


@rule("div divide true_divide __truediv__", several=True, kind="stack")
def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Jet:
    if rounding_mode is not None:
        raise NoRule
    ndim, dtype = _operands(a, b), _type(a, b)
    if not isinstance(b, Jet):
        return product_rule(a, b, torch.div, ndim).with_dtype(dtype)
    if isinstance(a, Jet):
        above = a.stack
    elif ndim_of(a):
        above = a.unsqueeze(0)
    else:  # a number, or a tensor that may be on another device
        wide = None if isinstance(a, Tensor) else torch.promote_types(dtype, torch.float32)
        above = torch.as_tensor(a, dtype=wide, device=b.device).unsqueeze(0)
    stacks = (align(stack, ndim) for stack in (above, b.stack))
    return b.like(with_recomputation(partial(_quotient, b.firsts, b.pairs), *stacks)).with_dtype(
        dtype
    )


def _quotient(firsts: int, pairs: Pairs, a: Tensor, b: Tensor) -> Tensor:
    """Compute the stack of y = a / b without using powers of 1/b.

    Such powers may overflow or underflow even if y does not. Instead, a = y b is differentiated:
    for example, y_l = (a_l − y b_l) / b.
    """
    (a_value, a_tangents, a_seconds), (b_value, b_tangents, b_seconds) = (
        components(at_least_float32(stack), min(firsts, len(stack) - 1)) for stack in (a, b)
    )
    value = a_value / b_value
    product = value * b_tangents
    tangents = (a_tangents - product if len(a_tangents) else -product) / b_value
    if pairs == "none":
        return torch.cat([value, tangents])
    product = collect(2 * tangents * b_tangents, pairs)
    product = product + value * b_seconds if len(b_seconds) else product
    seconds = (a_seconds - product if len(a_seconds) else -product) / b_value
    return torch.cat([value, tangents, seconds])


@rule("pow __pow__", kind="pointwise")
def _pow(x: Any, exponent: Any) -> Jet:
    constant = isinstance(exponent, Tensor) and not isinstance(exponent, Jet)
    if constant and not exponent.requires_grad:
        # PyTorch's forward-mode derivative of this power is NaN for negative x.
        raise TaylorError("pow: a tensor as exponent. Use numbers as exponents, as in x**2.")
    if not isinstance(exponent, float | int) or isinstance(exponent, bool):
        raise NoRule
    return apply(partial(power, exponent=exponent), x)


@rule("addcmul", several=True, kind="composite")
def _addcmul(x: Any, a: Any, b: Any, *, value: float = 1) -> Jet:
    product = multiply(a, b) if isinstance(a, Jet) or isinstance(b, Jet) else a * b
    return add(x, product, alpha=value)


@rule("baddbmm addmm", several=True, kind="composite")
def _added(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Jet:
    if not isinstance(a, Jet) and not isinstance(b, Jet):
        raise NoRule
    product = multiply(of_matrices(a, b), alpha)
    if beta == 0:
        return product
    # Under autocast, x may be in a wider dtype.
    return add(product, x, alpha=beta).with_dtype(product.dtype)


rule("__rsub__ rsub", several=True, kind="linear")(swapped(_sub))
rule("__rdiv__ __rtruediv__", several=True, kind="stack")(swapped(_div))
