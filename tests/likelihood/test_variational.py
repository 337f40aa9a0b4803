"""The variational bound against closed forms, and against the entropy of mixtures."""

import math

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.oracles import GaussianMixture, mixture_noise, networks, paper_mixture, ring
from tests.schedules.test_continuous import SCHEDULES


def gaussian_bound(schedule, x, mean, std):
    """The bound of one element under the exact score and the exact prior, integrated by hand.

    With w = σ̂², in one dimension: the prior's KL, ∫ E r² dw/(2w) by a fine midpoint rule in log w,
    and the normal decoder.
    """
    ends = torch.tensor([schedule.t_min, schedule.t_max])
    alpha, sigma = schedule(ends)
    low, high = (2 * (sigma / alpha).log()).tolist()
    count = 200_000
    w = torch.exp(low + (high - low) * (torch.arange(count) + 0.5) / count)
    squared = (w * (x - mean)[:, None] ** 2 + std**4) / (std**2 + w) ** 2
    integral = squared.mean(1) * (high - low) / 2
    marginal = (alpha[1] * std) ** 2 + sigma[1] ** 2
    offset = (alpha[1] * (x - mean)) ** 2
    prior = ((offset + sigma[1] ** 2) / marginal - 1 - torch.log(sigma[1] ** 2 / marginal)) / 2
    first = math.exp(low)
    at_start = (first * (x - mean) ** 2 + std**4) / (std**2 + first) ** 2
    return prior + integral + math.log(2 * math.pi * first) / 2 + at_start / 2


def exact_model(name, mixture):
    """The exact score and the density at t_max."""
    schedule = SCHEDULES[name]
    alpha, sigma = schedule(torch.tensor([schedule.t_max], dtype=torch.float64))

    def log_prior(latent):
        n = len(latent)
        return mixture.log_density(latent, alpha.expand(n), sigma.expand(n))

    return hosm.ScoreModel(mixture_noise(mixture, schedule), schedule), log_prior


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_gaussian_data_has_the_closed_form_without_chance(name):
    """With the data's own moments all that is random cancels, but for a prior that is sampled."""
    mean, std = 0.4, 0.7
    model, _ = exact_model(name, GaussianMixture([[mean]], [[[std**2]]], [1.0]))
    x = torch.tensor([[-1.0], [0.4], [2.0]])
    schedule = model.schedule
    alpha, sigma = schedule(torch.tensor(schedule.t_max))
    width = float((alpha * std) ** 2 + sigma**2)

    def log_prior(latent):
        return -((latent - alpha * mean) ** 2 / width + math.log(2 * math.pi * width))[:, 0] / 2

    result = hosm.variational_nll(
        model, x, samples=512, data_mean=mean, data_std=std, log_prior=log_prior
    )
    expected = gaussian_bound(schedule, x[:, 0], mean, std)
    # The prior alone is sampled: 5 standard errors of it.
    assert bool(((result.nll - expected).abs() <= 5 * result.standard_error + 1e-8).all())
    offsets = (alpha * (x[:, 0] - mean)).abs()
    spread = (sigma * torch.sqrt(sigma**2 / 2 + offsets**2) / width) / 512**0.5
    torch.testing.assert_close(result.standard_error, spread, rtol=0.25, atol=1e-8)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_normal_prior_is_integrated_exactly(name):
    """The same bound by the default prior and by its log-density, to five standard errors."""
    model, _ = exact_model(name, ring(3, 0.3))
    std = model.schedule.prior_std
    normal = torch.distributions.Normal(0.0, std)
    x = torch.randn(4, 2)
    options = {"samples": 512, "data_std": 1.0}
    exact = hosm.variational_nll(model, x, generator=torch.Generator().manual_seed(0), **options)
    sampled = hosm.variational_nll(
        model,
        x,
        log_prior=lambda latent: normal.log_prob(latent).sum(1),
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    assert bool((sampled.standard_error > exact.standard_error).all())
    assert bool(((sampled.nll - exact.nll).abs() < 5 * sampled.standard_error).all())


def test_the_bound_is_close_to_the_density_for_an_exact_score():
    """As t_min goes to 0 only the decoder's gap remains, about (σ̂/s)⁴/4 an element."""
    mean, std = 0.2, 0.5
    schedule = hosm.VESchedule(sigma_min=0.005, sigma_max=50.0)
    mixture = GaussianMixture([[mean]], [[[std**2]]], [1.0])
    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    x = torch.tensor([[-0.5], [0.2], [1.5]])
    result = hosm.variational_nll(model, x, data_mean=mean, data_std=std, samples=8)
    exact = -torch.distributions.Normal(mean, std).log_prob(x)[:, 0]
    torch.testing.assert_close(result.nll, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("mixture", [paper_mixture, ring])
def test_on_mixtures_it_is_at_least_the_entropy_in_expectation(name, mixture):
    mixture = mixture()
    model, log_prior = exact_model(name, mixture)
    count = 4000
    x = mixture.sample(count, torch.Generator().manual_seed(0))
    zero, one = torch.zeros(count), torch.ones(count)
    exact = -mixture.log_density(x, one, zero)
    result = hosm.variational_nll(
        model, x, log_prior=log_prior, generator=torch.Generator().manual_seed(1)
    )
    gap = result.nll - exact
    error = float(gap.std()) / count**0.5
    assert float(gap.mean()) > -5 * error
    # With the exact score the decoder alone keeps them apart.
    assert float(gap.mean()) < 0.05
    # A wrong score costs: the same draws with the noise predicted 20 % too small.
    wrong = hosm.ScoreModel(lambda x, t: 0.8 * model.noise(x, t), model.schedule)
    worse = hosm.variational_nll(
        wrong, x, log_prior=log_prior, generator=torch.Generator().manual_seed(1)
    )
    cost = worse.nll - result.nll
    assert float(cost.mean()) > 5 * float(cost.std()) / count**0.5


def test_it_is_unbiased_and_its_standard_error_is_honest():
    """One sample repeated, against the same with far more draws and another control variate."""
    network, shape = networks()["mlp"]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    repeats = 2000
    x = torch.randn(1, *shape).expand(repeats, -1)
    result = hosm.variational_nll(model, x, samples=8, generator=torch.Generator().manual_seed(0))
    many = hosm.variational_nll(
        model, x, samples=64, data_std=1.0, generator=torch.Generator().manual_seed(1)
    )
    spread = float(result.nll.std())
    both = math.hypot(spread, float(many.nll.std())) / repeats**0.5
    assert abs(float(result.nll.mean() - many.nll.mean())) < 5 * both
    variance, squares = result.standard_error**2, (result.nll - result.nll.mean()) ** 2
    noise = float(variance.std() + squares.std()) / repeats**0.5
    assert abs(float(variance.mean() - squares.mean())) < 5 * noise
    assert float(many.nll.std()) < 0.5 * spread


def test_a_network_that_predicts_nothing_has_a_known_bound_and_variance():
    """‖ε̂ − ε‖² = ‖ε‖², of mean d and variance 2d, and a control variate that hardly varies."""
    schedule = hosm.VESchedule(sigma_min=0.1, sigma_max=0.2)
    model = hosm.ScoreModel(lambda x, t: 0 * x, schedule)
    repeats, d, samples, at_start = 4000, 3, 8, 2
    x = torch.zeros(repeats, d)
    result = hosm.variational_nll(
        model, x, samples=samples, data_std=1e-4, generator=torch.Generator().manual_seed(0)
    )
    low, high = schedule.log_sigma_hat_range
    integral, start = d * (high - low), d / 2 * (math.log(2 * math.pi) + 1) + d * low
    # The prior is N(0, 0.2²), and so is x at t_max.
    error = result.nll - (integral + start)
    assert abs(float(error.mean())) < 5 * float(error.std()) / repeats**0.5
    variance = 2 * d * ((high - low) ** 2 / samples + 1 / (4 * at_start))
    estimates = result.standard_error**2
    assert abs(float(estimates.mean()) - variance) < 5 * float(estimates.std()) / repeats**0.5
    squares = error**2
    assert abs(float(squares.mean()) - variance) < 5 * float(squares.std()) / repeats**0.5


def test_noise_levels_are_spread_evenly():
    """An error that depends on the level alone: strata leave far less of it to chance."""
    schedule = hosm.VESchedule()
    model = hosm.ScoreModel(lambda x, t: 1e3 * t[:, None].expand_as(x), schedule)
    x = torch.zeros(500, 1)
    result = hosm.variational_nll(model, x, samples=8, generator=torch.Generator().manual_seed(0))
    low, high = schedule.log_sigma_hat_range
    independent = 1e6 * (high - low) * math.sqrt(4 / 45 / 8)
    assert float(result.nll.std()) < 0.4 * independent


def test_the_control_variate_pays_on_data_that_is_nearly_gaussian():
    mixture = GaussianMixture([[0.0] * 8], (torch.eye(8) * 0.25 + 0.05)[None], [1.0])
    model, _ = exact_model("ve", mixture)
    x = mixture.sample(50, torch.Generator().manual_seed(0))
    errors = [
        float(
            hosm.variational_nll(
                model, x, data_std=std, generator=torch.Generator().manual_seed(0)
            ).standard_error.mean()
        )
        for std in (0.55, 1e-3)
    ]
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_calls_are_counted_and_no_mode_changes_the_value(mode):
    network, shape = networks()["attention"]
    seen = []

    class Counted(nn.Module):
        def forward(self, x, t, label):
            seen.append(len(x))
            return network(x, t, label)

    model = hosm.ScoreModel(Counted(), hosm.VPSchedule())
    x, label = torch.randn(5, *shape), torch.randn(5)
    results = []
    for around in (torch.enable_grad, mode):
        seen.clear()
        with around():
            results.append(
                hosm.variational_nll(
                    model,
                    x * 1,
                    samples=16,
                    batch_size=2,
                    generator=torch.Generator().manual_seed(0),
                    model_kwargs={"label": label * 1},
                )
            )
        assert sum(seen) == int(results[-1].nfe.sum()) == 5 * 18
        assert max(seen) == 2
        assert not results[-1].nll.requires_grad
    torch.testing.assert_close(*[result.nll for result in results])
    assert results[0].latent.shape == x.shape


def test_images_in_eight_bits():
    network, shape = networks()["conv"]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x = torch.randint(0, 256, (4, *shape), dtype=torch.uint8)
    result = hosm.variational_nll(model, x, dequantization="uniform")
    expected = result.nll / (x[0].numel() * math.log(2)) + 7
    torch.testing.assert_close(result.bits_per_dim(), expected)


def test_a_sample_that_fails_is_flagged_and_spares_its_batch_mates():
    def network(x, t):
        return torch.where(x[:, :1] > 1e3, torch.full_like(x, math.nan), 0 * x)

    x = torch.tensor([[0.1, 0.2], [1e6, 0.0]])
    result = hosm.variational_nll(hosm.ScoreModel(network, hosm.VESchedule()), x)
    assert result.failed.tolist() == [False, True]
    assert result.nll.isnan().tolist() == [False, True]
