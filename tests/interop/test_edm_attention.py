"""EDM's attention: a Function with a backward of its own, made of differentiable operators.

A stand-in from its documented behaviour: the weights are a softmax over float32 products, the
backward is written by hand, and there is no rule for vmap. Each result is
compared with the same network whose weights are plain operators.
"""

import pytest
import torch
from torch import nn

import hosm_losses as hosm

CHANNELS = 3
METHODS = [
    {"probes": 2},
    {"divergence": "exact"},
    {"method": "adaptive", "probes": 2},
    {"method": "adaptive", "divergence": "exact"},
]


class AttentionOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k):
        w = plain_weights(q, k)
        ctx.save_for_backward(q, k, w)
        return w

    @staticmethod
    def backward(ctx, dw):
        q, k, w = ctx.saved_tensors
        inner = w * (dw - (w * dw).sum(2, keepdim=True)) / CHANNELS**0.5
        return torch.einsum("nck,nqk->ncq", k, inner), torch.einsum("ncq,nqk->nck", q, inner)


def plain_weights(q, k):
    return torch.einsum("ncq,nck->nqk", q, k / CHANNELS**0.5).softmax(2)


class Attention(nn.Module):
    def __init__(self, weights):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.weights = nn.Conv1d(CHANNELS, 3 * CHANNELS, 1), weights

    def forward(self, x, t):
        q, k, v = self.qkv(x).chunk(3, 1)
        return x + torch.einsum("nqk,nck->ncq", self.weights(q, k), v).tanh()


def models():
    return [
        hosm.ScoreModel(Attention(weights), hosm.VPSchedule())
        for weights in (plain_weights, AttentionOp.apply)
    ]


def generator():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("enable_grad", [False, True])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_ode_nll_loops_over_probes_where_vmap_cannot(options, enable_grad):
    options = {"steps": 6, "tolerance": 1e-2, "enable_grad": enable_grad} | options
    x = torch.randn(2, CHANNELS, 4)
    plain, theirs = (
        hosm.ode_nll(model, x, generator=generator(), **options) for model in models()
    )
    torch.testing.assert_close(theirs.nll, plain.nll, rtol=0, atol=1e-9)
    assert torch.equal(theirs.nfe, plain.nfe)


def test_the_gradient_of_the_likelihood_goes_through_the_loop():
    x = torch.randn(2, CHANNELS, 4)
    gradients = []
    for model in models():
        options = {"steps": 4, "probes": 2, "enable_grad": True}
        nll = hosm.ode_nll(model, x, generator=generator(), **options).nll.sum()
        gradients.append(torch.autograd.grad(nll, list(model.network.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:derivative='auto'")
@pytest.mark.parametrize("options", [{}, {"derivative": "reverse"}, {"probes": 2}], ids=str)
@pytest.mark.parametrize("loss", [hosm.second_order_dsm, hosm.third_order_dsm])
def test_orders_two_and_three_are_right_in_reverse(loss, options):
    x0 = torch.randn(2, CHANNELS, 4)
    found = []
    for model in models():
        value = loss(model, x0, generator=generator(), **options)
        found.append((value, *torch.autograd.grad(value, list(model.network.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_the_laplacian_needs_a_plain_one():
    x0 = torch.randn(2, CHANNELS, 4)
    plain, theirs = models()
    assert bool(torch.isfinite(hosm.third_order_dsm(plain, x0, third="laplacian")))
    with pytest.raises(hosm.DerivativeError, match=r"custom autograd\.Function"):
        hosm.third_order_dsm(theirs, x0, third="laplacian", derivative="taylor")
    with pytest.warns(UserWarning, match="third='exact' that of 'laplacian'"):
        got = hosm.third_order_dsm(theirs, x0, third="laplacian", generator=generator())
    assert bool(torch.isfinite(got))
