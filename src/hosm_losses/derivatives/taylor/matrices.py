r"""Rules for products of matrices.

Formula of Y = A B, for matrices A_i and B_j, derivatives or values, and cotangents C_k of Y:
    Y_k = Σ f A_i B_j        in A   Σ f C_k B_jᵀ        in B   Σ f A_iᵀ C_k
    over the same terms (i, j, k, f): f A_i B_j is a part of Y_k.

Each sum is added up where it ends. As one of products, the larger matrices, such as the weights of
attention, would be read and written three times for each.
"""

from collections.abc import Iterable
from functools import partial
from math import prod
from string import ascii_letters, ascii_lowercase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._torch_internals import batched, in_autocast, traced
from hosm_losses.derivatives.taylor.aliases import share
from hosm_losses.derivatives.taylor.along import Pairs
from hosm_losses.derivatives.taylor.arithmetic import add, multiply, ndim_of, product_rule, swapped
from hosm_losses.derivatives.taylor.bilinear import Form, plain, product
from hosm_losses.derivatives.taylor.jet import Jet
from hosm_losses.derivatives.taylor.table import NoRule, every, rule

# Directions. Every term of a form is a call, of which many directions have many.
MOST = 2


class _Term(NamedTuple):
    """A part of a component k of a product: a factor times components i and j of its factors."""

    i: int
    j: int
    k: int
    factor: int = 1


def _terms(firsts: int, pairs: Pairs, left: int, right: int) -> list[_Term]:
    """All terms, of stacks as long as these; second derivatives of zero are not in them."""
    terms = [_Term(0, 0, 0)]
    for k in range(1, max(left, right)):
        terms += [_Term(k, 0, k)] if k < left else []
        terms += [_Term(0, k, k)] if k < right else []
    if pairs in ("squares", "sum"):
        places = range(1, 1 + firsts)
        return terms + [_Term(i, i, firsts + (i if pairs == "squares" else 1), 2) for i in places]
    if pairs != "none":
        one = pairs == "last"
        for i in range(1, firsts if one else 1 + firsts // 2):
            j = firsts if one else i + firsts // 2
            terms += [_Term(i, j, i + firsts), _Term(j, i, i + firsts)]
    return terms


def _gathered(count: int, products: Iterable[tuple[int, int, Tensor, Tensor]]) -> Tensor:
    """The stack of sums of products, each of a component, a factor and two batches of matrices."""
    products = list(products)
    _, _, left, right = products[0]
    if batched(each for _, _, *factors in products for each in factors):
        sums: dict[int, Tensor] = {}
        for k, factor, left, right in products:
            one = factor * torch.bmm(left, right)
            sums[k] = sums[k] + one if k in sums else one
        return torch.stack([sums[k] for k in range(count)])
    found = left.new_empty(count, *left.shape[:-1], right.shape[-1])
    parts, started = found.unbind(), set[int]()
    for k, factor, left, right in products:
        beta = int(k in started)  # of zero what is there is not looked at
        # Not baddbmm_, which torch.utils.flop_counter does not count.
        torch.baddbmm(parts[k], left, right, beta=beta, alpha=factor, out=parts[k])
        started.add(k)
    return found


def _as_laid_out(
    transposed: bool, count: int, products: Iterable[tuple[int, int, Tensor, Tensor]]
) -> Tensor:
    """The same stack, of matrices that are stored column by column if it is transposed."""
    if not transposed:
        return _gathered(count, products)
    return _gathered(count, ((k, f, right.mT, left.mT) for k, f, left, right in products)).mT


def _form(terms: list[_Term], left: Tensor, right: Tensor) -> Form:
    """The product of stacks such as (C, N, m, k) and (C, N, k, n).

    A gradient is stored in the order of its factor. In another order the operators that combine it
    with what comes from there, such as the result of a softmax, take three times as long.
    """
    (count, turned), (other_count, other_turned) = (
        (len(stack), stack.stride(-2) < stack.stride(-1)) for stack in (left, right)
    )

    def of_left(b: Tensor, cotangent: Tensor) -> Tensor:
        c, b_t = cotangent.unbind(), b.mT.unbind()
        products = ((i, f, c[k], b_t[j]) for i, j, k, f in terms)
        return _as_laid_out(turned, count, products)

    def of_right(a: Tensor, cotangent: Tensor) -> Tensor:
        c, a_t = cotangent.unbind(), a.mT.unbind()
        products = ((j, f, a_t[i], c[k]) for i, j, k, f in terms)
        return _as_laid_out(other_turned, other_count, products)

    def both(a: Tensor, b: Tensor) -> Tensor:
        count = 1 + max(term.k for term in terms)
        lefts, rights = a.unbind(), b.unbind()
        return _gathered(count, ((k, f, lefts[i], rights[j]) for i, j, k, f in terms))

    return Form(of_left, of_right, both)


def _contracted(left: str, right: str, result: str, a: Any, b: Any) -> Jet | None:
    """A sum over indices as products of matrices; None where `product_rule` has to do it."""
    if not isinstance(a, Jet) or not isinstance(b, Jet) or a.firsts > MOST or traced():
        return None
    sizes = dict(zip(left + right, (*a.shape, *b.shape), strict=False))
    shapes = [tuple(sizes.get(index) for index in term) for term in (left, right)]
    if shapes != [tuple(a.shape), tuple(b.shape)] or not plain(a.stack, b.stack):
        return None
    if result and result[-1] in left:  # which is the last axis in memory as well, then
        left, right, a, b = right, left, b, a
    batch = "".join(index for index in result if index in left and index in right)
    inner = "".join(index for index in left if index in right and index not in result)
    rows = "".join(index for index in result if index in left and index not in right)
    columns = "".join(index for index in result if index in right and index not in left)
    forms = batch + rows + inner, batch + inner + columns, batch + rows + columns
    if not inner or [*map(sorted, forms)] != [*map(sorted, (left, right, result))]:
        return None  # as where an index comes twice, or in one factor alone
    first, second = in_autocast(a.stack), in_autocast(b.stack)
    if first.dtype != second.dtype:
        return None

    def size(group: str) -> int:
        return prod(sizes[index] for index in group)

    lengths, (m, k, n) = (len(first), len(second)), map(size, (rows, inner, columns))
    first = _ordered(first, left, forms[0]).reshape(lengths[0], size(batch), m, k)
    second = _ordered(second, right, forms[1]).reshape(lengths[1], size(batch), k, n)
    found = product(_form(_terms(a.firsts, a.pairs, *lengths), first, second), first, second)
    found = found.reshape(len(found), *(sizes[index] for index in forms[2]))
    return a.like(_ordered(found, forms[2], result))


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


@rule(torch.einsum, several=True)
def _einsum(equation: Any, *operands: Any) -> Jet:
    listed = len(operands) == 1 and isinstance(operands[0], list | tuple)
    factors: Any = operands[0] if listed else operands
    # Not the form without a string, nor one whose result is implied.
    written = isinstance(equation, str) and "..." not in equation and "->" in equation
    if not written or len(factors) > 2:
        raise NoRule
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


@rule(*every("baddbmm"), several=True)
def _baddbmm(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Jet:
    if not isinstance(a, Jet) and not isinstance(b, Jet):
        raise NoRule
    found = multiply(_of_matrices(a, b), alpha)
    if beta == 0:
        return found
    # Under autocast x may be in a wider type.
    return add(found, x, alpha=beta).typed(found.dtype)
