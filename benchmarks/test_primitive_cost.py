"""What the safe primitives cost: a first-order step with them over one without, in one run.

python -m pytest benchmarks/test_primitive_cost.py
"""

from functools import partial

import pytest
import torch

import hosm_losses as hosm
from benchmarks.networks import NETWORKS
from benchmarks.timing import ratios
from hosm_losses.model import noise_field


@pytest.mark.parametrize("name", NETWORKS)
def test_first_order_step_with_primitives(benchmark, choose, name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network, x = make(), torch.randn(choose(2, *shape[:1], *shape[:1]), *shape[1:])
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    t = torch.full((len(x),), 0.5)

    def step(primitives):
        network.zero_grad()
        noise_field(model, t, primitives=primitives)(x).square().mean().backward()

    steps = {str(primitives): partial(step, primitives) for primitives in (False, True)}
    for warm in steps.values():
        warm()
    rounds = choose(1, 7, 31)
    found = benchmark.pedantic(ratios, (steps, "False", rounds), rounds=1)
    benchmark.extra_info["ratio"] = found["True"]
