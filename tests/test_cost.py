"""What a training step costs, counted: matrix and convolution FLOPs, and network calls."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.oracles import CountFlops, OfX


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


def ratio(order, x0=None, **options):
    """FLOPs of a step over those of order one, and the batches the network was called with."""
    network, x0 = Residual(), torch.randn(2, 1, 6, 6) if x0 is None else x0
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    first = step(lambda: hosm.first_order_dsm(model, x0))
    function = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}[order]
    network.calls.clear()
    higher = step(lambda: function(model, x0, **options))
    return higher / first, network.calls


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 18.6), ({"third": "laplacian"}, 10.4)],
    ids=str,
)
def test_exact_probes_share_the_value_and_one_pass_back(options, most):
    """Eight dimensions: 6 (1 + 8) evaluations of 3, and 3 (2 + 8)."""
    layers = [nn.Linear(8, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 8)]
    network, x0 = nn.Sequential(*layers), torch.randn(4, 8)
    model = hosm.ScoreModel(OfX(network), hosm.VPSchedule())
    first = step(lambda: hosm.first_order_dsm(model, x0))
    assert step(lambda: hosm.third_order_dsm(model, x0, probes="exact", **options)) / first < most


@pytest.mark.parametrize(
    ("order", "options", "evaluations"),
    [
        (2, {}, 12),
        (2, {"weights": (1, 0, 1)}, 9),
        (3, {}, 25),
        (2, {"derivative": "taylor"}, 18),
        (3, {"derivative": "taylor"}, 40),
        (3, {"third": "laplacian"}, 42),
    ],
)
def test_two_paired_probes_share_the_value(order, options, evaluations):
    """Where one of order one is 3: see `derivatives.products`."""
    layers = [nn.Linear(8, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 8)]
    network, x0 = nn.Sequential(*layers), torch.randn(4, 8)
    model = hosm.ScoreModel(OfX(network), hosm.VPSchedule())
    first = step(lambda: hosm.first_order_dsm(model, x0))
    function = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}[order]
    found = step(lambda: function(model, x0, estimator="paired", **options))
    assert found / first == pytest.approx(evaluations / 3, rel=0.03)


def test_stein_costs_what_order_two_costs_with_two_probes():
    network, x0 = Residual(), torch.randn(2, 1, 6, 6)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    found = step(lambda: hosm.stein_dsm(model, x0))
    assert found == step(lambda: hosm.second_order_dsm(model, x0, probes=2))
    assert network.calls == [2, 2]


@pytest.mark.parametrize(
    ("order", "options", "most"),
    [
        (2, {}, 2.05),
        (3, {}, 4.10),
        (3, {"third": "laplacian"}, 3.10),
        (2, {"derivative": "reverse"}, 2.7),
        (3, {"derivative": "reverse"}, 4.24),
    ],
)
def test_flops_of_a_training_step(order, options, most):
    found, calls = ratio(order, **options)
    assert found < most
    assert calls == [2]


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize(
    ("order", "options", "most"),
    [
        (2, {}, 1.02),
        (3, {"third": "laplacian"}, 1.02),
        (3, {}, 1.3),  # which folds the probes into the batch, each with a value of its own
        (2, {"derivative": "reverse"}, 1.02),
    ],
)
def test_probes_share_the_value(order, options, most, count):
    one, _ = ratio(order, **options)
    several, calls = ratio(order, probes=count, **options)
    assert several < most * (1 + count * (one - 1))
    folded = order == 3 and not options
    assert calls == [2 * count if folded else 2]


def test_a_quarter_of_the_batch():
    found, calls = ratio(3, torch.randn(8, 1, 6, 6), fraction=0.25)
    assert found < 1.8
    assert calls == [2, 6]


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
