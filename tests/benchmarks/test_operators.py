"""How many operators a step of a small network calls, where calls are most of the time.

Counts of one PyTorch differ a little from those of another, so each has a twentieth to spare.
"""

import pytest
import torch
from benchmarks.steps import NETWORKS

import hosm_losses as hosm
from tests.oracles import CountCalls

MOST = {
    "mlp, small": {"one": 112, "two": 303, "three": 627, "laplacian": 432, "fraction": 733},
    "dit, small": {"one": 696, "two": 1920, "three": 4600, "laplacian": 2740, "fraction": 5782},
}
LOSSES = {
    "one": hosm.first_order_dsm,
    "two": hosm.second_order_dsm,
    "three": hosm.third_order_dsm,
    "laplacian": lambda *given: hosm.third_order_dsm(*given, third="laplacian"),
    "fraction": lambda *given: hosm.third_order_dsm(*given, fraction=0.25),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", MOST)
def test_operator_calls_of_a_step_stay_cut(network, loss):
    make, shape = NETWORKS[network]
    model, x0 = hosm.ScoreModel(make(), hosm.VPSchedule()), torch.randn(shape)
    LOSSES[loss](model, x0).backward()  # what is found out once
    with CountCalls() as calls:
        LOSSES[loss](model, x0).backward()
    assert calls.number <= MOST[network][loss]
