"""The variational bound against closed forms of Gaussians, and what its chance does."""

import math

import pytest
import torch
from torch.distributions import Normal

import hosm_losses as hosm
from tests.cases import MLP, SCHEDULES, VP
from tests.likelihood.problems import gaussian, marginals, total


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_bound(schedule, x, mean, std, prior):
    """The bound of one element under the exact score, integrated by hand.

    With w = σ̂², in one dimension: the prior's KL, ∫ E r² dw/(2w) by a fine midpoint rule in log w,
    and the normal decoder.
    """
    alpha, sigma = schedule(torch.tensor([schedule.t_min, schedule.t_max]))
    low, high = (2 * (sigma / alpha).log()).tolist()
    count = 200_000
    w = torch.exp(low + (high - low) * (torch.arange(count) + 0.5) / count)
    squared = (w * (x - mean)[:, None] ** 2 + std**4) / (std**2 + w) ** 2
    integral = squared.mean(1) * (high - low) / 2
    latent = Normal(alpha[1] * x, sigma[1])
    first = math.exp(low)
    at_start = (first * (x - mean) ** 2 + std**4) / (std**2 + first) ** 2
    start = math.log(2 * math.pi * first) / 2 + at_start / 2
    return torch.distributions.kl_divergence(latent, prior) + integral + start


@pytest.mark.filterwarnings("ignore:schedule. expected")
@pytest.mark.parametrize("name", SCHEDULES)
def test_gaussian_data_has_the_closed_form_without_chance(name):
    """With the data's own moments all that is random cancels, but for a prior that is sampled."""
    schedule, options = SCHEDULES[name], {"samples": 256, "data_mean": 0.4, "data_std": 0.7}
    model, x = gaussian(schedule, 0.4, 0.7), torch.tensor([[-1.0], [0.4], [2.0]])
    (_, end), wide = marginals(schedule, 0.4, 0.7), Normal(0.0, schedule.prior_std)
    exact = hosm.variational_nll(model, x, **options)
    expected = gaussian_bound(schedule, x[:, 0], 0.4, 0.7, wide)
    torch.testing.assert_close(exact.nll, expected, rtol=0, atol=1e-8)
    assert float(exact.standard_error.max()) < 1e-8
    options["log_prior"] = lambda latent: total(end.log_prob(latent))
    sampled = hosm.variational_nll(model, x, **options)
    expected = gaussian_bound(schedule, x[:, 0], 0.4, 0.7, end)
    assert bool(((sampled.nll - expected).abs() <= 5 * sampled.standard_error + 1e-8).all())
    alpha, sigma = schedule(torch.tensor(schedule.t_max))
    offsets = (alpha * (x[:, 0] - 0.4)).abs()
    spread = (sigma * torch.sqrt(sigma**2 / 2 + offsets**2) / end.variance) / 16
    torch.testing.assert_close(sampled.standard_error, spread, rtol=0.25, atol=1e-8)


def test_it_is_unbiased_and_its_standard_error_is_honest():
    """One sample repeated, against the same with far more draws and another control variate."""
    model, repeats = hosm.ScoreModel(MLP(3), VP), 2000
    x = torch.randn(1, 3).expand(repeats, -1)
    few = hosm.variational_nll(model, x, samples=8, generator=seeded())
    many = hosm.variational_nll(model, x, samples=64, data_std=1.0, generator=seeded(1))
    spread = float(few.nll.std())
    both = math.hypot(spread, float(many.nll.std())) / repeats**0.5
    assert abs(float(few.nll.mean() - many.nll.mean())) < 5 * both
    variance, squares = few.standard_error**2, (few.nll - few.nll.mean()) ** 2
    noise = float(variance.std() + squares.std()) / repeats**0.5
    assert abs(float(variance.mean() - squares.mean())) < 5 * noise
    assert float(many.nll.std()) < 0.5 * spread


def test_a_network_that_predicts_nothing_has_a_known_bound_and_variance():
    """‖ε̂ − ε‖² = ‖ε‖², of mean d and variance 2d, and a control variate that hardly varies."""
    schedule = hosm.VESchedule(sigma_min=0.1, sigma_max=0.2)
    model, samples, at_start = hosm.ScoreModel(lambda x, t: 0 * x, schedule), 8, 2
    repeats, d = 4000, 3
    options = {"samples": samples, "data_std": 1e-4, "generator": seeded()}
    result = hosm.variational_nll(model, torch.zeros(repeats, d), **options)
    low, high = schedule.log_sigma_hat_range
    integral, start = d * (high - low), d / 2 * (math.log(2 * math.pi) + 1) + d * low
    # The prior is N(0, 0.2²), and so is x at t_max.
    error = result.nll - (integral + start)
    assert abs(float(error.mean())) < 5 * float(error.std()) / repeats**0.5
    variance = 2 * d * ((high - low) ** 2 / samples + 1 / (4 * at_start))
    for found in (result.standard_error**2, error**2):
        assert abs(float(found.mean()) - variance) < 5 * float(found.std()) / repeats**0.5


def test_noise_levels_are_spread_evenly():
    """An error that depends on the level alone: strata leave far less of it to chance."""
    schedule = SCHEDULES["ve"]
    model = hosm.ScoreModel(lambda x, t: 1e3 * t[:, None].expand_as(x), schedule)
    result = hosm.variational_nll(model, torch.zeros(500, 1), samples=8, generator=seeded())
    low, high = schedule.log_sigma_hat_range
    independent = 1e6 * (high - low) * math.sqrt(4 / 45 / 8)
    assert float(result.nll.std()) < 0.4 * independent


@pytest.mark.parametrize("draws", [1, 2])
def test_a_bound_has_no_products_and_no_probes(draws):
    model, images = gaussian(VP, 0.4, 0.7), torch.zeros(4, 2, dtype=torch.uint8)
    bound = hosm.variational_nll(model, images, dequantization=hosm.Uniform(draws=draws))
    assert bound.products is None
    assert bound.summary().products is None
    assert " (draws " in str(bound)
    assert "probes" not in str(bound)
    assert "products" not in str(bound)
    exact = hosm.variational_nll(model, images / 255.0)
    solved = hosm.ode_nll(model, images / 255.0, solver=hosm.Adaptive(), divergence="exact")
    with pytest.raises(ValueError, match=r"cat: .* same arguments"):
        hosm.NLLResult.cat([exact, solved])
