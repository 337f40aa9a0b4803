"""What a training step of order two or three costs in time: over one of order one, in one run.

All are timed in turns, in processor time, so that another load on the machine hits them alike.
"""

import statistics
import time

import pytest
import torch

import hosm_losses as hosm
from benchmarks.networks import NETWORKS

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

    def seconds(loss):
        network.zero_grad()
        start = time.process_time()
        loss().backward()
        return time.process_time() - start

    def rounds():
        times = [{key: seconds(loss) for key, loss in losses.items()} for _ in range(ROUNDS)]
        medians = {key: statistics.median(row[key] for row in times) for key in losses}
        return {key: value / medians["order 1"] for key, value in medians.items()}

    ratios = benchmark.pedantic(rounds, rounds=1)
    benchmark.extra_info["ratios"] = ratios
    for key, ratio in ratios.items():
        print(f"\n{name}, {probes} probes, {key}: {ratio:.2f}", end="")
