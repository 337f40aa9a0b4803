"""Products that are linear in both factors: batches of gradients, types, subclasses."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hosm_losses.taylor import propagate
from tests.taylor.test_pullbacks import numbers


def network_and_stack(pairs="none", dtype=torch.float64):
    """A convolution and a product of two factors that depend on x, between curved functions."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3, padding=1, dtype=dtype)

    def function(x):
        h = layer(x.sin()).sin().flatten(2)
        return (h @ h.mT.cos() @ h).sin()

    x, direction = numbers(2, 1, 3, 3).to(dtype), numbers(1, 2, 1, 3, 3, seed=2).to(dtype)
    return layer, propagate(function, x, direction, pairs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("pairs", ["none", "squares"])
def test_several_gradients_in_one_pass(pairs):
    layer, stack = network_and_stack(pairs)
    parameters = list(layer.parameters())
    cotangents = numbers(3, *stack.shape, seed=3)

    def back(cotangent):
        return torch.autograd.grad(stack, parameters, cotangent, retain_graph=True)

    one_by_one = [torch.stack(each) for each in zip(*map(back, cotangents), strict=True)]
    for found in (
        torch.func.vmap(back)(cotangents),
        torch.autograd.grad(
            stack, parameters, cotangents, retain_graph=True, is_grads_batched=True
        ),
    ):
        torch.testing.assert_close(list(found), one_by_one, rtol=1e-11, atol=1e-12)


def test_autocast_around_a_backward_pass_changes_nothing():
    found = []
    for around in (False, True):
        layer, stack = network_and_stack(dtype=torch.float32)  # which autocast rounds
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            (weight,) = torch.autograd.grad(stack.sum(), [layer.weight], create_graph=True)
            found.append(torch.autograd.grad(weight.square().sum(), layer.weight)[0])
    assert torch.equal(*found)


class Own(torch.Tensor):
    """A tensor with a meaning of its own, as of an integer or a sharded weight."""


def test_a_weight_of_a_subclass_is_left_to_pytorch():
    weight = nn.Parameter(numbers(2, 1, 3, 3))
    bias = nn.Parameter(numbers(2))
    x, direction = numbers(2, 1, 4, 4), numbers(1, 2, 1, 4, 4, seed=2)
    stacks = [
        propagate(lambda x, kernel=kernel: F.conv2d(x.sin(), kernel, bias), x, direction)
        for kernel in (weight, weight.as_subclass(Own))
    ]
    torch.testing.assert_close(stacks[1].as_subclass(torch.Tensor), stacks[0])


def test_autocast_keeps_the_short_type_alone():
    """Of what is kept for the backward passes, as PyTorch does."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3)).float()
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        found = propagate(network, x, x.unsqueeze(0))
    assert found.dtype == torch.bfloat16
    weights = {each.data_ptr() for each in network.parameters()}
    assert {each.dtype for each in kept if each.data_ptr() not in weights} == {torch.bfloat16}
    found.float().square().sum().backward()
    with torch.autocast("cpu", enabled=False):
        exact = propagate(network, x, x.unsqueeze(0)).square().sum()
    expected = torch.autograd.grad(exact, list(network.parameters()))
    for mine, theirs in zip(network.parameters(), expected, strict=True):
        assert mine.grad.dtype == torch.float32
        largest = float(theirs.abs().max())
        torch.testing.assert_close(mine.grad, theirs, rtol=0.05, atol=0.05 * largest)
