"""The coordinates: flat for Gaussian data, invertible, with the right volume."""

import pytest
import torch

from hosm_losses.likelihood.paths import Coordinates
from tests.schedules.test_continuous import SCHEDULES

NAMES = sorted(SCHEDULES)
MEAN = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
STD = torch.tensor([[0.5, 0.1, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_gaussian_data_stands_still_and_its_integrand_vanishes(name):
    schedule = SCHEDULES[name]
    coordinates = Coordinates(schedule, MEAN, STD)
    low, high = schedule.log_sigma_hat_range
    level = coordinates.level(torch.linspace(low, high, 7))
    z = torch.randn(7, 3)
    variance = (level.alpha * STD) ** 2 + level.sigma**2
    noise = level.sigma * (coordinates.to_x(z, level) - level.alpha * MEAN) / variance
    divergence = (level.sigma / variance).sum(1)[None]
    torch.testing.assert_close(coordinates.slope(z, noise, level), torch.zeros(7, 3))
    torch.testing.assert_close(
        coordinates.integrand(divergence, level), torch.zeros(1, 7), rtol=0, atol=1e-12
    )
    # There the log-density in z is −z²/2, whose gradient is −z.
    torch.testing.assert_close(coordinates.covector(noise, level), -z)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_invertible_and_stays_in_the_schedule(name):
    schedule = SCHEDULES[name]
    coordinates = Coordinates(schedule, MEAN, STD)
    low, high = schedule.log_sigma_hat_range
    level = coordinates.level(torch.tensor([low - 1, low, high, high + 1]))
    assert bool(((level.t >= schedule.t_min) & (level.t <= schedule.t_max)).all())
    x = torch.randn(4, 3)
    torch.testing.assert_close(coordinates.to_x(coordinates.to_z(x, level), level), x)
    volume = (level.alpha * level.scale).expand(4, 3).log().sum(1)
    torch.testing.assert_close(coordinates.log_volume(level), volume)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_probability_flow_in_these_coordinates(name):
    """dx/dt = f x + g² ε̂/(2σ), moved to z and u by a central difference along the path."""
    schedule = SCHEDULES[name]
    coordinates = Coordinates(schedule, MEAN, STD)
    low, high = schedule.log_sigma_hat_range
    u = torch.tensor([0.3 * low + 0.7 * high])
    level = coordinates.level(u)
    x, noise = torch.randn(1, 3), torch.randn(1, 3)
    t, h = level.t, 1e-6
    velocity = schedule.drift(t) * x + schedule.squared_diffusion(t) * noise / (2 * level.sigma)
    rate = schedule.squared_diffusion(t) / (2 * level.sigma[:, 0] ** 2)
    ends = []
    for sign in (1, -1):
        there = coordinates.level(u + sign * h)
        ends.append(coordinates.to_z(x + sign * h * velocity / rate, there))
    expected = (ends[0] - ends[1]) / (2 * h)
    got = coordinates.slope(coordinates.to_z(x, level), noise, level)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_has_the_levels_of_its_points_and_asks_the_schedule_once(name, monkeypatch):
    schedule = SCHEDULES[name]
    coordinates = Coordinates(schedule, MEAN, STD)
    span = schedule.log_sigma_hat_range
    u = torch.linspace(*span, 5)
    alone = [coordinates.level(each[None]) for each in u]
    asked = []
    time = type(schedule).time
    monkeypatch.setattr(type(schedule), "time", lambda *a: asked.append(1) or time(*a))
    levels = coordinates.levels(u)
    for index in range(5):
        torch.testing.assert_close(levels(index), alone[index])
    assert len(asked) == 1
    torch.testing.assert_close(coordinates.ends(span), (alone[0], alone[-1]))
