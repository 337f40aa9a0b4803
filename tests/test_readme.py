"""README's blocks in an empty script, and its wrappings on networks that stand in for others.

The networks have been trained like the projects they stand for, or are exact. The loss of a
wrapping is compared with that project's own, written down here without the library.
"""

import copy
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.diagnostics.test_wrapping import trained

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S)
WRAPPINGS = dict(re.findall(r"^\| ([^|`]+) \| `([^`]+)` \|$", README, re.M))
SIGMA_DATA = 0.5
# α and σ at the time that a network is given.
BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def test_every_block_runs_alone_and_prints_what_is_shown():
    assert len(BLOCKS) == README.count("```python") > 0
    for block, shown in BLOCKS:
        command = [sys.executable, "-c", block]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        assert printed == shown


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_relative_links_lead_somewhere(file):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / file).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / file).parent.joinpath(link).exists()] == []


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


class Velocity(nn.Module):
    """Exact for data from N(0, 1), which is at t = 1."""

    def forward(self, x, t):
        t = t[:, None]
        return (2 * t - 1) * x / (t**2 + (1 - t) ** 2)


def stand_in(name, wrap=Recorded):
    network, data = trained(name)
    return wrap(copy.deepcopy(network).double()), data[:512].double()


def names(wrapping):
    """The names of a wrapping, and the network that records its calls."""
    table = {"alphas_cumprod": BAR, "config": SimpleNamespace(prediction_type="epsilon")}
    if wrapping == "EDM":
        net, x0 = stand_in("edm")
        net.sigma_min, net.sigma_max, net.sigma_data = 0.0, math.inf, SIGMA_DATA
        return {"net": net, "x0": x0}, net
    if wrapping == "diffusers":
        unet, x0 = stand_in("table", ByKeyword)
        return {"unet": unet, "scheduler": SimpleNamespace(**table), "x0": x0}, unet
    if "flow" in wrapping:
        network, x0 = Recorded(Velocity()), torch.randn(512, 2, dtype=torch.float64)
    else:
        network, x0 = stand_in("table" if "DDPM" in wrapping else "vp")
    return {"network": network, "x0": x0, "alphas_cumprod": BAR}, network


def trainers_loss(wrapping, network, x0):
    """That of score_sde, DDPM, diffusers, EDM or torchcfm, at the times and noise of the call."""
    t = network.t.reshape(-1, *[1] * (x0.ndim - 1))
    if wrapping == "EDM":
        weight = (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2
        return (weight * (network.returned - x0) ** 2).mean()
    if "flow" in wrapping:
        noise = (network.x - t * x0) / (1 - t)
        return ((network.returned - (x0 - noise)) ** 2).mean()
    of_vp = torch.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)  # β from 0.1 to 20
    alpha = of_vp if "VP" in wrapping else BAR.sqrt()[t.long()]
    noise = (network.x - alpha * x0) / (1 - alpha**2).sqrt()
    return ((network.returned - noise) ** 2).mean()


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapping_has_the_loss_of_its_trainer(wrapping):
    torch.manual_seed(0)
    namespace, network = names(wrapping)
    x0, options = namespace["x0"], {}
    model = eval(WRAPPINGS[wrapping], vars(hosm) | namespace)
    if wrapping == "EDM":
        sigma = (1.2 * torch.randn(len(x0), dtype=torch.float64) - 1.2).exp()
        options = {"t": sigma, "weighting": hosm.EDMWeighting(SIGMA_DATA)}
    elif "flow" in wrapping:
        options = {"weighting": "native"}
    ours = hosm.first_order_dsm(model, x0, **options)
    torch.testing.assert_close(ours, trainers_loss(wrapping, network, x0), rtol=1e-6, atol=0)
    report = hosm.check_wrapping(model, x0)
    assert report.ok, report
