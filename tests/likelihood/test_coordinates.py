"""The coordinates: flat for Gaussian data, invertible, with the right volume."""

import pytest
import torch

from hosm_losses.likelihood.coordinates import Coordinates
from tests.schedules.test_continuous import SCHEDULES

NAMES = sorted(SCHEDULES)
MEAN = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
STD = torch.tensor([[0.5, 0.1, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_gaussian_data_stands_still_and_its_integrand_vanishes(name):
    schedule = SCHEDULES[name]
    coordinates = Coordinates(schedule, MEAN, STD)
    low, high = schedule.log_sigma_hat_range
    place = coordinates.place(torch.linspace(low, high, 7))
    z = torch.randn(7, 3)
    variance = (place.alpha * STD) ** 2 + place.sigma**2
    noise = place.sigma * (coordinates.to_x(z, place) - place.alpha * MEAN) / variance
    divergence = (place.sigma / variance).sum(1)[None]
    torch.testing.assert_close(coordinates.slope(z, noise, place), torch.zeros(7, 3))
    torch.testing.assert_close(
        coordinates.integrand(divergence, place), torch.zeros(1, 7), rtol=0, atol=1e-12
    )
    # There the log-density in z is −z²/2, whose gradient is −z.
    torch.testing.assert_close(coordinates.covector(noise, place), -z)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_invertible_and_stays_in_the_schedule(name):
    schedule = SCHEDULES[name]
    coordinates = Coordinates(schedule, MEAN, STD)
    low, high = schedule.log_sigma_hat_range
    place = coordinates.place(torch.tensor([low - 1, low, high, high + 1]))
    assert bool(((place.t >= schedule.t_min) & (place.t <= schedule.t_max)).all())
    x = torch.randn(4, 3)
    torch.testing.assert_close(coordinates.to_x(coordinates.to_z(x, place), place), x)
    volume = (place.alpha * place.scale).expand(4, 3).log().sum(1)
    torch.testing.assert_close(coordinates.log_volume(place), volume)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_probability_flow_in_these_coordinates(name):
    """dx/dt = f x + g² ε̂/(2σ), moved to z and u by a central difference along the path."""
    schedule = SCHEDULES[name]
    coordinates = Coordinates(schedule, MEAN, STD)
    low, high = schedule.log_sigma_hat_range
    u = torch.tensor([0.3 * low + 0.7 * high])
    place = coordinates.place(u)
    x, noise = torch.randn(1, 3), torch.randn(1, 3)
    t, h = place.t, 1e-6
    velocity = schedule.drift(t) * x + schedule.squared_diffusion(t) * noise / (2 * place.sigma)
    rate = schedule.squared_diffusion(t) / (2 * place.sigma[:, 0] ** 2)
    ends = []
    for sign in (1, -1):
        there = coordinates.place(u + sign * h)
        ends.append(coordinates.to_z(x + sign * h * velocity / rate, there))
    expected = (ends[0] - ends[1]) / (2 * h)
    got = coordinates.slope(coordinates.to_z(x, place), noise, place)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
