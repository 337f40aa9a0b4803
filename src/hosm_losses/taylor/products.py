r"""Rules for bilinear products: matrix products, linear layers and convolutions.

Formula, for a product y = a · b that is linear in a and in b:
    y_l = a_l · b + a · b_l        y_ll = a_ll · b + a · b_ll + 2 a_l · b_l
    A plain tensor has no derivatives, so a plain factor multiplies the whole stack. A linear or
    convolutional layer is called once, with the components of the stack as one larger batch. The
    layer's bias is added only to the value.

Gradients, for a cotangent c:
    The form ⟨c, a·b⟩ is linear in each of a, b and c. The gradient of the form with respect to one
    argument is linear in the other two. Let p be a cotangent of the gradient with respect to a.
    Then ⟨p, ∂_a⟨c, a·b⟩⟩ = ⟨c, p·b⟩ is the same form with p in place of a. The same is true of the
    gradients with respect to b and c. Three functions, one for each gradient, therefore suffice
    for derivatives of every order. Only the arguments of these functions are stored.

Formulas for Y = A B with matrices A_i and B_j (values or derivatives) and cotangents C_k of Y_k:
    Y_k = Σ f A_i B_j      gradient of A_i: Σ f C_k B_jᵀ      gradient of B_j: Σ f A_iᵀ C_k
    All three sums run over the same terms (i, j, k, f), where f is a factor and f A_i B_j is a
    part of Y_k. The call that computes a product also adds it to the sum. If the products were
    added in separate calls, the larger matrices, such as attention's weights, would be read and
    written several times for each product.

When PyTorch differentiates the gradient of a convolution, it computes the weight gradient as
another convolution. The kernel of that convolution is the cotangent, which is as large as the
image. This is up to three times as expensive as the method that PyTorch uses in the first backward
pass. A `Form` always uses the cheaper method.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from math import prod
from string import ascii_letters, ascii_lowercase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor._torch import (
    autocast_type,
    in_autocast,
    is_traced,
    selective_checkpoint,
    without_autocast,
)
from hosm_losses.taylor.jets import Jet
from hosm_losses.taylor.linear import per_sample
from hosm_losses.taylor.memory import needed_gradients, share
from hosm_losses.taylor.registry import Function, NoRule, rule, swapped
from hosm_losses.taylor.stacks import Pairs, align, collect, components


def ndim_of(x: Any) -> int:
    """The number of axes of a tensor, or 0 for a number."""
    return x.ndim if isinstance(x, Tensor) else 0


def product_rule(a: Any, b: Any, product: Callable[[Tensor, Tensor], Tensor], ndim: int) -> Jet:
    """Apply a product that is linear in both factors and broadcasts over a stack's first axis."""
    if not isinstance(b, Jet):
        return a.like(product(align(a.stack, ndim), b))
    if not isinstance(a, Jet):
        return b.like(product(a, align(b.stack, ndim)))
    first, second = align(a.stack, ndim), align(b.stack, ndim)
    firsts, pairs = a.firsts, a.pairs
    a_value, a_tangents, _ = components(first, firsts)
    b_value, b_tangents, _ = components(second, firsts)
    # The whole stack of a times the value of b, then the contributions of b's derivatives.
    value, tangents, seconds = components(product(first, b_value), firsts)
    added = product(a_value, second[1:])
    tangents = tangents + added[:firsts]
    if pairs == "none":
        return a.like(torch.cat([value, tangents]))
    both = 2 * collect(product(a_tangents, b_tangents), pairs)
    for part in (seconds, added[firsts:]):
        both = both + part if len(part) else both
    return a.like(torch.cat([value, tangents, both]))


# ----------------------------------------------------------------------------------- the gradients
Some = Tensor | None
Part = Callable[[Tensor, Tensor], Tensor]


class Form(NamedTuple):
    """The gradients of ⟨c, a·b⟩."""

    of_a: Part  # from b and c
    of_b: Part  # from a and c
    product: Part  # a·b, from a and b


def plain(*tensors: Tensor) -> bool:
    """Whether each tensor is a plain Tensor or Parameter, not an instance of another subclass."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def product(form: Form, a: Tensor, b: Tensor) -> Tensor:
    """Return the product of a and b; its derivatives are computed from parts of the form."""
    value: Any = _Gradient.apply(form, 2, a, b)
    return value


class _Gradient(torch.autograd.Function):
    """The gradient of a form with respect to one argument, computed from the other two."""

    @staticmethod
    def forward(ctx: Any, form: Form, place: int, *others: Tensor) -> Tensor:
        ctx.form, ctx.place = form, place
        ctx.save_for_backward(*others)
        return _evaluate_form(form, place, *others)

    @staticmethod
    def backward(ctx: Any, *cotangents: Some) -> tuple[Some, ...]:
        others: list[Any] = list(ctx.saved_tensors)
        needed = needed_gradients(ctx, others)
        others.insert(ctx.place, cotangents[0])
        needed.insert(ctx.place, False)
        # If gradients are off, a transform may surround this call, and a Function cannot be
        # applied under it.
        evaluate: Any = _Gradient.apply if torch.is_grad_enabled() else _evaluate_form
        gradients = [
            evaluate(ctx.form, place, *others[:place], *others[place + 1 :]) if need else None
            for place, need in enumerate(needed)
        ]
        del gradients[ctx.place]
        return None, None, *gradients


def _evaluate_form(form: Form, place: int, *others: Tensor) -> Tensor:
    """Evaluate one part of a form in the dtypes of the factors, even under autocast."""
    with without_autocast(others[0].device.type):
        return form[place](*others)


# ------------------------------------------------------------------------------- layers of weights
class _AddInPlace(torch.autograd.Function):
    """Add a bias to the first rows of a layer's output in place; the other rows are not copied."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor, rows: int) -> Tensor:
        ctx.rows, ctx.shape, ctx.dtype = rows, bias.shape, bias.dtype
        output[:rows].add_(bias)  # not +=, which copies the rows onto themselves
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        return cotangent, cotangent[: ctx.rows].sum_to_size(ctx.shape).to(ctx.dtype), None


def with_bias(output: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Add the bias to the first rows of a layer's output, in place where possible."""
    if bias is None:
        return output
    # A selective checkpoint may keep the output, still without a bias, for its recomputation.
    if is_traced() or selective_checkpoint():
        return torch.cat([(output[:rows] + bias).to(output.dtype), output[rows:]])
    return _AddInPlace.apply(output, bias, rows)  # pyright: ignore[reportReturnType]


@rule(F.linear, kind="bilinear")
def linear(x: Any, weight: Any, bias: Any = None) -> Jet:
    """A linear layer with a weight and an optional bias."""
    if weight.ndim != 2 or x.stack.ndim < 2:  # x or the weight has too few axes
        raise NoRule
    return x.like(with_bias(F.linear(x.stack, weight), bias, 1))


# Options in the order of `_convolution_form`, and names in the orders of PyTorch's arguments.
OPTIONS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
NAMES = ("stride", "padding", "dilation", "groups")
NAMES_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


@rule(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    kind="bilinear",
    with_function=True,
)
def _convolution(
    function: Function, x: Any, weight: Any, bias: Any = None, *args: Any, **named: Any
) -> Jet:
    if x.ndim != weight.ndim:  # for example a single sample
        raise NoRule
    bias = None if bias is None else bias.reshape(-1, *(1,) * (x.ndim - 2))
    transposed = function in TRANSPOSED  # torch.compile cannot read a name
    positional = zip(NAMES_TRANSPOSED if transposed else NAMES, args, strict=False)
    options: dict[str, Any] = OPTIONS | dict(positional) | named
    if len(options) > len(OPTIONS):  # a name that PyTorch does not know
        raise NoRule

    def biased(samples: Tensor) -> Tensor:
        if is_traced() or not plain(samples, weight) or isinstance(options["padding"], str):
            convolved = function(samples, weight, None, *args, **named)
        else:
            form = _convolution_form(samples, weight, transposed, *options.values())
            convolved = product(form, in_autocast(samples), weight)
        return with_bias(convolved, bias, x.shape[0])

    return x.like(per_sample(x.stack, biased))


def _convolution_form(samples: Tensor, weight: Tensor, transposed: bool, *settings: Any) -> Form:
    """Return the form of a convolution.

    The weight is stored in its own dtype. If autocast is on when the form is created, the weight
    is cast to autocast's dtype whenever it is multiplied.
    """
    *sizes, groups = settings
    stride, padding, output_padding, dilation = (
        [size] * (weight.ndim - 2) if isinstance(size, int) else size for size in sizes
    )
    options = stride, padding, dilation, transposed, output_padding, groups
    backward = torch.ops.aten.convolution_backward
    shapes, flat, dtype = (samples.shape, weight.shape), [0] * weight.ndim, weight.dtype
    cast = autocast_type(weight)

    def vjp_in_input(weight: Tensor, cotangent: Tensor) -> Tensor:
        # A tensor with strides of zero, because only its shape is used.
        samples, weight = cotangent.new_empty_strided(shapes[0], flat), weight.to(cast)
        return backward(cotangent, samples, weight, None, *options, (True, False, False))[0]

    def vjp_in_weight(samples: Tensor, cotangent: Tensor) -> Tensor:
        weight = cotangent.new_empty_strided(shapes[1], flat)
        gradient = backward(cotangent, samples, weight, None, *options, (False, True, False))[1]
        return gradient.to(dtype)

    return Form(
        vjp_in_input, vjp_in_weight, lambda a, b: torch.convolution(a, b.to(cast), None, *options)
    )


# --------------------------------------------------------------------------------------- matrices
# Forms are used for at most this many directions: each direction adds terms, and each term needs
# a separate call.
MOST = 2


# A part of component k of a product: a factor times component i of the left stack times
# component j of the right stack.
_Term = tuple[int, int, int, int]  # i, j, k, factor


@cache
def _terms(firsts: int, pairs: Pairs, left: int, right: int) -> list[_Term]:
    """Return the nonzero terms for stacks of these lengths; absent second derivatives are zero."""
    terms = [(0, 0, 0, 1)]
    terms += [(k, 0, k, 1) for k in range(1, left)] + [(0, k, k, 1) for k in range(1, right)]
    places = range(1, 1 + firsts) if pairs != "none" else ()
    return terms + [(i, i, firsts + (i if pairs == "squares" else 1), 2) for i in places]


def _sums(terms: Iterable[_Term], left: Tensor, right: Tensor) -> Tensor:
    """Multiply the matrices of two stacks, and sum the products that form the same component."""
    lefts, rights, sums = left.unbind(), right.unbind(), dict[int, Tensor]()
    for i, j, k, factor in terms:
        if k in sums:
            sums[k] = torch.baddbmm(sums[k], lefts[i], rights[j], alpha=factor)
        else:
            sums[k] = torch.bmm(lefts[i], rights[j] if factor == 1 else factor * rights[j])
    return torch.stack([sums[k] for k in range(len(sums))])


def _by_columns(terms: Iterable[_Term], left: Tensor, right: Tensor) -> Tensor:
    """Return the same stack as `_sums`, but with each matrix stored in column-major order."""
    return _sums([(j, i, k, factor) for i, j, k, factor in terms], right.mT, left.mT).mT


def _form(terms: list[_Term], left: Tensor, right: Tensor) -> Form:
    """Return the form of a product of stacks with shapes such as (C, N, m, k) and (C, N, k, n).

    Each factor's gradient is stored in the factor's own memory order. With any other order,
    operators that combine the gradient with other tensors, such as those in the backward pass of
    a softmax, would take three times as long as with this order.
    """
    of_left = [(k, j, i, factor) for i, j, k, factor in terms]
    of_right = [(i, k, j, factor) for i, j, k, factor in terms]
    by_left, by_right = (
        _by_columns if factor.stride(-2) < factor.stride(-1) else _sums for factor in (left, right)
    )
    return Form(
        lambda b, cotangent: by_left(of_left, cotangent, b.mT),
        lambda a, cotangent: by_right(of_right, a.mT, cotangent),
        partial(_sums, terms),
    )


@cache
def _groups(left: str, right: str, result: str) -> tuple[str, str, str, str] | None:
    """Return the batch, row, sum and column indices of a matrix product; otherwise None."""
    batch = "".join(index for index in result if index in left and index in right)
    rows = "".join(index for index in result if index not in right)
    inner = "".join(index for index in left if index in right and index not in result)
    columns = "".join(index for index in result if index not in left)
    forms = batch + rows + inner, batch + inner + columns, batch + rows + columns
    if not inner or [*map(sorted, forms)] != [*map(sorted, (left, right, result))]:
        return None  # for example if an index occurs twice
    return batch, rows, inner, columns


def _contract(left: str, right: str, result: str, a: Any, b: Any) -> Jet | None:
    """Compute an einsum by matrix products; return None if `product_rule` is needed instead."""
    if not isinstance(a, Jet) or not isinstance(b, Jet) or a.firsts > MOST or is_traced():
        return None
    groups, sizes = _groups(left, right, result), dict(zip(left, a.shape, strict=False))
    if groups is None or len(left) != a.ndim or len(right) != b.ndim:
        return None
    if any(sizes.setdefault(i, size) != size for i, size in zip(right, b.shape, strict=True)):
        return None
    batch, rows, inner, columns = groups
    # In the other order, the last axis of the result is also the last axis in memory.
    if rows and result[-1] == rows[-1]:
        return _contract(right, left, result, b, a)
    x, y = in_autocast(a.stack), in_autocast(b.stack)
    if x.dtype != y.dtype or not plain(x, y):
        return None
    n, m, k, p = (prod([sizes[index] for index in group]) for group in groups)
    x = _reorder_axes(x, left, batch + rows + inner).reshape(len(x), n, m, k)
    y = _reorder_axes(y, right, batch + inner + columns).reshape(len(y), n, k, p)
    output = product(_form(_terms(a.firsts, a.pairs, len(x), len(y)), x, y), x, y)
    order = batch + rows + columns
    output = output.reshape(len(output), *[sizes[index] for index in order])
    return a.like(_reorder_axes(output, order, result))


def _reorder_axes(stack: Tensor, order: str, wanted: str) -> Tensor:
    return stack.permute(0, *(1 + order.index(index) for index in wanted))


@rule("matmul __matmul__", several=True, kind="bilinear")
def matmul(a: Any, b: Any) -> Jet:
    """The matrix product of a and b, at least one of which is a Jet."""
    if min(ndim_of(a), ndim_of(b)) < 2:
        raise NoRule
    ndim = max(ndim_of(a), ndim_of(b))
    batch = ascii_lowercase[: ndim - 2]
    contracted = None
    if a.ndim == b.ndim:
        contracted = _contract(f"{batch}MK", f"{batch}KN", f"{batch}MN", a, b)
    return product_rule(a, b, torch.matmul, ndim) if contracted is None else contracted


@rule("mm bmm", several=True, kind="bilinear")
def of_matrices(a: Any, b: Any) -> Jet:
    """The product of two matrices, or of two equally large batches of matrices."""
    if a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2]:
        raise NoRule
    return matmul(a, b)


rule("__rmatmul__", several=True, kind="bilinear")(swapped(matmul))


def _without_dots(equation: str, factors: Iterable[Any]) -> str:
    """Replace "..." in an einsum equation with letters.

    Raise NoRule if "..." covers more axes in one factor than in another.
    """
    terms = equation.partition("->")[0].replace(" ", "").split(",")
    counts = {
        ndim_of(factor) - len(term) + 3
        for term, factor in zip(terms, factors, strict=True)
        if "..." in term
    }
    if len(counts) > 1:
        raise NoRule
    free = [letter for letter in ascii_letters if letter not in equation]
    return equation.replace("...", "".join(free[: max(counts, default=0)]))


@rule(torch.einsum, several=True, kind="bilinear")
def _einsum(equation: Any, *operands: Any) -> Jet:
    listed = len(operands) == 1 and isinstance(operands[0], list | tuple)
    factors: Any = operands[0] if listed else operands
    # There is no rule for calls without an equation, or for equations without "->".
    if not isinstance(equation, str) or "->" not in equation or len(factors) > 2:
        raise NoRule
    equation = _without_dots(equation, factors)
    new = next(letter for letter in ascii_letters if letter not in equation)
    indices, _, result = equation.replace(" ", "").partition("->")
    terms = [
        new + term if isinstance(factor, Jet) else term
        for term, factor in zip(indices.split(","), factors, strict=True)
    ]
    summed = partial(torch.einsum, f"{','.join(terms)}->{new}{result}")
    if len(factors) == 1:
        return share(factors[0], factors[0].like(summed(factors[0].stack)))
    left, right = indices.split(",")
    contracted = _contract(left, right, result, factors[0], factors[1])
    return product_rule(factors[0], factors[1], summed, 0) if contracted is None else contracted
