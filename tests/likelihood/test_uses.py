"""A use of a density that the page describes in a sentence: it holds."""

import math

import torch
from torch.distributions import Independent, Normal

import hosm_losses as hosm
from tests.cases import VP
from tests.oracles import GaussianMixture, mixture_noise

EXACT = {"divergence": "exact"}


def mixture(d):
    generator = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(4, d, generator=generator)
    covariances = 0.09 * torch.eye(d).expand(4, d, d)
    return GaussianMixture(means, covariances, torch.full((4,), 0.25))


def test_tempered_latents_are_nearer_to_a_tempered_target():
    data, temperature, count = mixture(8), 1.3, 200
    model = hosm.ScoreModel(mixture_noise(data, VP), VP)
    z, std = torch.randn(count, 8), temperature**0.5
    prior = Independent(Normal(torch.zeros(8), std * VP.prior_std), 1)

    def target(x):
        alpha, sigma = VP(torch.full((len(x),), VP.t_min))
        return data.log_density(x, alpha, sigma) / temperature

    hot, cold = (
        hosm.importance_weights(hosm.ode_sample(model, latent, **EXACT, **options), target)
        for latent, options in ((std * z, {"log_prior": prior}), (z, {}))
    )
    assert hot.effective_sample_size > 0.8 * count > cold.effective_sample_size
    apart = hot.log_z - cold.log_z
    assert abs(apart) < 5 * math.hypot(hot.log_z_error, cold.log_z_error)
