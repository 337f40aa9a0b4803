"""The closed forms: precision in float32, inverses, derivatives, draws."""

import dataclasses
import pickle

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hosm_losses as hosm
from hosm_losses.schedules.base import time_derivative
from tests.oracles import CountCalls

SCHEDULES = {
    "vp": hosm.VPSchedule(),
    "ve": hosm.VESchedule(),
    "subvp": hosm.SubVPSchedule(),
    "cosine": hosm.CosineSchedule(),
    "edm": hosm.EDMSchedule(),
    "flow": hosm.LinearFlowSchedule(),
}
NAMES = sorted(SCHEDULES)


def textbook(name, t):
    """(α, σ) as the papers write them, in 50 digits."""
    with mpmath.workdps(50):
        t = mpmath.mpf(t)
        b = mpmath.mpf("0.1") * t + mpmath.mpf("9.95") * t**2
        if name in ("vp", "subvp"):
            alpha = mpmath.exp(-b / 2)
            variance = 1 - alpha**2
            return alpha, mpmath.sqrt(variance) if name == "vp" else variance
        if name == "ve":
            return mpmath.mpf(1), mpmath.mpf("0.01") * mpmath.mpf(5000) ** t
        if name == "cosine":
            s = mpmath.mpf("0.008")
            angle = mpmath.pi / 2 * (t + s) / (1 + s)
            alpha = mpmath.cos(angle) / mpmath.cos(mpmath.pi / 2 * s / (1 + s))
            return alpha, mpmath.sqrt(1 - alpha**2)
        if name == "edm":
            return mpmath.mpf(1), t
        return 1 - t, t


def times(schedule, dtype, count=200):
    """From t_min to t_max, close to both ends and between them."""
    span = schedule.t_max - schedule.t_min
    near = torch.logspace(-8, 0, count)
    t = torch.cat([schedule.t_min + span * near, schedule.t_max - span * near])
    return t.clamp(schedule.t_min, schedule.t_max).to(dtype)


def test_a_wide_ve_schedule_keeps_its_digits_in_float32():
    schedule = hosm.VESchedule(sigma_min=1e-3, sigma_max=1e4)
    t = torch.linspace(1e-5, 1, 20_001, dtype=torch.float32)
    exact = 1e-3 * (1e4 / 1e-3) ** t.double()
    assert float((schedule.sigma(t) / exact - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_alpha_and_sigma_keep_their_digits(name, dtype):
    schedule = SCHEDULES[name]
    t = times(schedule, dtype)
    alpha, sigma = schedule(t)
    assert alpha.dtype == sigma.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 2e-14
    for time, a, s in zip(t.tolist(), alpha.tolist(), sigma.tolist(), strict=True):
        exact_alpha, exact_sigma = textbook(name, time)
        assert abs(s - exact_sigma) <= bound * exact_sigma
        assert abs(a - exact_alpha) <= bound * exact_alpha


@given(name=st.sampled_from(NAMES), place=st.floats(0, 1))
def test_time_inverts_log_sigma_hat(name, place):
    schedule = SCHEDULES[name]
    t = torch.tensor([schedule.t_min + place * (schedule.t_max - schedule.t_min)])
    alpha, sigma = schedule(t)
    u = schedule.log_sigma_hat(t)
    torch.testing.assert_close(u, (sigma / alpha).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.time(u), t, rtol=1e-7, atol=1e-9)


@given(name=st.sampled_from(NAMES), place=st.floats(0.01, 0.99))
def test_drift_diffusion_and_rates_are_differences_of_alpha_and_sigma(name, place):
    schedule = SCHEDULES[name]
    t = torch.tensor(schedule.t_min + place * (schedule.t_max - schedule.t_min))
    h = 1e-6 * float(t)
    (a1, s1), (a0, s0) = schedule(t + h), schedule(t - h)
    alpha, sigma = schedule(t)
    alpha_rate, sigma_rate = (a1 - a0) / (2 * h), (s1 - s0) / (2 * h)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for got, expected in zip(schedule.rates(t), (alpha_rate, sigma_rate), strict=True):
        torch.testing.assert_close(got, expected, **close)
    torch.testing.assert_close(schedule.drift(t), alpha_rate / alpha, **close)
    g2 = 2 * sigma * (sigma_rate - sigma * alpha_rate / alpha)
    torch.testing.assert_close(schedule.squared_diffusion(t), g2, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_the_drift_keeps_its_digits(name, dtype):
    schedule = SCHEDULES[name]
    t = times(schedule, dtype)
    exact = t.double()
    if name in ("vp", "subvp"):
        expected = -0.05 - 9.95 * exact
    elif name == "cosine":
        rate = np.pi / 2 / 1.008
        expected = -rate / torch.tan(rate * (1 - exact))
    elif name == "flow":
        expected = -1 / (1 - exact)
    else:
        expected = torch.zeros_like(exact)
    got = schedule.drift(t)
    assert got.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    # Next to 0 the tangent of the cosine's angle is large, and so is its share of the rounding.
    bound *= 20 if name == "cosine" else 1
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_rates_and_drift_are_the_derivatives_in_all_digits(name, dtype):
    schedule = SCHEDULES[name]
    t = times(schedule, dtype)
    expected = [time_derivative(part, t.double()) for part in (schedule.alpha, schedule.sigma)]
    bound = 2e-6 if dtype == torch.float32 else 1e-12
    # PyTorch's derivative of expm1(-B) is its value + 1, which has lost digits where B is large.
    bound *= 4 if name in ("vp", "subvp") else 1
    for got, wanted in zip(schedule.rates(t), expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=bound, atol=0)
    drift = expected[0] / schedule.alpha(t.double())
    bound *= 10 if name == "cosine" else 1  # whose tangent loses one digit next to 0
    torch.testing.assert_close(schedule.drift(t).double(), drift, rtol=bound, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_the_rates_of_any_cosine_keep_their_digits(offset, dtype):
    t = torch.tensor([1e-5, 0.01, 0.5, 0.99], dtype=dtype)
    found = torch.stack(hosm.CosineSchedule(offset=offset).rates(t), 1)
    with mpmath.workdps(40):
        rate = mpmath.pi / 2 / (1 + mpmath.mpf(offset))
        start = rate * mpmath.mpf(offset)
        for time, got in zip(t.tolist(), found.tolist(), strict=True):
            angle = start + rate * mpmath.mpf(time)
            alpha = mpmath.cos(angle) / mpmath.cos(start)
            slope = -rate * mpmath.sin(angle) / mpmath.cos(start)
            exact = slope, -alpha * slope / mpmath.sqrt(1 - alpha**2)
            for one, wanted in zip(got, exact, strict=True):
                assert abs(one / wanted - 1) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
def test_range_and_prior(name):
    schedule = SCHEDULES[name]
    low, high = schedule.log_sigma_hat_range
    assert low == float(schedule.log_sigma_hat(torch.tensor(schedule.t_min)))
    assert -15 < low < -3.5
    assert 3.5 < high < 7
    expected = {"ve": 50.0, "edm": 80.0}.get(name, 1.0)
    assert schedule.prior_std == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_draws_stay_in_range_and_follow_the_density(name, dtype):
    schedule = SCHEDULES[name]
    count = 40_000
    t = schedule.sample_time(count, torch.Generator().manual_seed(0), dtype=dtype)
    assert t.dtype == dtype
    assert t.shape == (count,)
    assert bool(((t >= schedule.t_min) & (t <= schedule.t_max)).all())
    # E[1/p(t)] over a draw from p is the length of the interval; half of it for its lower part.
    cut = 1.0 if name == "edm" else schedule.t_min + 0.5 * (schedule.t_max - schedule.t_min)
    low = 0.05 if name == "edm" else schedule.t_min
    inside = (t > low) & (t < cut)
    weights = torch.where(inside, 1 / schedule.time_density(t), torch.zeros_like(t)).double()
    error = weights.std() / count**0.5
    assert abs(weights.mean() - (cut - low)) < 5 * error


def test_a_generator_decides_the_draw_and_the_global_one_is_left_alone():
    before = torch.get_rng_state()
    draws = [hosm.VPSchedule().sample_time(5, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_schedules_are_frozen_values(name):
    schedule = SCHEDULES[name]
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(dataclasses.replace(schedule)) == hash(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.t_min = 0.5


def test_options_change_what_they_name():
    assert float(hosm.VPSchedule(beta_max=10.0)(1.0)[0]) == pytest.approx(
        float(torch.tensor(-0.25 * 10.1).exp())
    )
    assert float(hosm.VESchedule(sigma_max=7.0)(1.0)[1]) == pytest.approx(7.0)
    assert float(hosm.VESchedule(sigma_min=0.3)(0.0)[1]) == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 0.008, 0.3])
def test_the_cosines_inverse_keeps_its_digits(offset, dtype):
    schedule = hosm.CosineSchedule(offset=offset)
    low, high = schedule.log_sigma_hat_range
    u = torch.linspace(low, high, 400, dtype=torch.float64).to(dtype)[1:-1]
    with mpmath.workdps(40):
        rate = mpmath.pi / 2 / (1 + mpmath.mpf(offset))
        start = rate * mpmath.mpf(offset)
        exact = [
            (
                mpmath.acos(mpmath.cos(start) / mpmath.sqrt(1 + mpmath.exp(2 * mpmath.mpf(v))))
                - start
            )
            / rate
            for v in u.tolist()
        ]
    errors = [abs(t / e - 1) for t, e in zip(schedule.time(u).tolist(), exact, strict=True)]
    assert max(errors) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
def test_no_schedule_makes_a_likelihood_dear(name):
    """VP's is the measure; a search would call several times as many operators."""
    counts = []
    for schedule in (SCHEDULES[name], SCHEDULES["vp"]):
        model = hosm.ScoreModel(lambda x, t: x, schedule)
        with CountCalls() as calls:
            hosm.ode_nll(model, torch.zeros(2, 2), steps=16)
        counts.append(calls.number)
    assert counts[0] < 1.2 * counts[1]


@pytest.mark.parametrize("method", ["time", "squared_diffusion", "drift", "rates"])
@pytest.mark.parametrize("name", NAMES)
def test_what_losses_and_likelihoods_call_is_in_closed_form(name, method):
    assert getattr(type(SCHEDULES[name]), method) is not getattr(hosm.Schedule, method)


def test_a_vp_schedule_may_start_from_no_noise_at_all():
    schedule = hosm.VPSchedule(beta_min=0.0)
    u = torch.tensor([-float("inf"), -60.0, 0.0, float("inf")], dtype=torch.float32)
    t = schedule.time(u)
    torch.testing.assert_close(t[[0, 1, 3]], torch.tensor([1e-5, 1e-5, 1.0], dtype=torch.float32))
    torch.testing.assert_close(schedule.log_sigma_hat(t[2]), u[2], rtol=0, atol=1e-5)


def test_numpy_numbers_and_integers_become_parameters():
    schedule = hosm.VPSchedule(
        beta_min=np.float64(0.25), beta_max=np.int64(20), t_min=np.float32(0.5)
    )
    assert schedule == hosm.VPSchedule(beta_min=0.25, t_min=0.5)
    assert {type(value) for value in dataclasses.astuple(schedule)} == {float}
