"""What the safe primitives cost: a first-order step with them over one without, in one run.

python -m pytest benchmarks/test_primitive_cost.py
"""

from functools import partial

import pytest
import torch

from benchmarks.networks import NETWORKS
from benchmarks.steps import model_of
from benchmarks.timing import ratios
from hosm_losses.model import noise_field


@pytest.mark.parametrize("name", NETWORKS)
def test_first_order_step_with_primitives(benchmark, choose, name):
    model, (batch, *shape) = model_of(name), NETWORKS[name][1]
    x = torch.randn(choose(2, batch, batch), *shape)
    t = torch.full((len(x),), 0.5)

    def step(primitives):
        model.zero_grad()
        noise_field(model, t, primitives=primitives)(x).square().mean().backward()

    steps = {str(primitives): partial(step, primitives) for primitives in (False, True)}
    for warm in steps.values():
        warm()
    given = (steps, "False", choose(1, 7, 31))
    benchmark.extra_info["ratio"] = benchmark.pedantic(ratios, given, rounds=1)["True"]
