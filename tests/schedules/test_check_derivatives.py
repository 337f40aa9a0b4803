"""Derivatives that a schedule inherits from α and σ: what autograd cannot follow is refused."""

import numpy as np
import pytest
import torch

import hosm_losses as hosm
from tests.schedules.checks import own
from tests.schedules.test_check import build
from tests.versions import OLD


def out_of_python(t):
    return torch.tensor(t.tolist(), dtype=t.dtype)


def by_numpy(t):
    return torch.from_numpy(np.interp(t.numpy(), [0, 1, 2], [0, 1, 2]))


def in_inference_mode(t):
    with torch.inference_mode():
        return 1 * t


def nearest(t):
    """A table of 20 001 entries, between which lie the shorter steps of the check."""
    return torch.linspace(0, 1, 20_001, dtype=t.dtype)[(20_000 * t).long()]


def between(t):
    """A table of 11 entries, at each of which the slope changes."""
    table = torch.tensor([0.01, 0.04, 0.05, 0.2, 0.25, 0.3, 0.5, 0.55, 0.7, 0.9, 1.0]).to(t)
    left = (10 * t).long().clamp(0, 9)
    return table[left] + (10 * t - left) * (table[left + 1] - table[left])


def in_single_precision(t):
    return (0.01 + t.float()).to(t.dtype)


FLOW = {"alpha": lambda t: 1 - t, "ends": (1e-3, 0.99)}
DERIVED = {
    "squared_diffusion": lambda t: 2 * t / (1 - t),
    "drift": lambda t: -1 / (1 - t),
    "rates": lambda t: (-torch.ones_like(t), torch.ones_like(t)),
}
WRONG = {
    "numbers taken out of t": (
        {"sigma": out_of_python},
        r"squared_diffusion of Own to be positive, as .*; got 0 at t = 0\.\d*\. What a "
        r"schedule does not override follows.*operators of PyTorch on t.*override drift, squared",
    ),
    "alpha alone is detached": (
        {**FLOW, "alpha": lambda t: (1 - t).detach()},
        r"squared_diffusion of Own to agree with its alpha and sigma; got 0\.39\d* for 0\.48.*"
        r"without \.detach\(\)",
    ),
    "inference mode": (
        {"sigma": in_inference_mode},
        r"squared_diffusion of Own to be positive.*What a schedule does not override follows",
    ),
    "NumPy": (
        {"sigma": by_numpy},
        r"Own\.squared_diffusion to follow from alpha and sigma, whose values are right; got "
        r"RuntimeError: Cannot access data pointer.*override drift, squared_diffusion and rates",
    ),
    "a nearest entry": (
        {"sigma": nearest},
        r"squared_diffusion of Own to be positive.*linear between the entries",
    ),
    "rates alone are inherited": (
        {
            **FLOW,
            "sigma": out_of_python,
            "drift": DERIVED["drift"],
            "squared_diffusion": DERIVED["squared_diffusion"],
        },
        r"rates of Own to agree with its alpha and sigma; got 0 for 1 at.*and rates\.$",
    ),
    "rates and drift are": (
        {**FLOW, "sigma": out_of_python, "squared_diffusion": DERIVED["squared_diffusion"]},
        r"rates of Own to agree with its alpha and sigma; got 0 for 1 at",
    ),
}
RIGHT = {
    "a table between whose entries it is linear": {"sigma": between, "ends": (0.0, 1.0)},
    "in single precision": {"sigma": in_single_precision},
    "derivatives of its own": {**FLOW, **DERIVED, "sigma": out_of_python},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_autograd_cannot_follow_is_refused(name):
    members, message = WRONG[name]
    if OLD and members.get("sigma") is out_of_python:  # which finds no storage there
        message = r"Own\.\w+ to follow from alpha and sigma"
    with pytest.raises(ValueError, match="schedule: expected " + message):
        build(own(**members))


def test_so_is_what_an_instance_holds():
    class Held(hosm.Schedule):
        t_min, t_max = 1e-3, 0.99

        def __init__(self, sigma):
            self.alpha, self.sigma = torch.ones_like, sigma

    build(Held(torch.clone))
    with pytest.raises(ValueError, match=r"squared_diffusion of Held to be positive"):
        build(Held(torch.detach))


@pytest.mark.parametrize("name", RIGHT)
def test_what_it_can_follow_or_need_not_is_taken(name):
    schedule = own(**RIGHT[name])
    build(schedule)
    with torch.inference_mode():
        build(schedule)


def test_a_table_of_the_package_may_have_slopes_that_change_at_every_entry():
    betas = 0.2 * torch.rand(11, generator=torch.Generator().manual_seed(0)) + 1e-3
    build(hosm.DiscreteSchedule.from_betas(betas))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("part", ["alpha", "sigma"])
def test_a_hole_where_derivatives_are_looked_at_is_told_as_one(part, bad):
    """It was PyTorch's error about a tolerance, or said of the diffusion."""
    whole = {"alpha": torch.ones_like, "sigma": lambda t: 1 * t}

    def holed(t):
        return torch.where((t > 0.517) & (t < 0.53), bad, whole[part](t))

    schedule = own(**{**whole, part: holed}, ends=(1e-3, 1.0))
    with pytest.raises(ValueError, match=rf"positive and finite {part}.*at t = 0\.524.*Correct"):
        build(schedule)
