"""What a training step of order two or three costs in time: over one of order one, in one run."""

from functools import partial

import pytest
import torch

import hosm_losses as hosm
from benchmarks.networks import NETWORKS
from benchmarks.timing import ratios

ROUNDS = 5
ORDERS = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_step_over_first_order(benchmark, name, probes):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network, x0 = make(), torch.randn(shape)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    losses = {"order 1": lambda: hosm.first_order_dsm(model, x0)}
    for order, function in ORDERS.items():
        for engine in ("reverse", "forward"):
            losses[f"order {order}, {engine}"] = lambda function=function, engine=engine: function(
                model, x0, derivative=engine, probes=probes
            )

    def step(loss):
        network.zero_grad()
        loss().backward()

    steps = {key: partial(step, loss) for key, loss in losses.items()}
    found = benchmark.pedantic(ratios, (steps, "order 1", ROUNDS), rounds=1)
    benchmark.extra_info["ratios"] = found
    for key, ratio in found.items():
        print(f"\n{name}, {probes} probes, {key}: {ratio:.2f}", end="")
