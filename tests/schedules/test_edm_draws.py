"""EDM's times in any range: a normal distribution of log σ between the ends, and its density."""

import mpmath
import pytest
import torch

import hosm_losses as hosm
from tests.schedules.checks import assert_that_a_sampler_changes_no_mean

RANGES = {
    "default": {},
    "narrow": {"t_min": 0.1, "t_max": 1.0},
    "VEPrecond": {"t_min": 0.02, "t_max": 100.0},
    "from within": {"t_min": 0.3, "t_max": 200.0},
    "far above": {"t_min": 20.0, "t_max": 80.0},
    "far below": {"t_min": 1e-4, "t_max": 3e-3},
    "moved": {"t_min": 0.5, "log_mean": 1.0, "log_std": 0.5},
}
COUNT = 20_001


def exact(schedule):
    """Density of t, and its distribution, in 40 digits."""
    mean, std = mpmath.mpf(schedule.log_mean), mpmath.mpf(schedule.log_std)

    def below(t):
        return mpmath.ncdf((mpmath.log(t) - mean) / std)

    low, high = below(schedule.t_min), below(schedule.t_max)

    def density(t):
        return mpmath.npdf(mpmath.log(t), mean, std) / (t * (high - low))

    return density, lambda t: (below(t) - low) / (high - low)


@pytest.mark.parametrize("name", RANGES)
def test_the_density_is_that_of_the_normal_distribution_between_the_ends(name):
    schedule = hosm.EDMSchedule(**RANGES[name])
    t = torch.linspace(schedule.t_min, schedule.t_max, 7)
    with mpmath.workdps(40):
        density, _ = exact(schedule)
        expected = torch.tensor([float(density(mpmath.mpf(each))) for each in t.tolist()])
    torch.testing.assert_close(schedule.time_density(t), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RANGES)
def test_normal_numbers_at_even_quantiles_become_times_at_even_quantiles(name, dtype, monkeypatch):
    schedule = hosm.EDMSchedule(**RANGES[name])
    quantiles = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    normal = torch.special.ndtri(quantiles).to(dtype)
    monkeypatch.setattr(torch, "randn", lambda shape, **options: normal)
    t = schedule.sample_time(COUNT, dtype=dtype)
    assert t.dtype == dtype
    assert bool(((t >= schedule.t_min) & (t <= schedule.t_max)).all())
    some = torch.arange(0, COUNT, 500)
    with mpmath.workdps(40):
        _, below = exact(schedule)
        found = [
            float(below(mpmath.mpf(each))) for each in t.double().sort().values[some].tolist()
        ]
    # Where what comes from the tails lies between the draws that are kept is off by one of each.
    bound = 4 / COUNT
    torch.testing.assert_close(torch.tensor(found), (some + 0.5) / COUNT, rtol=0, atol=bound)


def test_what_is_drawn_inside_is_kept_to_the_last_bit():
    schedule = hosm.EDMSchedule(t_min=0.1, t_max=1.0)
    for dtype in (torch.float32, torch.float64):
        t = schedule.sample_time(1000, torch.Generator().manual_seed(0), dtype=dtype)
        normal = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
        plain = (-1.2 + 1.2 * normal).exp()
        inside = (plain > 0.1) & (plain < 1.0)
        assert 600 < int(inside.sum()) < 700
        assert torch.equal(t[inside], plain[inside])


@pytest.mark.parametrize("weighting", ["noise", "likelihood"])
def test_a_sampler_changes_no_mean(weighting):
    schedule = hosm.EDMSchedule(t_min=0.1, t_max=1.0)
    model = hosm.ScoreModel(lambda x, t: x * t[:, None], schedule)
    assert_that_a_sampler_changes_no_mean(model, weighting, 100_000)


@pytest.mark.parametrize("ends", [(1e6, 1e7), (1e-9, 1e-8)])
def test_a_range_without_any_draws_is_an_error_where_it_is_drawn_from(ends):
    schedule = hosm.EDMSchedule(t_min=ends[0], t_max=ends[1])
    model = hosm.ScoreModel(lambda x, t: x, schedule)
    with pytest.raises(ValueError):
        hosm.first_order_dsm(model, torch.zeros(2, 1))
    t = torch.full((2,), ends[1])
    hosm.first_order_dsm(model, torch.zeros(2, 1), t=t)
