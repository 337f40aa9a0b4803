"""A frozen network: the same number, and the gradients of what is not frozen beside it."""

import itertools

import pytest
import torch
from torch import nn

import hosm_losses as hosm

CHOICES = {
    "one": {},
    "two": {},
    "three": {},
    "three, paired": {"probes": hosm.Paired()},
    "laplacian": {"third": "laplacian"},
    "exact": {"probes": "exact"},
    "three, reverse": {"engine": "reverse"},
    "fraction": {"fraction": 0.5},
    "two, reverse": {"engine": "reverse"},
    "two, paired": {"probes": hosm.Paired()},
    "three, paired, taylor": {"probes": hosm.Paired(), "engine": "taylor"},
    "three, paired, laplacian": {"probes": hosm.Paired(), "third": "laplacian"},
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


def loss_of(name, network, **given):
    """The loss, and the tensors that went into it, by name."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x0": torch.randn(4, 3, generator=generator),
        "noise": torch.randn(4, 3, generator=generator),
        "t": torch.rand(4, generator=generator),
        "condition": torch.randn(4, generator=generator),
        "weights": torch.ones(()),
    }
    tensors |= {side: tensors[side].requires_grad_() for side in given}
    loss = LOSSES.get(name.partition(",")[0], hosm.third_order_dsm)
    inputs = {key: tensors[key] for key in ("noise", "t")}
    inputs["model_kwargs"] = {"condition": tensors["condition"]}
    if name != "one":
        count = 3 if loss is hosm.second_order_dsm else 4
        inputs["weights"] = [tensors["weights"]] * count
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    return loss(model, tensors["x0"], generator=generator, **inputs, **CHOICES[name]), tensors


def frozen():
    torch.manual_seed(0)
    return Network().requires_grad_(False)


@pytest.mark.parametrize("name", CHOICES)
def test_it_is_the_same_number_and_trains_nothing(name):
    """So that backward raises, as it does of a loss of order one."""
    network = frozen()
    loss, _ = loss_of(name, network)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    trained, _ = loss_of(name, network.requires_grad_())
    torch.testing.assert_close(loss, trained)


@pytest.mark.parametrize("name", CHOICES)
def test_a_part_that_is_not_frozen_has_the_same_gradient(name):
    network = frozen().requires_grad_()
    parameters = dict(network.named_parameters())
    loss, _ = loss_of(name, network)
    expected = torch.autograd.grad(loss, [*parameters.values()])
    for part, gradient in zip(parameters.values(), expected, strict=True):
        network.requires_grad_(False)
        part.requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(loss_of(name, network)[0], part)[0], gradient
        )


@pytest.mark.parametrize(
    ("side", "name"),
    [
        ("x0", "exact"),
        ("noise", "three, paired"),
        ("t", "laplacian"),
        ("condition", "fraction"),
        ("weights", "three, reverse"),
        *itertools.product(("x0", "noise", "t", "condition", "weights"), ("two", "three")),
    ],
)
def test_what_requires_a_gradient_beside_it_has_the_same(side, name):
    network, found = frozen(), []
    for train in (False, True):
        loss, tensors = loss_of(name, network.requires_grad_(train), **{side: True})
        assert loss.requires_grad
        found.append(torch.autograd.grad(loss, tensors[side])[0])
    assert bool(found[0].any())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["one", "two", "three, paired", "laplacian", "three, reverse"])
def test_an_adapter_is_trained_and_so_is_what_no_module_knows(name):
    network = frozen()
    network.adapter.requires_grad_()
    network.unregistered[0].requires_grad_()
    both = [network.adapter.weight, network.unregistered[0]]
    found = torch.autograd.grad(loss_of(name, network)[0], both)
    network.adapter.requires_grad_(False)
    alone = torch.autograd.grad(loss_of(name, network)[0], network.unregistered[0])
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
