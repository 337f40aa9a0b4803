"""What holds of every schedule, and of a user's own with its α and σ: digits, types, draws."""

import copy

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf

import hosm_losses as hosm
from tests.cases import SCHEDULES, default_dtype
from tests.schedules.checks import own

RANGES = {
    "default range": {},
    "narrow": {"t_min": 0.1, "t_max": 1.0},
    "from within": {"t_min": 0.3, "t_max": 200.0},
    "far above": {"t_min": 20.0, "t_max": 80.0},
    "far below": {"t_min": 1e-4, "t_max": 3e-3},
    "moved": {"t_min": 0.5, "log_mean": 1.0, "log_std": 0.5},
}
CLOSED = {
    **SCHEDULES,
    "no noise at 0": hosm.VPSchedule(beta_min=0.0, beta_max=5.0),
    "wide": hosm.VESchedule(sigma_min=1e-3, sigma_max=1e4),
    "no offset": hosm.CosineSchedule(offset=0.0),
    "large offset": hosm.CosineSchedule(offset=0.3),
    "two": hosm.DiscreteSchedule([0.9, 0.2]),
    "ddpm": hosm.DiscreteSchedule.linear(1000),
}
BARE = {
    f"own {name}": own(each.alpha, each.sigma, (each.t_min, each.t_max))
    for name, each in SCHEDULES.items()
}
EVERY = CLOSED | BARE
VALUES = ("alpha", "sigma", "log_sigma_hat", "__call__")
METHODS = (*VALUES, "drift", "squared_diffusion", "rates")


def textbook(schedule, place):
    """α and σ as the papers write them; of a table they are those of the piece at `place`."""
    s, one = schedule, mpf(1)

    def linear_beta(t):
        b = s.beta_min * t + (mpf(s.beta_max) - s.beta_min) * t**2 / 2
        variance = one - mpmath.exp(-b)
        sub = isinstance(s, hosm.SubVPSchedule)
        return mpmath.exp(-b / 2), variance if sub else mpmath.sqrt(variance)

    def cosine(t):
        start, angle = (mpmath.pi / 2 * (each + s.offset) / (one + s.offset) for each in (0, t))
        alpha = mpmath.cos(angle) / mpmath.cos(start)
        return alpha, mpmath.sqrt(one - alpha**2)

    def table(t):
        left = min(int(place), len(s.alphas_cumprod) - 2)
        low, high = (mpmath.log(one / each - 1) / 2 for each in s.alphas_cumprod[left : left + 2])
        sigma_hat = mpmath.exp(low + (t - left) * (high - low))
        alpha = one / mpmath.sqrt(one + sigma_hat**2)
        return alpha, sigma_hat * alpha

    return {
        hosm.VPSchedule: linear_beta,
        hosm.SubVPSchedule: linear_beta,
        hosm.VESchedule: lambda t: (one, s.sigma_min * (mpf(s.sigma_max) / s.sigma_min) ** t),
        hosm.CosineSchedule: cosine,
        hosm.EDMSchedule: lambda t: (one, t),
        hosm.LinearFlowSchedule: lambda t: (one - t, t),
        hosm.DiscreteSchedule: table,
    }[type(schedule)]


def exact(schedule, place):
    """What the methods return at a time, in 40 digits, and the slope of log σ̂."""
    with mpmath.workdps(40):
        path, t = textbook(schedule, place), mpf(place)
        alpha, sigma = path(t)
        rates = [mpmath.diff(lambda t, part=part: path(t)[part], t) for part in (0, 1)]
        slope = rates[1] / sigma - rates[0] / alpha
        drift, diffusion = rates[0] / alpha, 2 * sigma**2 * slope
        methods = alpha, sigma, mpmath.log(sigma / alpha), (alpha, sigma), drift, diffusion, rates
        return dict(zip(METHODS, methods, strict=True)) | {"slope": slope}


def at(schedule, method, t):
    """What a method returns, as one tensor."""
    returned = getattr(schedule, method)(t)
    return torch.stack(returned) if isinstance(returned, tuple) else returned


def times(schedule, dtype):
    """From t_min to t_max, close to both ends and between them; of a table also its indices."""
    near = (schedule.t_max - schedule.t_min) * torch.logspace(-7, 0, 12)
    t = torch.cat([schedule.t_min + near, schedule.t_max - near])
    t = torch.cat([t, t.round()]) if schedule.t_max > 10 else t
    return t.clamp(schedule.t_min, schedule.t_max).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_every_method_has_the_digits_of_the_textbook(name, dtype):
    schedule, formula = EVERY[name], CLOSED[name.removeprefix("own ")]
    t = times(schedule, dtype)
    rows = [exact(formula, float(each)) for each in t]
    columns = {key: np.array([row[key] for row in rows], dtype=float).T for key in rows[0]}
    expected = {key: torch.from_numpy(column) for key, column in columns.items()}
    eps, cosine = torch.finfo(dtype).eps, isinstance(formula, hosm.CosineSchedule)
    # What PyTorch differentiates, and differences of entries in float64, have fewer digits.
    rough = name in BARE or (schedule.integer_time and dtype == torch.float64)
    for method in METHODS:
        found, wanted = at(schedule, method, t), expected[method]
        assert found.dtype == dtype
        assert found.data_ptr() != t.data_ptr()
        # Next to 0 the tangent of the cosine's angle has the rounding of the angle.
        floor = {"log_sigma_hat": 1.0, "drift": 0.15 * cosine, "squared_diffusion": 0.3 * cosine}
        bound = 8 if method in VALUES else 6400 if rough else 16
        size = wanted.abs() + floor.get(method, 0.0)
        assert bool(((found.double() - wanted).abs() <= bound * eps * size).all()), method
    # `time` is the inverse at the rounded log σ̂, which is a step of Newton's away from t.
    u, slope = expected["log_sigma_hat"], expected["slope"]
    inverse = t.double() + (u.to(dtype).double() - u) / slope
    error = schedule.time(u.to(dtype)).double() - inverse.clamp(schedule.t_min, schedule.t_max)
    assert bool((error.abs() <= 2 * eps * (t.double() + (1 + u.abs()) / slope)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_formulas_that_are_compiled_have_these_digits_too(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    test_every_method_has_the_digits_of_the_textbook(name, dtype)
    test_time_is_clipped_to_the_ends(name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_time_is_clipped_to_the_ends(name, dtype):
    schedule = EVERY[name]
    low, high = schedule.log_sigma_hat_range
    away = torch.tensor([1e-3, 1.0, 60.0, 1e3, torch.inf], dtype=dtype)
    inside = torch.linspace(low, high, 101, dtype=torch.float64).to(dtype)
    t = schedule.time(torch.cat([low - away, high + away, inside]))
    assert t.dtype == dtype
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=dtype).repeat_interleave(5)
    torch.testing.assert_close(t[:10], ends, rtol=1e-6, atol=1e-12)
    model = hosm.ScoreModel(lambda x, t: x, schedule)
    hosm.first_order_dsm(model, torch.zeros(len(t), 1, dtype=dtype), t=t)  # checks the range
    assert bool(schedule.time(torch.tensor(torch.nan)).isnan())


@pytest.mark.parametrize("name", CLOSED)
def test_the_inverse_can_be_differentiated(name):
    schedule = CLOSED[name]
    low, high = schedule.log_sigma_hat_range
    u = (low + (high - low) * torch.linspace(0.05, 0.95, 7)).requires_grad_()
    t = schedule.time(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    rate = schedule.squared_diffusion(t) / (2 * schedule.sigma(t).square())
    torch.testing.assert_close(slope, 1 / rate.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [*CLOSED, "own vp"])
def test_times_are_tensors_of_any_device_numbers_or_arrays(name):
    schedule, ones = EVERY[name], torch.ones(2)
    alike = [
        (ones, ones.long(), torch.ones(1).expand(2), [1, 1.0], np.ones(2, int), np.ones(2)),
        (torch.tensor(0.25), 0.25, np.float64(0.25)),
        (torch.tensor(1.0), 1, np.int64(1)),
        (torch.tensor(0.25).float(), torch.tensor(0.25).bfloat16(), np.float32(0.25)),
    ]
    # α and σ of a user's class are called with floating-point tensors alone.
    methods = METHODS[2:] if name in BARE else METHODS
    for method in (*methods, "time", "time_density"):
        for like, *others in alike:
            expected = at(schedule, method, like)
            assert expected.dtype == like.dtype
            # 1 is past the end of some, where a logarithm is infinite.
            same = {"rtol": 0, "atol": 0, "equal_nan": True}
            for t in others:
                torch.testing.assert_close(at(schedule, method, t), expected, **same)
            with torch.device("meta"):
                found = at(copy.deepcopy(schedule), method, others[-1])
            torch.testing.assert_close(found, expected, **same)
            elsewhere = at(schedule, method, like.to("meta"))
            assert elsewhere.device.type == "meta"
            assert elsewhere.shape == expected.shape


@pytest.mark.parametrize("name", EVERY)
def test_the_prior_and_the_range_of_log_sigma_hat_are_numbers_of_the_ends(name):
    schedule = EVERY[name]
    with torch.device("meta"):
        prior, found = schedule.prior_std, schedule.log_sigma_hat_range
    ends = torch.tensor([schedule.t_min, schedule.t_max])
    assert found == tuple(schedule.log_sigma_hat(ends).tolist())
    designed = not isinstance(schedule, hosm.VESchedule | hosm.EDMSchedule) and name in CLOSED
    assert prior == (1.0 if designed else float(schedule.sigma(ends)[1]))


def test_a_half_default_dtype_rounds_no_time():
    for t in (torch.arange(300, 1000), 999, 300.3, [300.3]):
        expected = CLOSED["ddpm"](torch.as_tensor(t).to(torch.float32))
        with default_dtype(torch.bfloat16):
            found = CLOSED["ddpm"](t)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


DRAWN = {**EVERY, **{f"edm {key}": hosm.EDMSchedule(**each) for key, each in RANGES.items()}}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_the_density_which_integrates_to_one(name):
    schedule, count, before = DRAWN[name], 40_000, torch.get_rng_state()
    for dtype in (torch.float32, torch.float64):
        drawn, again = (
            schedule.sample_time(count, torch.Generator().manual_seed(0), dtype=dtype)
            for _ in range(2)
        )
        assert torch.equal(drawn, again)
        if schedule.integer_time:
            assert drawn.dtype == torch.int64
            expected = count * schedule.time_density(torch.arange(schedule.t_max + 1))
            assert float(expected.sum()) == pytest.approx(count)
            # Of all indices, the first and the last among them.
            squares = (drawn.bincount() - expected).square() / expected
            assert float(squares.sum()) < len(squares) + 5 * (2 * len(squares)) ** 0.5
            continue
        assert drawn.dtype == dtype
        assert bool(((drawn >= schedule.t_min) & (drawn <= schedule.t_max)).all())
        ends = torch.tensor([schedule.t_min, schedule.t_max])
        t = torch.linspace(*(ends + 1e-6).log().tolist(), 20_001).exp() - 1e-6
        steps = torch.cumulative_trapezoid(schedule.time_density(t), t)
        assert float(steps[-1]) == pytest.approx(1, rel=1e-6)
        below = torch.searchsorted(drawn.double().sort().values, t[1:]) / count
        assert float((below - steps).abs().max()) < 2 / count**0.5  # by Kolmogorov, of 1 in 1500
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_on_the_device_asked_for_the_generators_or_the_default():
    generator = torch.Generator().manual_seed(0)
    for schedule in EVERY.values():
        assert schedule.sample_time(3, device="meta").device.type == "meta"
        with torch.device("meta"):
            assert schedule.sample_time(3).device.type == "meta"
            assert schedule.sample_time(3, generator).device.type == "cpu"
            assert schedule.sample_time(3, device="cpu").device.type == "cpu"


def test_the_largest_draw_stays_in_range_where_rounding_would_leave_it(monkeypatch):
    largest = torch.tensor([1 - 2**-24], dtype=torch.float32)
    end = torch.tensor(0.71, dtype=torch.float32)
    assert float(0.66 + (0.71 - 0.66) * largest) > float(end)
    monkeypatch.setattr(torch, "rand", lambda size, **options: largest)
    assert float(hosm.VESchedule(t_min=0.66, t_max=0.71).sample_time(1)) == float(end)


def test_what_edm_draws_in_the_range_is_the_normal_number_to_the_last_bit():
    for dtype in (torch.float32, torch.float64):
        schedule, generators = hosm.EDMSchedule(), [torch.Generator().manual_seed(0)] * 2
        t = schedule.sample_time(1000, generators[0].manual_seed(0), dtype=dtype)
        normal = torch.randn(1000, generator=generators[1].manual_seed(0), dtype=dtype)
        assert torch.equal(t, (-1.2 + 1.2 * normal).exp())


def test_a_search_under_vmap_finds_the_same():
    schedule, u = BARE["own vp"], torch.linspace(-6, 3, 40)
    found = torch.func.vmap(schedule.time)(u)
    torch.testing.assert_close(found, schedule.time(u), rtol=0, atol=1e-13)


@pytest.mark.slow
def test_a_search_is_compiled():
    schedule, u = own(sigma=torch.square), torch.linspace(-6, 3, 40)
    compiled = torch.compile(schedule.time, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(u), schedule.time(u), rtol=0, atol=0)
