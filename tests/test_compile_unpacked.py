"""Rows that Python takes from a tensor in a compiled network, as in `q, k, v = qkv`."""

from functools import partial

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.versions import compiles_higher_orders

pytestmark = [compiles_higher_orders, pytest.mark.filterwarnings("ignore")]


def unpacked(qkv):
    q, k, v = qkv
    return torch.tanh(q) * k + v


def starred(qkv):
    first, *others = qkv
    return torch.cat([first, others[0] + others[1]], -1)[..., 2:6].sin()


def by_call(qkv):
    return (lambda q, k, v: q * torch.sigmoid(k) + v)(*qkv)


def iterated(qkv):
    total = 0
    for row in qkv:
        total = total * 0.5 + row.exp()
    return total


def listed(qkv):
    rows = [row.softmax(-1) for row in qkv]
    return torch.stack(rows).prod(0) + list(qkv)[1]


def of_rows(qkv):
    """Rows of rows, and a row that nothing is done to."""
    (a, b), _, c = qkv.unflatten(1, (2, -1))
    return torch.cat([a * b, c[0]]).square()


def returned(qkv):
    return next(iter(qkv))


def asked(qkv):
    q, _, v = qkv
    assert tuple(q.shape) == tuple(q.size()) == (*q.shape[:-1], q.size(-1))
    assert q.dim() == q.ndim == v.ndim
    return q.reshape(len(q), -1).cos() * v.new_ones(v.shape) * v.numel()


class Heads(nn.Module):
    """What a function makes of three projections of x, stacked along the first axis."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.function = nn.Linear(4, 12), function

    def forward(self, x, t):
        qkv = self.project(x * (1 + t[:, None])).unflatten(-1, (3, 4)).movedim(-2, 0)
        return self.function(qkv)


LOSSES = {
    "order two": hosm.SecondOrderDSM,
    "order three": hosm.ThirdOrderDSM,
    "laplacian": lambda model: hosm.ThirdOrderDSM(model, third="laplacian"),
    "exact": lambda model: hosm.ThirdOrderDSM(model, probes="exact"),
    "paired": lambda model: hosm.ThirdOrderDSM(model, estimator="paired"),
}


def eager(network, loss=hosm.ThirdOrderDSM, through=lambda module: module):
    """The loss and its gradients."""
    module = loss(hosm.ScoreModel(network, hosm.VPSchedule()))
    torch.manual_seed(1)
    x0 = torch.randn(4, 4)
    inputs = {"t": torch.rand(4) * 0.8 + 0.1, "noise": torch.randn(4, 4)}
    if loss is not LOSSES["exact"]:
        inputs["probe"] = torch.randn(2, 4, 4)
    value = through(module)(x0, **inputs)
    return value, *torch.autograd.grad(value, list(network.parameters()))


def compiled(network, loss=hosm.ThirdOrderDSM):
    """The same in one graph."""
    torch._dynamo.reset()
    return eager(network, loss, partial(torch.compile, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize(
    "function", [unpacked, starred, by_call, iterated, listed, of_rows, returned, asked]
)
def test_every_way_of_taking_rows_is_one_graph(function):
    network = Heads(function)
    torch.testing.assert_close(compiled(network), eager(network), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_with_every_kind_of_loss(loss):
    network, loss = Heads(unpacked), LOSSES[loss]
    torch.testing.assert_close(
        compiled(network, loss), eager(network, loss), rtol=1e-9, atol=1e-12
    )


def of_a_row(qkv):
    q, k, v = qkv
    q.mul_(2)
    return q * k + v


def of_a_view_of_a_row(qkv):
    q, k, v = qkv
    q[:, :2].add_(k[:, :2])
    return q * k + v


def of_the_whole(qkv):
    q, k, v = qkv
    qkv.mul_(2)
    return q * k + v


def of_what_it_is_a_view_of(qkv):
    q, k, v = qkv[:, :2]
    qkv.mul_(2)
    return torch.cat([q * k, v])


def of_a_view_of_the_whole(qkv):
    q, k, v = qkv
    qkv[:, :, :2].mul_(2)
    return q * k + v


def of_another(qkv):
    hidden = nn.SiLU(inplace=True)(qkv.flatten(1) * 2)
    hidden += 1
    return unpacked(hidden.unflatten(1, (-1, 4)).sin())


CHANGES = (of_a_row, of_a_view_of_a_row, of_the_whole, of_what_it_is_a_view_of)


@pytest.mark.parametrize("change", [*CHANGES, of_a_view_of_the_whole])
def test_changes_in_place_of_what_was_unpacked_are_refused(change):
    """In eager mode PyTorch refuses them too, of what has a gradient."""
    loss = partial(hosm.ThirdOrderDSM, derivative="taylor")
    refused = "torch.compile unpacked|torch.compile unpacks"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=refused):
        compiled(Heads(change), loss)


def test_changes_in_place_of_others_are_not():
    network = Heads(of_another)
    torch.testing.assert_close(compiled(network), eager(network), rtol=1e-9, atol=1e-12)


def by_vmap(qkv):
    q, k, v = qkv
    return q * torch.func.vmap(lambda row: row.square().sum())(k)[:, None] + v


def test_what_takes_the_data_past_the_engine_is_nan():
    """vmap computes with derivatives as if they were elements: another number, and in silence."""
    network = Heads(by_vmap)
    assert eager(network)[0].isfinite()
    assert compiled(network)[0].isnan()
