"""What the safe primitives cost: a first-order step with them over one without, in one run.

The two are timed in turns, in processor time, so that another load on the machine hits both. The
ratio of the medians is in the benchmark's extra_info and printed at the end.
"""

import statistics
import time

import pytest
import torch

import hosm_losses as hosm
from benchmarks.networks import NETWORKS

ROUNDS = 15


@pytest.mark.parametrize("name", NETWORKS)
def test_first_order_step_with_primitives(benchmark, name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network, x = make(), torch.randn(shape)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    t = torch.full((len(x),), 0.5)

    def step(primitives):
        network.zero_grad()
        start = time.process_time()
        model.field(t, primitives=primitives)(x).square().mean().backward()
        return time.process_time() - start

    def rounds():
        for primitives in (False, True):
            step(primitives)
        pairs = [(step(False), step(True)) for _ in range(ROUNDS)]
        without, with_them = (statistics.median(column) for column in zip(*pairs, strict=True))
        return with_them / without

    ratio = benchmark.pedantic(rounds, rounds=1)
    benchmark.extra_info["ratio"] = ratio
    print(f"\n{name}: {ratio:.2f} times a first-order step without primitives")
