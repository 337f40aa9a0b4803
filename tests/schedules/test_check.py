"""What the check of a schedule takes, and when it looks; what it refuses is in test_errors."""

import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hosm_losses as hosm
from hosm_losses.schedules.check import check_schedule
from tests.oracles import CountCalls
from tests.schedules.checks import own
from tests.schedules.test_continuous import SCHEDULES

TABLE = hosm.DiscreteSchedule(torch.linspace(0.99, 0.01, 20))
RIGHT = {**SCHEDULES, "discrete": TABLE, "own": own()}
RIGHT["NumPy numbers"] = own(ends=(np.float32(0.01), np.int64(2)))


def build(schedule):
    return hosm.ScoreModel(lambda x, t: x, schedule)


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_taken_anywhere_and_costs_no_millisecond(name):
    schedule = RIGHT[name]
    for context in (
        torch.device("meta"),
        FakeTensorMode(),
        torch.inference_mode(),
        torch.no_grad(),
    ):
        with context:
            build(schedule)
    x = torch.randn(3, 2)

    def loss(x):
        model = hosm.ScoreModel(lambda x, t: x.sin(), schedule)
        noise, t = torch.ones_like(x), torch.full((len(x),), float(schedule.t_max))
        return hosm.first_order_dsm(model, x, t=t, noise=noise)

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    with CountCalls() as calls:
        check_schedule(schedule)
    assert calls.number <= 300  # of operators on a few numbers


def test_a_schedule_computed_in_single_precision_and_one_that_learns_are_taken():
    def sigma(t):
        return (0.01 + t.float()).to(t.dtype)

    build(own(sigma=sigma))
    scale = torch.nn.Parameter(torch.tensor(2.0))
    model = build(own(sigma=lambda t: scale * t))
    hosm.first_order_dsm(model, torch.zeros(2, 2)).backward()
    assert float(scale.grad) != 0


def test_a_warning_that_a_filter_makes_an_error_is_no_fault_of_the_schedule():
    def alpha(t):
        warnings.warn("old", FutureWarning, stacklevel=1)
        return torch.ones_like(t)

    schedule = own(alpha=alpha)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning):
            check_schedule(schedule)


def test_it_is_looked_at_only_outside_of_compilation():
    def make(x):
        check_schedule(hosm.LinearFlowSchedule(t_max=1.0))
        return x + 1

    compiled = torch.compile(make, backend="eager", fullgraph=True)
    assert float(compiled(torch.zeros(()))) == 1.0
