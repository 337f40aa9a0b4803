"""What follows from α and σ alone: a user's subclass against the closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hosm_losses as hosm
from hosm_losses.schedules.base import as_time, time_derivative
from tests.oracles import default_dtype, networks
from tests.schedules.test_continuous import SCHEDULES

TABLE = hosm.DiscreteSchedule(torch.linspace(0.99, 0.01, 20))
EVERY = {**SCHEDULES, "discrete": TABLE}
ENDS = [pytest.param(schedule, id=name) for name, schedule in sorted(EVERY.items())]


def bare(schedule):
    """The same α and σ in a user's own subclass, and nothing else."""

    class Bare(hosm.Schedule):
        t_min, t_max = schedule.t_min, schedule.t_max

        def alpha(self, t):
            return schedule.alpha(t)

        def sigma(self, t):
            return schedule.sigma(t)

    return Bare()


BARE = pytest.param(bare(hosm.VPSchedule()), id="bare")


@given(name=st.sampled_from(sorted(SCHEDULES)), place=st.floats(0, 1))
def test_a_subclass_with_alpha_and_sigma_alone_knows_the_rest(name, place):
    schedule = SCHEDULES[name]
    t = torch.tensor([schedule.t_min + place * (schedule.t_max - schedule.t_min)])
    own = bare(schedule)
    torch.testing.assert_close(
        own.log_sigma_hat(t), schedule.log_sigma_hat(t), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(own.drift(t), schedule.drift(t), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        own.squared_diffusion(t), schedule.squared_diffusion(t), rtol=1e-7, atol=0
    )
    for rate, expected in zip(own.rates(t), schedule.rates(t), strict=True):
        torch.testing.assert_close(rate, expected, rtol=1e-7, atol=1e-9)
    found = own.time(schedule.log_sigma_hat(t))
    # α is flat where VP-like schedules end, so t is found as well as log σ̂ allows.
    torch.testing.assert_close(
        own.log_sigma_hat(found), schedule.log_sigma_hat(t), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(found, t, rtol=1e-6, atol=1e-9)


def test_bisection_clips_to_the_ends():
    own = bare(hosm.VPSchedule())
    ends = own.time(torch.tensor([-50.0, 50.0]))
    torch.testing.assert_close(ends, torch.tensor([1e-5, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bisection_finds_the_last_digits(dtype):
    own, closed = bare(hosm.VESchedule()), hosm.VESchedule()
    t = torch.linspace(1e-5, 1, 9, dtype=dtype)
    found = own.time(closed.log_sigma_hat(t))
    assert found.dtype == dtype
    torch.testing.assert_close(found, t, rtol=0, atol=30 * torch.finfo(dtype).eps)


def test_a_search_under_vmap_and_compile_finds_the_same():
    own = bare(hosm.VPSchedule())
    u = torch.linspace(-6, 3, 40)
    expected = own.time(u)
    torch.testing.assert_close(torch.func.vmap(own.time)(u), expected, rtol=0, atol=1e-13)
    compiled = torch.compile(own.time, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(u), expected, rtol=0, atol=0)


def test_a_subclass_works_in_every_loss_and_in_the_likelihood():
    network, shape = networks()["mlp"]
    x0 = torch.randn(4, *shape)
    own, closed = bare(hosm.VPSchedule()), hosm.VPSchedule()
    for weighting in ("noise", "native", "likelihood"):
        losses = []
        for schedule in (own, closed):
            model = hosm.ScoreModel(network, schedule, "v_prediction")
            generator = torch.Generator().manual_seed(0)
            losses.append(
                hosm.third_order_dsm(model, x0, weighting=weighting, generator=generator)
            )
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    # The prior of a schedule that says nothing is N(0, σ(t_max)²); VP says 1.
    results = [
        hosm.ode_nll(hosm.ScoreModel(network, s), x0, divergence="exact", steps=16)
        for s in (own, closed)
    ]
    torch.testing.assert_close(results[0].nll, results[1].nll, rtol=1e-3, atol=1e-3)
    assert own.prior_std == pytest.approx(float(closed.sigma(torch.tensor(1.0))))


def test_the_base_class_asks_for_alpha_and_sigma():
    for method in ("alpha", "sigma"):
        with pytest.raises(NotImplementedError):
            getattr(hosm.Schedule(), method)(torch.tensor(0.5))


METHODS = (
    *("alpha", "sigma", "log_sigma_hat", "time", "drift", "squared_diffusion", "time_density"),
    *("rates", "__call__"),
)


def values(schedule, method, t):
    """What a method returns, as one tensor."""
    returned = getattr(schedule, method)(t)
    return torch.stack(returned) if isinstance(returned, tuple) else returned


@pytest.mark.parametrize("number", [0.25, 1, np.float64(0.25), np.float32(0.25), np.int64(1)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", ENDS)
def test_every_method_takes_numbers(schedule, method, number):
    expected = values(schedule, method, torch.tensor(float(number), dtype=torch.float64))
    got = values(schedule, method, number)
    assert got.device.type == "cpu"
    rough = isinstance(number, np.float32)
    assert got.dtype == (torch.float32 if rough else torch.float64)
    close = {"rtol": 1e-5, "atol": 1e-6} if rough else {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(got.double(), expected, equal_nan=True, **close)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", ENDS)
def test_every_method_takes_integers_halves_and_arrays(schedule, method):
    # 1 is past the end of some, where a logarithm is infinite.
    one = values(schedule, method, torch.ones(2))
    for t in (torch.ones(2, dtype=torch.int64), np.ones(2), np.ones(2, dtype=int), [1.0, 1.0]):
        got = values(schedule, method, t)
        assert got.dtype == torch.get_default_dtype()
        torch.testing.assert_close(got, one, rtol=0, atol=0, equal_nan=True)
    half = values(schedule, method, torch.tensor(0.5, dtype=torch.bfloat16))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("t", [torch.arange(300, 1000), 999, 300.3, [300.3]])
def test_a_half_default_dtype_rounds_no_time(t):
    table = hosm.DiscreteSchedule.linear(1000)
    expected = table(torch.as_tensor(t).to(torch.float32))
    with default_dtype(torch.bfloat16):
        found = table(t)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", [*ENDS, BARE])
def test_tensors_follow_t_and_not_the_default_device(schedule, method):
    t = torch.tensor([0.25, 0.5])
    before = values(schedule, method, t)
    copy = hosm.DiscreteSchedule(TABLE.alphas_cumprod) if schedule is TABLE else schedule
    with torch.device("meta"):
        got = values(copy, method, t)
        number = copy(0.25) if method == "__call__" else [values(copy, method, t[0])]
    torch.testing.assert_close(got, before, rtol=0, atol=0)
    assert {part.device.type for part in number} == {"cpu"}
    elsewhere = values(copy, method, t.to("meta"))
    assert elsewhere.device.type == "meta"
    assert elsewhere.shape == before.shape


@pytest.mark.parametrize("schedule", [*ENDS, BARE])
def test_what_is_a_number_comes_from_the_cpu_under_any_default_device(schedule):
    before = (schedule.prior_std, schedule.log_sigma_hat_range)
    with torch.device("meta"):
        assert (schedule.prior_std, schedule.log_sigma_hat_range) == before


@pytest.mark.parametrize("schedule", [*ENDS, BARE])
def test_draws_are_on_the_device_asked_for_then_the_generators_then_the_default(schedule):
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        assert schedule.sample_time(3).device.type == "meta"
        assert schedule.sample_time(3, generator).device.type == "cpu"
        assert schedule.sample_time(3, device="cpu").device.type == "cpu"
    assert schedule.sample_time(3, device="meta").device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", [*ENDS, BARE])
def test_time_is_clipped_to_the_ends_as_the_losses_see_them(schedule, dtype):
    low, high = schedule.log_sigma_hat_range
    far = torch.tensor([-float("inf"), -1e3, -60.0, low - 1, low - 1e-3], dtype=dtype)
    edge = torch.linspace(low, high, 101, dtype=torch.float64).to(dtype)
    u = torch.cat(
        [far, edge, torch.tensor([high + 1e-3, high + 1, 60.0, 1e3, float("inf")], dtype=dtype)]
    )
    t = schedule.time(u)
    assert t.dtype == dtype
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=dtype)
    torch.testing.assert_close(t[:5], ends[:1].expand(5), rtol=1e-6, atol=0)
    torch.testing.assert_close(t[-5:], ends[1:].expand(5), rtol=1e-6, atol=0)
    model = hosm.ScoreModel(lambda x, t: x, schedule)
    hosm.first_order_dsm(model, torch.zeros(len(t), 1, dtype=dtype), t=t)  # its own range check
    numbers = [schedule.time(float(value)) for value in (-1e3, 1e3)]
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(numbers), ends, rtol=1e-9, atol=0)
    assert bool(schedule.time(torch.tensor(float("nan"))).isnan())


@pytest.mark.parametrize("schedule", ENDS)
def test_clipped_times_keep_their_derivatives_inside(schedule):
    low, high = schedule.log_sigma_hat_range
    u = (low + (high - low) * torch.linspace(0.05, 0.95, 7)).requires_grad_()
    t = schedule.time(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    rate = schedule.squared_diffusion(t) / (2 * schedule.sigma(t).square())
    torch.testing.assert_close(slope, 1 / rate.detach(), rtol=1e-9, atol=0)


def test_the_largest_draw_stays_in_range_where_rounding_would_leave_it(monkeypatch):
    largest = torch.tensor([1 - 2**-24], dtype=torch.float32)
    end = torch.tensor(0.71, dtype=torch.float32)
    assert float(0.66 + (0.71 - 0.66) * largest) > float(end)
    monkeypatch.setattr(torch, "rand", lambda size, **options: largest)
    assert float(hosm.VESchedule(t_min=0.66, t_max=0.71).sample_time(1)) == float(end)


def test_a_tensor_is_taken_as_it_is():
    t = torch.tensor([0.5])
    assert as_time(t) is t


def test_time_derivative_is_elementwise():
    t = torch.tensor([0.1, 0.5])
    torch.testing.assert_close(time_derivative(torch.sin, t), t.cos())
