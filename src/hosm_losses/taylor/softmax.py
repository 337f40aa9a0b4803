r"""The rule for softmax, and its gradients.

Formula of p = softmax(x), with ⟨z⟩ the mean under p, z̃ = z − ⟨z⟩ and u_l = x̃_l:
    p_l = p u_l        p_ll = p c̃ of c = u_l² + x_ll

Gradients, for cotangents a of p, b_l of p_l and d_l of p_ll, where Σ without an index is over the
axis. With β_l = Σ p b_l, δ_l = Σ p d_l, σ_l = 2 Σ p_l (d_l − δ_l) and
w = p a + Σ_l [p_l (b_l − β_l − σ_l) + p_ll (d_l − δ_l)]:
    in x_ll   p (d_l − δ_l)
    in x_l    p (b_l − β_l − σ_l) + 2 p_l (d_l − δ_l)
    in x      w − p Σ w
    Nothing but the result is needed for them, so it is kept, and x is not.

Gradients of those in x and x_l, in the result and in its cotangents, where there is no d. For
cotangents A of that in x and B_l of that in x_l, with Ã = A − Σ p A and h_l = p_l Ã + p B_l:
    in a      p Ã
    in b_l    h_l − p Σ h_l
    in p_l    Ã (b_l − β_l)
    in p      Ã a − A Σ w + Σ_l [B_l (b_l − β_l) − b_l Σ h_l]

The product with the values of attention keeps the result too, if it is not rounded or dropped
before.
In a short type gradients are as exact as PyTorch's, which come from a rounded result as well.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.recompute import Needed, with_recomputation
from hosm_losses.taylor.registry import axis, rule
from hosm_losses.taylor.stacks import (
    Pairs,
    add_products,
    at_least_float32,
    collect,
    components,
)
from hosm_losses.taylor.tensor import Jet


@rule("softmax", kind="stack")
def softmax(x: Any, dim: Any = None, dtype: Any = None, *, _stacklevel: int = 3) -> Jet:
    """exp(x) over its sum along an axis, of x in another type if one is given."""
    if dtype is not None and not dtype.is_floating_point:
        raise NoRule
    stack = x.stack if dtype is None else x.stack.to(dtype)
    dim = axis(dim, x.ndim)
    parts: list[Any] = [
        partial(_softmax, dim, x.firsts, x.pairs),
        partial(_pull_back, dim, x.firsts, x.pairs, len(stack)),
    ]
    if x.pairs == "none":
        parts.append(partial(_pull_back_again, dim))
    return x.like(with_recomputation(parts[0], stack, pullbacks=parts[1:], by_result=True))


def _softmax(dim: int, firsts: int, pairs: Pairs, stack: Tensor) -> Tensor:
    logits, tangents, seconds = components(at_least_float32(stack), firsts)
    weights = torch.softmax(logits, dim)

    def about_mean(x: Tensor) -> Tensor:
        return x - (weights * x).sum(dim, keepdim=True)

    u = about_mean(tangents)
    parts = [weights, weights * u]
    if pairs != "none":
        bent = collect(u * u, pairs)
        parts.append(weights * about_mean(bent + seconds if len(seconds) else bent))
    return torch.cat(parts).to(stack.dtype)


def _pull_back(
    dim: int,
    firsts: int,
    pairs: Pairs,
    count: int,
    _needed: Needed,
    result: Tensor,
    cotangent: Tensor,
) -> Tensor:
    """The gradient in a stack of so many components."""
    dtype = result.dtype
    result, cotangent = at_least_float32(result), at_least_float32(cotangent)
    weights, tangents, seconds = components(result, firsts)
    found = weights * cotangent
    sums = found[1:].sum(dim, keepdim=True)
    of_firsts, of_seconds = sums.split_with_sizes((firsts, len(sums) - firsts))
    b, d = (cotangent[1:] - sums).split_with_sizes((firsts, len(of_seconds)))
    of_value = found[:1]
    add_products(of_value, tangents, b)
    if pairs != "none":
        add_products(of_value, seconds, d)
        bent = 2 * d * tangents
        found[1 : 1 + firsts].add_(bent)
        bent = bent.sum(dim, keepdim=True)
        add_products(of_value, tangents, bent, -1)
        of_firsts = of_firsts + bent
    sums = torch.cat([of_value.sum(dim, keepdim=True), of_firsts, of_seconds])
    # Of second derivatives that are zero everywhere there is no gradient.
    return found[:count].addcmul_(weights, sums[:count], value=-1).to(dtype)


def _pull_back_again(
    dim: int, _needed: Needed, result: Tensor, cotangent: Tensor, again: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients, in the result and in the cotangent, of what `_pull_back` returns."""
    dtype = result.dtype
    result, cotangent, again = map(at_least_float32, (result, cotangent, again))
    sizes = 1, len(result) - 1
    (weights, tangents), (a, b), (turned, of_firsts) = (
        stack.split_with_sizes(sizes) for stack in (result, cotangent, again)
    )
    total = partial(torch.sum, dim=dim, keepdim=True)
    of_cotangent = weights * again
    mean = total(of_cotangent[:1])
    of_cotangent[:1].addcmul_(weights, mean, value=-1)
    turned = turned - mean
    of_cotangent[1:].addcmul_(tangents, turned)
    sums = total(of_cotangent[1:])
    of_cotangent[1:].addcmul_(weights, sums, value=-1)
    of_result = turned * cotangent
    means = total(weights * b)
    of_result[1:].addcmul_(turned, means, value=-1)
    centred, of_weights = b - means, of_result[:1]
    value = weights * a
    add_products(value, tangents, centred)
    add_products(of_weights, again[:1], total(value), -1)
    add_products(of_weights, of_firsts, centred)
    add_products(of_weights, b, sums, -1)
    return of_result.to(dtype), of_cotangent.to(dtype)
