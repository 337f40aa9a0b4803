"""Gradients of norms and of softmax that are written out: those of autograd, to any order."""

from functools import partial

import pytest
import torch

from hosm_losses.taylor.attention import Softmax
from hosm_losses.taylor.memory import with_recomputation
from hosm_losses.taylor.norms import Norm, Rows

# Pairs, first derivatives, and second derivatives that the argument has itself.
KINDS = [
    *(("none", firsts, 0) for firsts in (1, 3)),
    *(("squares", 2, seconds) for seconds in (0, 2)),
    *(("sum", firsts, seconds) for firsts in (1, 3) for seconds in (0, 1)),
]
NORMS = {
    "group": Rows((2, 2, 3, 4), (-2, -1), (2, 3, 1), 0.1),
    "rms": Rows((2, 6, 4), (-1,), (4,), 0.1, centred=False),
    "batch": Rows((2, 6, 4), (-3, -1), (6, 1), 0.1),
}


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(function, tensors, order):
    """All derivatives up to an order: each of a sum over those of the order before."""
    found = []
    value = function(*tensors)
    value = (value * numbers(*value.shape, seed=1)).sum() + value.square().mean()
    given = [each for each in tensors if each is not None]
    for _ in range(order):
        parts = torch.autograd.grad(value, given, create_graph=True, materialize_grads=True)
        found += parts
        value = sum((part * numbers(*part.shape, seed=2)).mean() for part in parts)
        value = value + parts[0].square().mean()
    return found


def same_gradients(mine, theirs, tensors, order=3):
    """Of two functions, up to an order."""
    found, expected = (gradients(each, tensors, order) for each in (mine, theirs))
    for one, other in zip(found, expected, strict=True):
        largest = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 + 1e-10 * largest)


def counted(function, calls):
    def call(*given):
        calls.append(function)
        return function(*given)

    return call


def agree(function, pullbacks, tensors, order=3, through=with_recomputation):
    calls = []
    watched = [counted(each, calls) for each in pullbacks]
    mine = partial(through, function, pullbacks=watched)
    same_gradients(mine, function, tensors, order)
    assert all(each in calls for each in pullbacks)


@pytest.mark.parametrize(("pairs", "firsts", "seconds"), KINDS)
@pytest.mark.parametrize("dim", [-1, -2])
def test_softmax(dim, pairs, firsts, seconds):
    stack = numbers(1 + firsts + seconds, 2, 3, 5).requires_grad_()
    softmax = Softmax(dim, firsts, pairs, len(stack))
    again = [softmax.pull_back_again] if pairs == "none" else []
    through = partial(with_recomputation, by_result=True)
    agree(softmax.evaluate, [softmax.pull_back, *again], [stack], through=through)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pairs", ["none", "squares"])
def test_a_short_type_is_kept_and_gradients_have_it(dtype, pairs):
    stack = numbers(3, 2, 6, 4).to(dtype).requires_grad_()
    softmax = Softmax(-1, 2, pairs, len(stack))
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        value = with_recomputation(
            softmax.evaluate, stack, pullbacks=[softmax.pull_back], by_result=True
        )
    assert {each.dtype for each in seen} == {dtype}
    (mine,) = torch.autograd.grad(value.square().sum(), stack)
    (theirs,) = torch.autograd.grad(softmax.evaluate(stack).square().sum(), stack)
    assert mine.dtype == dtype
    # The result is kept in this type, as PyTorch keeps its own.
    error = torch.finfo(dtype).eps * float(theirs.abs().max())
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=error)


@pytest.mark.parametrize(("pairs", "firsts", "seconds"), KINDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm, weighted, pairs, firsts, seconds):
    rows = NORMS[norm]
    stack = numbers(1 + firsts + seconds, 2, 6, 4).requires_grad_()
    weight, bias = (
        numbers(torch.Size(rows.weights).numel(), seed=seed).requires_grad_() if weighted else None
        for seed in (3, 4)
    )
    mine = Norm(rows, firsts, pairs)
    again = [mine.pull_back_again] if pairs == "none" else []
    agree(mine.evaluate, [mine.pull_back, *again], [stack, weight, bias])
