"""Derivatives that a schedule inherits from α and σ: what autograd cannot follow is refused."""

import pytest
import torch

import hosm_losses as hosm
from tests.schedules.checks import own
from tests.schedules.test_check import build


def out_of_python(t):
    return torch.tensor(t.tolist(), dtype=t.dtype)


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
RIGHT = {
    "a table between whose entries it is linear": {"sigma": between, "ends": (0.0, 1.0)},
    "in single precision": {"sigma": in_single_precision},
    "derivatives of its own": {**FLOW, **DERIVED, "sigma": out_of_python},
}


@pytest.mark.parametrize("missing", ["squared_diffusion", "rates"])
def test_each_derivative_that_is_inherited_is_refused_where_autograd_cannot_follow(missing):
    given = {name: each for name, each in DERIVED.items() if name != missing}
    with pytest.raises(ValueError) as refused:
        build(own(**FLOW, sigma=out_of_python, **given))
    assert missing in str(refused.value)


def test_so_is_what_an_instance_holds():
    class Held(hosm.Schedule):
        t_min, t_max = 1e-3, 0.99

        def __init__(self, sigma):
            self.alpha, self.sigma = torch.ones_like, sigma

    build(Held(torch.clone))
    with pytest.raises(ValueError):
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
