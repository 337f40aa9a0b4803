"""What a training step costs, counted: matrix and convolution FLOPs, and network calls."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.oracles import CountFlops


class Residual(nn.Module):
    """Blocks of group norm, SiLU and convolution: almost all cost is in the middle."""

    def __init__(self, width=16):
        super().__init__()
        self.inner = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(8)
        )
        self.outer = nn.Conv2d(width, 1, 3, padding=1)
        self.calls = []

    def forward(self, x, t):
        self.calls.append(len(x))
        hidden = self.inner(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.outer(hidden)


def step(loss):
    with CountFlops() as count:
        loss().backward()
    return count.total


@pytest.mark.parametrize(
    ("order", "engine", "probes", "most"),
    [
        (2, "forward", 1, 2.67),
        (2, "reverse", 1, 2.67),
        (3, "forward", 1, 5.67),
        (3, "reverse", 1, 4.2),
        # K probes share the value at order two, and at order three in the forward engine.
        (2, "forward", 4, 5.67),
        (2, "reverse", 4, 6.7),
        (3, "forward", 4, 17.67),
        (3, "reverse", 4, 4 * 4.2),
    ],
)
def test_flops_of_a_training_step(order, engine, probes, most):
    network, x0 = Residual(), torch.randn(2, 1, 6, 6)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    first = step(lambda: hosm.first_order_dsm(model, x0))
    function = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}[order]
    network.calls.clear()
    higher = step(lambda: function(model, x0, derivative=engine, probes=probes))
    assert higher / first < 1.01 * most
    folded = engine == "reverse" and order == 3
    assert network.calls == [2 * probes if folded else 2]


def test_a_fraction_costs_its_part():
    network, x0 = Residual(), torch.randn(8, 1, 6, 6)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    first = step(lambda: hosm.first_order_dsm(model, x0))
    whole = step(lambda: hosm.third_order_dsm(model, x0))
    quarter = step(lambda: hosm.third_order_dsm(model, x0, fraction=0.25))
    assert quarter == pytest.approx(first + 0.25 * (whole - first), rel=1e-9)


def test_a_node_of_the_likelihood_is_one_call_and_a_pass_back():
    network, x = Residual(), torch.randn(2, 1, 6, 6)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    with torch.no_grad(), CountFlops() as forward:
        network(x, torch.ones(2))
    with CountFlops() as count:
        hosm.ode_nll(model, x, steps=20)
    nodes, stages = 21, 9
    assert count.total == pytest.approx((2 * nodes + stages) * forward.total, rel=0.01)
