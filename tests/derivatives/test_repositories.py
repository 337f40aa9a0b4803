"""Networks like those of repositories people train: every engine, without a warning."""

import warnings

import pytest
import torch
from benchmarks.repositories import EDM, Guided, NCSNpp, PolicyUNet

from tests.cases import assert_same, loss_and_gradients

NETWORKS = {
    "ncsnpp": lambda: NCSNpp(8),
    "edm": lambda: EDM(8),
    "guided": lambda: Guided(8).eval(),
    "guided, checkpoints": lambda: Guided(8, use_checkpoint=True).eval(),
    "diffusion policy": lambda: PolicyUNet(3, (8, 16)),
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_default_engine_has_the_gradients_of_reverse_mode(name, order):
    found, shape = [], (2, 3, 8) if name == "diffusion policy" else (2, 3, 8, 8)
    for engine in ("auto", "reverse"):
        torch.manual_seed(0)
        network = NETWORKS[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as of an engine that costs more
            found.append(loss_and_gradients(network, shape, order, engine=engine))
    assert_same(*found)
