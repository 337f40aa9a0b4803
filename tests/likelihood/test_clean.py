"""ode_nll(clean=True) against Gaussian data, of which the bound and what it bounds are known."""

import math

import pytest
import torch

import hosm_losses as hosm

STD = 0.5


def gaussian(schedule):
    """A model with the exact score of N(0, STD² I), and the exact log-density of its latents."""

    def network(x, t):
        alpha, sigma = (part[:, None] for part in schedule(t))
        return sigma * x / ((alpha * STD) ** 2 + sigma**2)

    alpha, sigma = schedule(torch.tensor(schedule.t_max))
    prior = torch.distributions.Normal(0.0, ((alpha * STD) ** 2 + sigma**2).sqrt())
    options = {"log_prior": lambda latent: prior.log_prob(latent).sum(1), "divergence": "exact"}
    # With these moments the path does not move, and four steps have no error.
    options |= {"data_std": STD, "steps": 4, "generator": torch.Generator().manual_seed(0)}
    return hosm.ScoreModel(network, schedule), options


def ends(schedule):
    """α and σ at t_min, and the variance of the data there."""
    alpha, sigma = schedule(torch.tensor(schedule.t_min))
    return alpha, sigma, (alpha * STD) ** 2 + sigma**2


SCHEDULES = {
    "vp": hosm.VPSchedule(),
    "much noise": hosm.VESchedule(sigma_min=0.3, sigma_max=20.0),
    "little alpha": hosm.VPSchedule(t_min=0.2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_its_mean_is_the_bound_by_hand(name):
    """−log p(x_t) and ½‖ε̂ − ε‖² are quadratic in ε, with E‖ε‖² = d."""
    schedule, d, count = SCHEDULES[name], 3, 20_000
    model, options = gaussian(schedule)
    x = torch.tensor([0.2, -1.0, 0.6])
    nll = hosm.ode_nll(model, x.expand(count, d), clean=True, **options).nll
    alpha, sigma, variance = ends(schedule)
    square = (alpha * x).square() + sigma**2
    density = 0.5 * ((2 * math.pi * variance).log() + square / variance).sum()
    rest = sigma**2 / variance
    error = 0.5 * ((sigma * alpha * x / variance).square() + (rest - 1) ** 2 - 1).sum()
    expected = density + error - d * alpha.log()
    assert abs(float(nll.mean() - expected)) < 5 * float(nll.std()) / count**0.5


def test_the_draw_of_noise_is_hardly_felt_by_an_exact_model():
    model, options = gaussian(SCHEDULES["vp"])
    x = STD * torch.randn(1, 768, generator=torch.Generator().manual_seed(1))
    result = hosm.ode_nll(model, x.expand(200, -1), clean=True, **options)
    exact = -torch.distributions.Normal(0.0, STD).log_prob(x).sum()
    assert float((result.nll - exact).abs().max()) < 0.01  # √(d/2) = 20 nats are in ½‖ε‖²


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_density_it_stands_for_is_that_of_the_model_without_bias(name):
    """The mean of exp(−nll) is ∫ p(x_t) p(x|x_t) dx_t, for every x."""
    schedule, count = SCHEDULES[name], 20_000
    model, options = gaussian(schedule)
    x = torch.tensor([0.2, -1.0])
    density = (-hosm.ode_nll(model, x.expand(count, 2), clean=True, **options).nll).exp()
    alpha, sigma, variance = ends(schedule)
    std = ((alpha * STD**2).square() / variance + (sigma / alpha) ** 2).sqrt()
    expected = torch.distributions.Normal(0.0, std).log_prob(x).sum().exp()
    assert abs(float(density.mean() - expected)) < 5 * float(density.std()) / count**0.5


def test_many_draws_are_still_a_bound_of_the_integers():
    model, options = gaussian(SCHEDULES["vp"])
    d, repeats = 192, 40
    x = STD * torch.randn(1, d, generator=torch.Generator().manual_seed(1))
    pixels = (x.clamp(-1, 0.999) * 128 + 128).to(torch.uint8)
    low, law = -1 + 2 * pixels.double() / 256, torch.distributions.Normal(0.0, STD)
    exact = -float((law.cdf(low + 2 / 256) - law.cdf(low)).log().sum())
    for draws in (1, 8):
        result = hosm.ode_nll(
            model,
            pixels.expand(repeats, d),
            clean=True,
            dequantization="uniform",
            dequantization_draws=draws,
            **options,
        )
        above = result.bits_per_dim() * d * math.log(2) - exact
        assert -5 * float(above.std()) / repeats**0.5 < float(above.mean()) < 0.2
