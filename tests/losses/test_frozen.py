"""A frozen network: the same number, and no gradient but of what is not frozen.

In `test_random_options` a part is frozen, beside data and conditions that are not.
"""

import pytest
import torch
from torch import nn

import hosm_losses as hosm

CHOICES = {
    "one": {},
    "two": {},
    "three": {},
    "three, paired": {"probes": hosm.Paired()},
    "exact": {"probes": "exact"},
    "three, reverse": {"engine": "reverse"},
    "fraction": {"fraction": 0.5},
    "two, reverse": {"engine": "reverse"},
    "two, paired": {"probes": hosm.Paired()},
    "three, paired, taylor": {"probes": hosm.Paired(), "engine": "taylor"},
    "three, paired, reverse": {"probes": hosm.Paired(4), "engine": "reverse"},
    "three, paired, fraction": {"probes": hosm.Paired(), "fraction": 0.5},
    "exact, reverse": {"probes": "exact", "engine": "reverse"},
}
LOSSES = {"one": hosm.first_order_dsm, "two": hosm.second_order_dsm}


class Network(nn.Module):
    """With a norm, which is a function of its own, and a place for what is not registered."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 3))
        self.adapter = nn.Linear(3, 3)
        self.unregistered = [torch.zeros(())]

    def forward(self, x, t, condition):
        h = self.layers(torch.cat([x, t[:, None]], 1))
        return h + self.adapter(x * condition[:, None]).tanh() + self.unregistered[0] * x.sin()


def loss_of(name, network):
    torch.manual_seed(1)
    loss = LOSSES.get(name.partition(",")[0], hosm.third_order_dsm)
    inputs = {"t": torch.rand(4), "noise": torch.randn(4, 3), **CHOICES[name]}
    inputs |= {"model_kwargs": {"condition": torch.randn(4)}, "generator": torch.Generator()}
    inputs |= {} if name == "one" else {"weights": (1, 1, 1, 1)[: 3 if "two" in name else 4]}
    return loss(hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(4, 3), **inputs)


def frozen():
    torch.manual_seed(0)
    return Network().requires_grad_(False)


@pytest.mark.parametrize("name", CHOICES)
def test_it_is_the_same_number_and_trains_nothing(name):
    """So that backward raises, as it does of a loss of order one."""
    network = frozen()
    loss = loss_of(name, network)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    torch.testing.assert_close(loss, loss_of(name, network.requires_grad_()))


@pytest.mark.parametrize("name", ["one", "two", "three, paired", "three, reverse"])
def test_an_adapter_is_trained_and_so_is_what_no_module_knows(name):
    network = frozen()
    network.adapter.requires_grad_()
    network.unregistered[0].requires_grad_()
    both = [network.adapter.weight, network.unregistered[0]]
    found = torch.autograd.grad(loss_of(name, network), both)
    network.adapter.requires_grad_(False)
    alone = torch.autograd.grad(loss_of(name, network), network.unregistered[0])
    assert all(bool(each.any()) for each in (*found, *alone))
    torch.testing.assert_close(found[1], alone[0])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 3), {}),
        ((2, 4, 3), {}),
        ((4, 3), {"engine": "reverse"}),
        ((2, 4, 3), {"probes": hosm.Paired()}),
        ((2, 4, 3), {"probes": hosm.Paired(), "engine": "taylor"}),
    ],
)
def test_a_probe_that_requires_a_gradient_has_one(shape, options):
    network = frozen()
    probe = torch.randn(shape).requires_grad_()
    given = {"probe": probe, "model_kwargs": {"condition": torch.ones(4)}} | options
    loss = hosm.third_order_dsm(
        hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(4, 3), **given
    )
    assert bool(torch.autograd.grad(loss, probe)[0].any())
