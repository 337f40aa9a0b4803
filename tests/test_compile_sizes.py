"""Compiled losses whose batches, weights or seeds change from call to call."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.oracles import Function
from tests.versions import compiles_higher_orders

pytestmark = [compiles_higher_orders, pytest.mark.filterwarnings("ignore")]
LOSSES = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}


class Network(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *layers, nn.Linear(8, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))


def compiled(loss, **options):
    torch._dynamo.reset()
    return torch.compile(loss, backend="aot_eager", fullgraph=True, **options)


def built(order, *layers, **options):
    return LOSSES[order](hosm.ScoreModel(Network(*layers), hosm.VPSchedule()), **options)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_last_batch_of_an_epoch(order, dynamic):
    """Nothing is given: times, noise and probes are drawn in the graph."""
    step = compiled(built(order), dynamic=dynamic)
    for batch in (8, 8, 5, 7):
        assert torch.isfinite(step(torch.randn(batch, 2)))


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_in_batches_of_two_sizes(inplace):
    """It has a rule, also where torch.compile gives all its arguments in their places."""
    step = compiled(built(2, nn.Dropout(0.5, inplace)))
    for batch in (8, 5):
        step(torch.randn(batch, 2)).backward()


def gradients(loss, module):
    """The loss, and its gradients."""
    return loss, *torch.autograd.grad(loss, list(module.parameters()))


def assert_same_in_every_batch(module, step, sizes=(4, 3)):
    """The compiled loss and its gradients are those of eager mode, with one probe drawn for each."""
    for batch in sizes:
        x0, noise = torch.randn(2, batch, 2).unbind()
        given = {"t": torch.rand(batch) * 0.8 + 0.1, "noise": noise}
        found = []
        for each in (step, module):
            torch.manual_seed(0)
            found.append(gradients(each(x0, **given), module))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "options"),
    [(2, {}), (2, {"probes": 2}), (3, {}), (3, {"third": "laplacian"})],
    ids=str,
)
def test_an_operator_without_a_rule_in_batches_of_two_sizes(order, options):
    module = built(order, Function(lambda x: x.sort(1).values * x), **options)
    assert_same_in_every_batch(module, compiled(module, dynamic=True))


@pytest.mark.parametrize("order", [2, 3])
def test_a_network_for_reverse_mode_in_batches_of_two_sizes(order):
    """The Taylor engine refuses complex numbers: the loss runs in eager mode."""
    module = built(order, Function(lambda x: torch.fft.irfft(torch.fft.rfft(x).square(), n=8)))
    torch._dynamo.reset()
    step = torch.compile(module, backend="aot_eager", dynamic=True)
    assert_same_in_every_batch(module, step)


def test_weights_that_follow_a_rule():
    loss = built(2)
    step = compiled(loss)
    x0, t = torch.randn(8, 2), torch.full((8,), 0.5)
    given = {"t": t, "noise": torch.randn(8, 2), "probe": torch.randn(8, 2)}
    for count in range(4):
        weights = (1.0, count / 10, count / 20)
        expected = loss(x0, weights=weights, **given)
        torch.testing.assert_close(step(x0, weights=weights, **given), expected)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_terms_beside_the_loss(order):
    loss, x0 = built(order), torch.randn(8, 2)
    given = {"t": torch.full((8,), 0.5), "noise": torch.randn(8, 2)}
    if order > 1:
        given["probe"] = torch.randn(8, 2)
    value, terms = compiled(loss)(x0, return_terms=True, **given)
    expected, others = loss(x0, return_terms=True, **given)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(terms[:order], others[:order])
    assert torch.equal(terms.t, given["t"])
