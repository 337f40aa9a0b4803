"""What the safe primitives cost: a first-order step with them over one without, in one run."""

from functools import partial

import pytest
import torch

import hosm_losses as hosm
from benchmarks.networks import NETWORKS
from benchmarks.timing import ratios

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
        model.field(t, primitives=primitives)(x).square().mean().backward()

    steps = {str(primitives): partial(step, primitives) for primitives in (False, True)}
    for warm in steps.values():
        warm()
    ratio = benchmark.pedantic(ratios, (steps, "False", ROUNDS), rounds=1)["True"]
    benchmark.extra_info["ratio"] = ratio
    print(f"\n{name}: {ratio:.2f} times a first-order step without primitives")
