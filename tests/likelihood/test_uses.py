"""Uses of a density that the page describes in a sentence: each holds."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

import hosm_losses as hosm
from tests.cases import SCHEDULES, VP
from tests.oracles import GaussianMixture, mixture_noise
from tests.subspaces import PARTICLES, basis, centred

EXACT = {"divergence": "exact"}


def mixture(d):
    generator = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(4, d, generator=generator)
    covariances = 0.09 * torch.eye(d).expand(4, d, d)
    return GaussianMixture(means, covariances, torch.full((4,), 0.25))


@pytest.mark.parametrize("prediction", ["epsilon", "score", "x0", "v", "velocity"])
@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_the_density_in_the_subspace_without_a_centre_of_mass(name, prediction):
    """Three particles in two dimensions, normal in the four that are left, in closed form."""
    schedule, Q = SCHEDULES[name], basis(centred, PARTICLES)
    variances = torch.tensor([0.1, 0.3, 0.5, 1.0], dtype=torch.float64)

    def network(x, t):
        alpha, sigma = (each[:, None] for each in schedule(t))
        y, junk = x.flatten(1) @ Q, torch.cos(x + 1)
        eps = sigma * y / (alpha**2 * variances + sigma**2)
        x0 = (y - sigma * eps) / alpha
        if prediction == "velocity":
            rates = (each[:, None] for each in schedule.rates(t))
            value = sum(rate * part for rate, part in zip(rates, (x0, eps), strict=True))
        else:
            forms = {"epsilon": eps, "score": -eps / sigma, "x0": x0}
            value = forms.get(prediction, alpha * eps - sigma * x0)
        return (value @ Q.T).reshape(x.shape) + junk - centred(junk)

    model = hosm.ScoreModel(network, schedule, prediction, subspace=centred)
    y = variances.sqrt() * torch.randn(4, 4, dtype=torch.float64)
    ends = [schedule(torch.tensor(t)) for t in (schedule.t_min, schedule.t_max)]
    (low, first), (high, last) = ends
    # The prior is N(0, prior_std²) in place of the density at t_max.
    wide = (low**2 * variances + first**2) / (high**2 * variances + last**2)
    wide = wide * schedule.prior_std**2
    exact = (y.square() / wide + torch.log(2 * math.pi * wide)).sum(1) / 2
    x, solver = (y @ Q.T).reshape(4, *PARTICLES), hosm.FixedGrid(128, data_std=0.7)
    found = hosm.ode_nll(model, x, solver=solver, **EXACT)
    torch.testing.assert_close(found.nll, exact, rtol=0, atol=1e-6)
    drawn = hosm.ode_sample(model, found.latent, solver=solver, **EXACT)
    torch.testing.assert_close(drawn.x, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn.nll, exact, rtol=0, atol=1e-6)


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


def test_the_score_of_the_density_is_its_gradient():
    data = mixture(3)
    model = hosm.ScoreModel(mixture_noise(data, VP), VP)
    x = data.sample(3, torch.Generator().manual_seed(0)).requires_grad_()
    log_q = -hosm.ode_nll(model, x, **EXACT, enable_grad=True).nll
    (score,) = torch.autograd.grad(log_q.sum(), x)
    exact = model.score(x.detach(), torch.full((3,), VP.t_min))
    torch.testing.assert_close(score, exact, rtol=0, atol=0.01 * float(exact.abs().max()))
