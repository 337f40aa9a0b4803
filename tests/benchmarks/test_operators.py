"""How many operators a step of a small network calls, where calls are most of the time.

Counts of one PyTorch differ a little from those of another, so each has a twentieth to spare.
"""

import pytest
import torch
from benchmarks.steps import NETWORKS

import hosm_losses as hosm
from tests.oracles import CountCalls

MOST = {
    "mlp, small": {"one": 108, "two": 275, "three": 575, "laplacian": 386, "fraction": 679},
    "dit, small": {"one": 692, "two": 1809, "three": 4354, "laplacian": 2607, "fraction": 5461},
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
