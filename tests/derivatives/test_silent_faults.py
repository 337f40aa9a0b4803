"""Faults that other tests let through in silence, one small network each."""

import pytest
import torch
from torch import nn

from hosm_losses.derivatives.taylor import TaylorError, carried


def test_attention_in_evaluation_mode_drops_nothing():
    layer = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).eval()
    x = torch.randn(3, 3, 4)
    found = carried(lambda x: layer(x, x, x, need_weights=False)[0], x, torch.randn(1, 3, 3, 4))
    torch.testing.assert_close(found[0], layer(x, x, x, need_weights=False)[0])


def test_autocast_around_a_backward_pass_changes_nothing():
    x, found = torch.randn(2, 1, 3, 3).float(), []
    layer = nn.Conv2d(1, 2, 3, padding=1).float()

    def function(x):
        h = layer(x.sin()).sin().flatten(2)
        return (h @ h.mT.cos() @ h).sin()

    for enabled in (False, True):
        stack = carried(function, x, x.cos().unsqueeze(0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            (weight,) = torch.autograd.grad(stack.sum(), [layer.weight], create_graph=True)
            found.append(torch.autograd.grad(weight.square().sum(), layer.weight)[0])
    assert torch.equal(*found)


def test_running_statistics_go_with_the_eps_of_their_norm():
    x, norm = torch.randn(3, 2, 5), nn.InstanceNorm1d(2, eps=0.3, track_running_stats=True).eval()
    torch.testing.assert_close(carried(norm, x, x.cos().unsqueeze(0))[0], norm(x))


def test_a_change_of_what_was_detached_from_a_reshape_is_refused():
    def changed(x):
        y = x.sin()
        y.reshape(24).detach().mul_(2)
        return y

    x = torch.randn(3, 8)
    with pytest.raises(TaylorError):
        carried(changed, x, x.cos().unsqueeze(0))


def test_the_fraction_of_a_number_has_a_slope():
    x = torch.randn(3, 8)
    found = carried(lambda x: torch.frac(3 * x), x, x.cos().unsqueeze(0))
    torch.testing.assert_close(found[1], 3 * x.cos())


def test_a_hook_is_shown_the_gradient_of_the_value():
    x, shown = torch.rand(2, 3, requires_grad=True), []

    def observed(point):
        inner = point.sin()
        inner.register_hook(shown.append)
        return inner * inner

    stack = carried(observed, x, torch.ones(1, 2, 3))
    (stack[0].sum() + 3 * stack[1].sum()).backward()
    torch.testing.assert_close(shown[0], (2 * x.sin() + 6 * x.cos()).detach())
