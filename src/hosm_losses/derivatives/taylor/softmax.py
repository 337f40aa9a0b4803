r"""The rule for softmax, and its gradients.

Formula of p = softmax(x), with ⟨z⟩ the mean under p, z̃ = z − ⟨z⟩ and u_l = x̃_l:
    p_l = p u_l        p_lr = p c̃ of c = u_l u_r + x_lr

Gradients for cotangents a of the value, b_l of p_l and d of p_lr:
    in x_lr   p d̃
    in x_l    p (b_l + d̃ u_r)~ , and so for x_r
    in x      p (a + Σ_l u_l b̃_l + Σ [d̃ c̃ − u_l ⟨d̃ u_r⟩ − u_r ⟨d̃ u_l⟩])~
    Those of the first two again, for cotangents A of that in x and B_l of that in x_l, without d,
    follow from the same moments; with g = (a + Σ_l u_l b̃_l)~:
    in a      p Ã
    in b_l    p (B_l + Ã u_l)~
    in x_l    p (Ã b̃_l)~
    in x      p (Ã g + Σ_l [b̃_l (B̃_l − ⟨Ã u_l⟩) − u_l ⟨Ã b̃_l⟩])~

Weights of attention are larger than all other activations, and every pass over them is felt: by
autograd these gradients take twice as many.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses._checks import at_least_float32
from hosm_losses.derivatives.taylor.along import Pairs
from hosm_losses.derivatives.taylor.jet import Jet, components, gathered, halves
from hosm_losses.derivatives.taylor.recompute import Needed, recomputed
from hosm_losses.derivatives.taylor.table import Function, NoRule, axis, rule

# Bytes of one component of a stack. The gradients work with a dozen of them.
BLOCK = 2**19


@rule(torch.softmax, Tensor.softmax, F.softmax)
def softmax(x: Any, dim: Any = None, dtype: Any = None, *, _stacklevel: int = 3) -> Jet:
    """exp(x) over its sum along an axis, of x in another type if one is given."""
    if dtype is not None and not dtype.is_floating_point:
        raise NoRule
    stack = x.stack if dtype is None else x.stack.to(dtype)
    options = axis(dim, x.ndim), x.firsts, x.pairs
    parts: list[Any] = [partial(each, *options) for each in (_softened, _pull_back)]
    if x.pairs == "none":
        parts.append(partial(_pull_back_again, options[0]))
    if stack.device.type == "cpu" and options[0] != -x.ndim:
        parts = [partial(_in_blocks, each) for each in parts]
    function, *pullbacks = parts
    return x.like(recomputed(function, stack, pullbacks=pullbacks)).typed(stack.dtype)


def _in_blocks(function: Function, *given: Any) -> Any:
    """A function of stacks, of as many samples at a time as a processor's cache holds."""
    stack = given[-1]
    size = stack[0].nbytes
    if torch.is_grad_enabled() or size <= BLOCK:  # as where autograd finds its derivatives
        return function(*given)
    found: list[Tensor] = []
    count = max(1, BLOCK * stack.shape[1] // size)
    for start in range(0, stack.shape[1], count):
        samples = (slice(None), slice(start, start + count))
        result = function(*(x[samples] if isinstance(x, Tensor) else x for x in given))
        parts = result if isinstance(result, tuple) else (result,)
        found = found or [x.new_empty(len(x), *stack.shape[1:]) for x in parts]
        for whole, part in zip(found, parts, strict=True):
            whole[samples] = part
    return tuple(found) if len(found) > 1 else found[0]


def _mean(weights: Tensor, dim: int, x: Tensor) -> Tensor:
    return (weights * x).sum(dim, keepdim=True)


def _bent(u: Tensor, seconds: Tensor, pairs: Pairs) -> Tensor:
    left, right = halves(u, pairs)
    bent = gathered(left * right, pairs)
    return bent + seconds if len(seconds) else bent


def _added(total: Tensor, left: Tensor, right: Tensor, value: float = 1.0) -> Tensor:
    """The total (1, *), and the products of two stacks."""
    for one, other in zip(left, right, strict=True):
        total = torch.addcmul(total, one, other, value=value)
    return total


def _softened(dim: int, firsts: int, pairs: Pairs, stack: Tensor) -> Tensor:
    logits, tangents, seconds = components(at_least_float32(stack), firsts)
    weights = torch.softmax(logits, dim)
    mean = partial(_mean, weights, dim)
    u = tangents - mean(tangents)
    parts = [weights, weights * u]
    if pairs != "none":
        bent = _bent(u, seconds, pairs)
        parts.append(weights * (bent - mean(bent)))
    return torch.cat(parts)


def _pull_back(
    dim: int, firsts: int, pairs: Pairs, _needed: Needed, stack: Tensor, cotangent: Tensor
) -> Tensor:
    """The gradient in the stack."""
    logits, tangents, seconds = components(at_least_float32(stack), firsts)
    weights = torch.softmax(logits, dim)
    mean = partial(_mean, weights, dim)
    u = tangents - mean(tangents)
    a, b, d = components(cotangent, firsts)
    b = b - mean(b)
    of_value, parts = _added(a, u, b), [b]
    if pairs != "none":
        bent, d = _bent(u, seconds, pairs), d - mean(d)
        of_value = _added(of_value, d, bent - mean(bent))
        left, right = halves(u, pairs)
        sides = [right] if right is left else [right, left]
        products = [d * side for side in sides]
        means = [mean(each) for each in products]
        for side, mean_side in zip((left, right), means * 2, strict=False):
            of_value = _added(of_value, side.expand_as(products[0]), mean_side, -1.0)
        bent = [each - mean_each for each, mean_each in zip(products, means, strict=True)]
        if pairs == "last":
            bent[1] = bent[1].sum(0, keepdim=True)
        parts = [b + (2 * bent[0] if right is left else torch.cat(bent))]
        parts += [d] if len(seconds) else []
    of_value = of_value - mean(of_value)
    return torch.cat([of_value, *parts]).mul_(weights).to(stack.dtype)


def _pull_back_again(
    dim: int, _needed: Needed, stack: Tensor, cotangent: Tensor, again: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients, in the stack and in the cotangent, of what `_pull_back` returns."""
    value, tangents, again = map(at_least_float32, (stack[:1], stack[1:], again))
    weights = torch.softmax(value, dim)
    mean = partial(_mean, weights, dim)
    u, b, again = (x - mean(x) for x in (tangents, cotangent[1:], again))
    inner = _added(cotangent[:1], u, b)
    a, of_firsts = again.split((1, len(u)))
    a_u, a_b = a * u, a * b
    mean_u, mean_b = mean(a_u), mean(a_b)
    of_value = a * (inner - mean(inner))
    of_value = _added(of_value, b, of_firsts - mean_u)
    of_value = _added(of_value, u, mean_b, -1.0)
    of_stack = torch.cat([of_value - mean(of_value), a_b - mean_b]).mul_(weights)
    return of_stack.to(stack.dtype), torch.cat([a, of_firsts + a_u - mean_u]).mul_(weights)
