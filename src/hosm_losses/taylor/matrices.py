r"""Rules for products of matrices.

Formula of Y = A B, for matrices A_i and B_j, derivatives or values, and cotangents C_k of Y:
    Y_k = Σ f A_i B_j        in A   Σ f C_k B_jᵀ        in B   Σ f A_iᵀ C_k
    over the same terms (i, j, k, f): f A_i B_j is a part of Y_k.

Each sum is added up where it ends. As one of products, the larger matrices, such as the weights of
attention, would be read and written three times for each.
"""

from collections.abc import Iterable
from functools import cache, partial
from math import prod
from string import ascii_letters, ascii_lowercase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses.taylor._torch import batched, in_autocast, traced
from hosm_losses.taylor.aliases import share
from hosm_losses.taylor.along import Pairs
from hosm_losses.taylor.arithmetic import add, multiply, ndim_of, product_rule, swapped
from hosm_losses.taylor.bilinear import Form, plain, product
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.jet import Jet
from hosm_losses.taylor.table import every, rule

# Directions. Every term of a form is a call, of which many directions have many.
MOST = 2


class _Term(NamedTuple):
    """A part of a component k of a product: a factor times components i and j of its factors."""

    i: int
    j: int
    k: int
    factor: int = 1


class _Terms(NamedTuple):
    """All parts of a product, and those of its gradients in the left and in the right factor."""

    product: tuple[_Term, ...]  # i of the left factor, j of the right one
    left: tuple[_Term, ...]  # i of the cotangent, j of the right factor
    right: tuple[_Term, ...]  # i of the left factor, j of the cotangent


@cache
def _terms(firsts: int, pairs: Pairs, left: int, right: int) -> _Terms:
    """All terms, of stacks as long as these; second derivatives of zero are not in them."""
    terms = [_Term(0, 0, 0)]
    for k in range(1, max(left, right)):
        terms += [_Term(k, 0, k)] if k < left else []
        terms += [_Term(0, k, k)] if k < right else []
    if pairs in ("squares", "sum"):
        places = range(1, 1 + firsts)
        terms += [_Term(i, i, firsts + (i if pairs == "squares" else 1), 2) for i in places]
    elif pairs != "none":
        one = pairs == "last"
        for i in range(1, firsts if one else 1 + firsts // 2):
            j = firsts if one else i + firsts // 2
            terms += [_Term(i, j, i + firsts), _Term(j, i, i + firsts)]
    return _Terms(
        tuple(terms),
        tuple(_Term(k, j, i, factor) for i, j, k, factor in terms),
        tuple(_Term(i, k, j, factor) for i, j, k, factor in terms),
    )


def _gathered(
    count: int, terms: Iterable[_Term], left: Tensor, right: Tensor, out: Tensor | None = None
) -> Tensor:
    """The stack of sums of products of two stacks of batches of matrices, in `out` if given."""
    lefts, rights = left.unbind(), right.unbind()
    if batched((left, right)):
        sums: dict[int, Tensor] = {}
        for i, j, k, factor in terms:
            one = factor * torch.bmm(lefts[i], rights[j])
            sums[k] = sums[k] + one if k in sums else one
        return torch.stack([sums[k] for k in range(count)])
    found = left.new_empty(count, *left.shape[1:-1], right.shape[-1]) if out is None else out
    parts, started = found.unbind(), set[int]()
    for i, j, k, factor in terms:
        part, beta = parts[k], int(k in started)  # of zero what is there is not looked at
        # Not baddbmm_, which torch.utils.flop_counter does not count.
        torch.baddbmm(part, lefts[i], rights[j], beta=beta, alpha=factor, out=part)
        started.add(k)
    return found


def _as_laid_out(
    transposed: bool, count: int, terms: Iterable[_Term], left: Tensor, right: Tensor
) -> Tensor:
    """The same stack, of matrices that are stored column by column if it is transposed."""
    if not transposed:
        return _gathered(count, terms, left, right)
    turned = [_Term(j, i, k, factor) for i, j, k, factor in terms]
    if batched((left, right)):
        return _gathered(count, turned, right.mT, left.mT).mT
    # Not a view, to which autograd could not add another gradient in place.
    n, rows, columns = left.shape[1], left.shape[2], right.shape[3]
    strides = n * rows * columns, rows * columns, 1, rows
    found = left.new_empty_strided((count, n, rows, columns), strides)
    _gathered(count, turned, right.mT, left.mT, found.mT)
    return found


def _form(terms: _Terms, left: Tensor, right: Tensor) -> Form:
    """The product of stacks such as (C, N, m, k) and (C, N, k, n).

    A gradient is stored in the order of its factor. In another order the operators that combine it
    with what comes from there, such as the result of a softmax, take three times as long.
    """
    (count, turned), (other_count, other_turned) = (
        (stack.shape[0], stack.stride(-2) < stack.stride(-1)) for stack in (left, right)
    )
    both = 1 + max(term.k for term in terms.product)
    return Form(
        lambda b, cotangent: _as_laid_out(turned, count, terms.left, cotangent, b.mT),
        lambda a, cotangent: _as_laid_out(other_turned, other_count, terms.right, a.mT, cotangent),
        lambda a, b: _gathered(both, terms.product, a, b),
    )


class _Sum(NamedTuple):
    """How a sum over indices is a product of matrices."""

    swapped: bool  # whether the factors change places
    batch: str
    rows: str
    inner: str
    columns: str
    left: str  # the indices of both factors, in the order in which they are given
    right: str


@cache
def _as_product(left: str, right: str, result: str) -> _Sum | None:
    """The product of matrices that a sum is; None as where an index is in one factor alone."""
    swapped = bool(result) and result[-1] in left  # which is the last axis in memory as well, then
    if swapped:
        left, right = right, left
    batch = "".join(index for index in result if index in left and index in right)
    inner = "".join(index for index in left if index in right and index not in result)
    rows = "".join(index for index in result if index in left and index not in right)
    columns = "".join(index for index in result if index in right and index not in left)
    forms = batch + rows + inner, batch + inner + columns, batch + rows + columns
    if not inner or [*map(sorted, forms)] != [*map(sorted, (left, right, result))]:
        return None  # as where an index comes twice
    return _Sum(swapped, batch, rows, inner, columns, left, right)


def _contracted(left: str, right: str, result: str, a: Any, b: Any) -> Jet | None:
    """A sum over indices as products of matrices; None where `product_rule` has to do it."""
    if not isinstance(a, Jet) or not isinstance(b, Jet) or a.firsts > MOST or traced():
        return None
    if len(left) != a.ndim or len(right) != b.ndim or not plain(a.stack, b.stack):
        return None
    plan, sizes = _as_product(left, right, result), dict(zip(left, a.shape, strict=True))
    for index, size in zip(right, b.shape, strict=True):
        if sizes.setdefault(index, size) != size:
            return None
    if plan is None:
        return None
    first, second = in_autocast(a.stack), in_autocast(b.stack)
    if first.dtype != second.dtype:
        return None
    if plan.swapped:
        first, second = second, first
    n, m, k, p = (
        prod([sizes[index] for index in group])
        for group in (plan.batch, plan.rows, plan.inner, plan.columns)
    )
    batch, lengths = plan.batch, (first.shape[0], second.shape[0])
    first = _ordered(first, plan.left, batch + plan.rows + plan.inner)
    second = _ordered(second, plan.right, batch + plan.inner + plan.columns)
    first, second = first.reshape(lengths[0], n, m, k), second.reshape(lengths[1], n, k, p)
    found = product(_form(_terms(a.firsts, a.pairs, *lengths), first, second), first, second)
    given = batch + plan.rows + plan.columns
    found = found.reshape(found.shape[0], *[sizes[index] for index in given])
    return a.like(_ordered(found, given, result))


def _ordered(stack: Tensor, given: str, wanted: str) -> Tensor:
    """A stack with the axes of its value in another order."""
    if given == wanted:
        return stack
    return stack.permute(0, *(1 + given.index(index) for index in wanted))


@rule(*every("matmul", "__matmul__"), several=True)
def matmul(a: Any, b: Any) -> Jet:
    """The matrix product, of which one factor at least is a Jet."""
    if min(ndim_of(a), ndim_of(b)) < 2:
        raise NoRule
    ndim = max(ndim_of(a), ndim_of(b))
    batch = ascii_lowercase[: ndim - 2]
    found = (
        _contracted(f"{batch}MK", f"{batch}KN", f"{batch}MN", a, b) if a.ndim == b.ndim else None
    )
    return product_rule(a, b, torch.matmul, ndim) if found is None else found


@rule(*every("mm", "bmm"), several=True)
def _of_matrices(a: Any, b: Any) -> Jet:
    if a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2]:
        raise NoRule
    return matmul(a, b)


rule(*every("__rmatmul__"), several=True)(swapped(matmul))


def _without_dots(equation: str, factors: Iterable[Any]) -> str:
    """An equation with letters for the axes that "..." stands for, as many in every factor."""
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


@rule(torch.einsum, several=True)
def _einsum(equation: Any, *operands: Any) -> Jet:
    listed = len(operands) == 1 and isinstance(operands[0], list | tuple)
    factors: Any = operands[0] if listed else operands
    # Not the form without a string, nor one whose result is implied.
    if not isinstance(equation, str) or "->" not in equation or len(factors) > 2:
        raise NoRule
    equation = _without_dots(equation, factors)
    new = next(letter for letter in ascii_letters if letter not in equation)
    given, _, result = equation.replace(" ", "").partition("->")
    terms = [
        new + term if isinstance(factor, Jet) else term
        for term, factor in zip(given.split(","), factors, strict=True)
    ]
    summed = partial(torch.einsum, f"{','.join(terms)}->{new}{result}")
    if len(factors) == 1:
        return share(factors[0], factors[0].like(summed(factors[0].stack)))
    left, right = given.split(",")
    found = _contracted(left, right, result, factors[0], factors[1])
    return product_rule(factors[0], factors[1], summed, 0) if found is None else found


@rule(*every("baddbmm", "addmm"), several=True)
def _added(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Jet:
    if not isinstance(a, Jet) and not isinstance(b, Jet):
        raise NoRule
    found = multiply(_of_matrices(a, b), alpha)
    if beta == 0:
        return found
    # Under autocast x may be in a wider type.
    return add(found, x, alpha=beta).typed(found.dtype)
