"""The four blocks of README's quick start, on networks that stand in for the reader's.

Each has been trained like the projects it stands for. The loss of a block is compared with that
project's own, written down here without the library.
"""

import ast
import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.diagnostics.test_wrapping import LINEAR, trained

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(
    zip(
        ("vp", "ddpm", "diffusers", "edm"),
        re.findall(r"```python\n(.*?)```", README, re.S),
        strict=True,
    )
)
SIGMA_DATA = 0.5
# α and σ at the time that a network is given.
BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


class Recorded(nn.Module):
    """A network that remembers how it was called last."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        self.x, self.t = x.detach(), t.detach()
        self.returned = self.network(x, t)
        return self.returned


class ByKeyword(Recorded):
    """As the networks of diffusers."""

    def forward(self, sample, timestep):
        return SimpleNamespace(sample=super().forward(sample, timestep))


def stand_in(name, wrap=Recorded):
    network, data = trained(name)
    return wrap(copy.deepcopy(network).double()), data[:512].double()


def names(block):
    """What a block is given, and the network that records its calls."""
    table = {"alphas_cumprod": BAR, "config": SimpleNamespace(prediction_type="epsilon")}
    if block == "edm":
        net, x0 = stand_in("edm")
        net.sigma_min, net.sigma_max, net.sigma_data = 0.0, math.inf, SIGMA_DATA
        sigma = (1.2 * torch.randn(len(x0), dtype=torch.float64) - 1.2).exp()
        return {"net": net, "x0": x0, "sigma": sigma}, net
    if block == "diffusers":
        unet, x0 = stand_in("table", ByKeyword)
        return {"unet": unet, "scheduler": SimpleNamespace(**table), "x0": x0}, unet
    network, x0 = stand_in({"vp": "vp", "ddpm": "table"}[block])
    return {"network": network, "x0": x0, "alphas_cumprod": BAR}, network


def trainers_loss(block, network, x0):
    """That of score_sde, DDPM, diffusers or EDM, at the times and noise of the recorded call."""
    t = network.t.reshape(-1, *[1] * (x0.ndim - 1))
    if block == "edm":
        weight = (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2
        return (weight * (network.returned - x0) ** 2).mean()
    of_vp = torch.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)  # β from 0.1 to 20
    alpha = of_vp if block == "vp" else BAR.sqrt()[t.long()]
    noise = (network.x - alpha * x0) / (1 - alpha**2).sqrt()
    return ((network.returned - noise) ** 2).mean()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_the_quick_start(block):
    torch.manual_seed(0)
    namespace, network = names(block)
    x0, found = namespace["x0"], {}
    for statement in ast.parse(BLOCKS[block]).body:
        exec(compile(ast.Module([statement], []), "README.md", "exec"), namespace)
        if "loss" in namespace and not found:
            own = trainers_loss(block, network, x0)
            found = {"ours": namespace["loss"].detach(), "own": own.detach()}
    torch.testing.assert_close(found["ours"], found["own"], rtol=1e-6, atol=0)
    assert namespace["report"].ok, namespace["report"]


@pytest.mark.parametrize(
    ("given", "as_if"),
    [
        ("table", {"schedule": hosm.VPSchedule()}),  # the index taken for t
        ("vp", {"schedule": LINEAR}),
        ("edm", {"schedule": hosm.VPSchedule(), "prediction": "sample"}),
    ],
)
def test_a_network_in_the_block_of_another(given, as_if):
    network, x0 = stand_in(given)
    report = hosm.check_wrapping(hosm.ScoreModel(network, **as_if), x0)
    assert not report.ok
    assert report.best is not None
