"""What a schedule has to be: each rule with a schedule that breaks it, and none that is right."""

import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hosm_losses as hosm
from hosm_losses.schedules.base import as_time
from hosm_losses.schedules.check import check_schedule
from tests.oracles import CountCalls
from tests.schedules.checks import own
from tests.schedules.test_continuous import SCHEDULES

TABLE = hosm.DiscreteSchedule(torch.linspace(0.99, 0.01, 20))
RIGHT = {**SCHEDULES, "discrete": TABLE}


def build(schedule):
    return hosm.ScoreModel(lambda x, t: x, schedule)


def writes(t):
    t *= 2
    return t


RIGHT["own"] = own()
RIGHT["NumPy numbers"] = own(ends=(np.float32(0.01), np.int64(2)))
WRONG = {
    "alpha is 0 at the end of a flow": (
        lambda: hosm.LinearFlowSchedule(t_max=1.0),
        ValueError,
        r"positive and finite alpha.*got alpha = 0 at t_max = 1\. End before.*0\.999 for a flow",
    ),
    "alpha is 0 at the end of a cosine": (
        lambda: hosm.CosineSchedule(t_max=1.0),
        ValueError,
        r"got alpha = 0 at t_max = 1\. End before",
    ),
    "alpha is negative past the end": (
        lambda: hosm.CosineSchedule(t_max=1.2),
        ValueError,
        r"got alpha = -0\.3\d* at t_max = 1\.2\. End before",
    ),
    "alpha underflows where t counts steps": (
        lambda: hosm.VPSchedule(t_max=999.0),
        ValueError,
        r"got alpha = 0 at t_max = 999\..*1 for VPSchedule.*time=999",
    ),
    "sigma is 0 at the data": (
        lambda: hosm.VPSchedule(t_min=0.0),
        ValueError,
        r"positive and finite sigma.*got sigma = 0 at t_min = 0\. Begin where.*t_min = 1e-5",
    ),
    "sigma is 0 at the data of a flow": (
        lambda: hosm.LinearFlowSchedule(t_min=0.0),
        ValueError,
        r"got sigma = 0 at t_min = 0\. Begin where",
    ),
    "the data are at 1": (
        lambda: own(torch.clone, lambda t: 1 - t, (1e-3, 0.999)),
        ValueError,
        r"log\(sigma/alpha\) of Own to grow.*got 6\.9\d* at t_min = 0\.001 and -6\.9\d* at "
        r"t_max = 0\.999\. Two arguments may be reversed\..*data are at t = 1.*time=lambda t: 1",
    ),
    "the data are at 1 and the ends are whole": (
        lambda: own(torch.clone, lambda t: 1 - t, (0.0, 1.0)),
        ValueError,
        r"got alpha = 0 at t_min = 0\. t_min is the end of the data.*data are at t = 1",
    ),
    "nothing grows": (
        lambda: own(sigma=torch.ones_like),
        ValueError,
        r"got 0 at t_min = 0\.001 and 0 at t_max = 1",
    ),
    "it falls between the ends": (
        lambda: own(sigma=lambda t: t + 0.2 * torch.sin(6 * np.pi * t) + 0.3),
        ValueError,
        r"to grow with t; got one that does not from t = 0\.0946\d* to t = 0\.110\d*\. Correct",
    ),
    "it falls next to the data": (
        lambda: own(sigma=lambda t: (t - 2e-3).abs() + 1e-4),
        ValueError,
        r"got one that does not from t = 0\.001 to",
    ),
    "it stands still in the middle": (
        lambda: own(sigma=lambda t: torch.where((t > 0.4) & (t < 0.6), 0.4 + 0 * t, t)),
        ValueError,
        r"got one that does not from t = 0\.",
    ),
    "sigma is negative in the middle": (
        lambda: own(sigma=lambda t: (t - 0.5).square() - 0.01),
        ValueError,
        r"got sigma = -0\.\d* at t = 0\.\d*\. Correct the formula",
    ),
    "sigma is infinite at the end": (
        lambda: own(sigma=lambda t: t / (1 - t)),
        ValueError,
        r"got sigma = inf at t_max = 1",
    ),
    "NaN": (
        lambda: own(sigma=lambda t: torch.where(t > 0.4, t * np.nan, t), ends=(0.1, 0.5)),
        ValueError,
        r"got sigma = nan at t_max = 0\.5",
    ),
    "the ends are reversed": (
        lambda: own(ends=(1.0, 0.001)),
        ValueError,
        r"Own to have t_min < t_max; got t_min = 1 and t_max = 0\.001\.",
    ),
    "the ends are one": (lambda: own(ends=(1, 1)), ValueError, r"t_min < t_max; got t_min = 1"),
    "no ends": (
        lambda: own(ends=None),
        TypeError,
        r"expected Own to have t_min.*got no t_min\. Set both.*t_min, t_max = 1e-5, 1\.0",
    ),
    "infinite end": (
        lambda: own(ends=(0.1, float("inf"))),
        ValueError,
        r"t_max of Own to be a finite number; got inf",
    ),
    "a tensor for an end": (
        lambda: own(ends=(torch.tensor(0.1), 1.0)),
        ValueError,
        r"t_min of Own to be a finite number; got a torch.float64 tensor",
    ),
    "True for an end": (lambda: own(ends=(0.1, True)), ValueError, r"t_max of Own.*got True"),
    "no alpha": (lambda: own(alpha=None), TypeError, r"Own: a schedule defines alpha\(t\)"),
    "no sigma": (lambda: own(sigma=None), TypeError, r"Own: a schedule defines alpha\(t\)"),
    "math": (
        lambda: own(alpha=lambda t: np.e ** -float(t)),
        ValueError,
        r"expected Own\.alpha to take a CPU tensor.*got \w+Error: .*torch\.exp and not math\.exp",
    ),
    "a number for a tensor": (
        lambda: own(alpha=lambda t: 1.0),
        TypeError,
        r"expected Own\.alpha to return a tensor like its argument.*got 1\.0\..*ones_like",
    ),
    "one number for all times": (
        lambda: own(alpha=lambda t: torch.tensor(1.0)),
        TypeError,
        r"got a torch\.float64 tensor of shape \(\)",
    ),
    "single precision": (
        lambda: own(sigma=lambda t: t.float()),
        TypeError,
        r"expected Own\.sigma to return.*a torch\.float64 tensor.*got a torch\.float32 tensor",
    ),
    "another device": (
        lambda: own(sigma=lambda t: t.to("meta")),
        TypeError,
        r"expected Own\.sigma to return.*on meta",
    ),
    "a tensor of another device inside": (
        lambda: own(sigma=lambda t: torch.ones(9, device="meta")[t.long()] * t),
        ValueError,
        r"expected Own\.sigma to take a CPU tensor.*move tensors that it holds",
    ),
    "writes to t": (lambda: own(sigma=writes), ValueError, r"Own\.sigma to leave its argument"),
    "an old log_sigma_hat": (
        lambda: own(sigma=torch.square, log_sigma_hat=lambda t: t.log()),
        ValueError,
        r"expected log_sigma_hat of Own to agree with its alpha and sigma; got .* Override",
    ),
    "an old time": (
        lambda: own(sigma=torch.square, ends=None, base=hosm.EDMSchedule),
        ValueError,
        r"expected time of Own to agree with its alpha and sigma",
    ),
    "time that is not clipped": (
        lambda: own(time=lambda u: as_time(u).exp()),
        ValueError,
        r"expected Own\.time to return times in \[t_min, t_max\]; got .*self\.clip\(t\)",
    ),
    "an old diffusion": (
        lambda: own(squared_diffusion=lambda t: t),
        ValueError,
        r"expected squared_diffusion of Own to agree",
    ),
    "an old drift": (
        lambda: own(drift=lambda t: -t),
        ValueError,
        r"expected drift of Own to agree",
    ),
    "old rates": (
        lambda: own(rates=lambda t: (torch.zeros_like(t), 2 * torch.ones_like(t))),
        ValueError,
        r"expected rates of Own to agree",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_where_the_model_is_built(name):
    make, error, message = WRONG[name]
    schedule = make()
    with pytest.raises(error, match=message):
        build(schedule)


def test_what_is_no_schedule_is_refused():
    with pytest.raises(TypeError, match=r"schedule: expected a schedule such as VPSchedule\(\)"):
        build(object())


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
        with pytest.raises(FutureWarning, match="old"):
            check_schedule(schedule)


def test_it_is_looked_at_only_outside_of_compilation():
    def make(x):
        check_schedule(hosm.LinearFlowSchedule(t_max=1.0))
        return x + 1

    compiled = torch.compile(make, backend="eager", fullgraph=True)
    assert float(compiled(torch.zeros(()))) == 1.0


class Branches(hosm.Schedule):
    t_min, t_max = 1e-3, 0.99

    def alpha(self, t):
        return 1 - t if t < 0.5 else 1.0 - t

    def sigma(self, t):
        return t


def test_a_branch_of_python_is_told_of_where():
    with pytest.raises(ValueError, match=r"Branches\.alpha .*torch\.where and not if"):
        hosm.ScoreModel(lambda x, t: x, Branches())
