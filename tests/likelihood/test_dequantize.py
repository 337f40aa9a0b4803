"""Dequantization, and the bound that averages densities."""

import math

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.likelihood.integers import dequantize, importance_weighted
from tests.oracles import GaussianMixture, mixture_noise, networks

D = 2


def gaussian_pixels(std):
    """A model of pixels whose density in x is N(0, std²) in every element at t_min."""
    schedule = hosm.VESchedule(sigma_min=1e-4, sigma_max=20.0)
    mixture = GaussianMixture([[0.0] * D], std**2 * torch.eye(D)[None], [1.0])
    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    alpha, sigma = schedule(torch.tensor([schedule.t_max], dtype=torch.float64))

    def log_prior(latent):
        return mixture.log_density(
            latent, alpha.expand(len(latent)), sigma.to(latent).expand(len(latent))
        )

    return model, log_prior


def test_every_level_has_its_cell():
    levels = torch.arange(256, dtype=torch.uint8)
    x = torch.stack([dequantize(levels) for _ in range(20)])
    assert x.dtype == torch.float64
    cells = (x + 1) / 2 * 256
    assert torch.equal(cells.floor(), levels.double().expand(20, -1))
    assert len(cells.unique()) == cells.numel()


def test_a_flat_density_gives_eight_bits_and_the_result_knows_its_levels():
    schedule = hosm.VESchedule()
    model = hosm.ScoreModel(lambda x, t: 0 * x, schedule)
    x = torch.randint(0, 256, (5, 3, 2), dtype=torch.uint8)
    result = hosm.ode_nll(
        model,
        x,
        steps=256,
        dequantization="uniform",
        log_prior=lambda latent: -math.log(2) * 6 * torch.ones(len(latent)),
    )
    torch.testing.assert_close(result.bits_per_dim(), torch.full((5,), 8.0), rtol=0, atol=1e-7)
    assert result.quantization == (256, -1.0, 1.0)
    assert torch.equal(result.bits_per_dim(levels=256), result.bits_per_dim())
    assert result.summary().bits_per_dim == pytest.approx(8.0)


def test_the_bound_of_many_draws_approaches_the_probability_of_the_cell():
    """Narrow against the cell: one draw is far from it, many are near, and both are bounds."""
    std = 0.004  # the cell is 2/256 = 0.0078 wide
    model, log_prior = gaussian_pixels(std)
    levels = torch.tensor([128], dtype=torch.uint8).expand(400, D)
    options = {"method": "adaptive", "divergence": "exact", "log_prior": log_prior}
    law = torch.distributions.Normal(0.0, math.hypot(std, 1e-4))
    cell = torch.tensor([0.0, 2 / 256])
    probability = law.cdf(cell[1]) - law.cdf(cell[0])
    exact = -D * float(probability.log())
    means, errors = [], []
    for draws in (1, 16):
        result = hosm.ode_nll(
            model,
            levels,
            dequantization="uniform",
            dequantization_draws=draws,
            generator=torch.Generator().manual_seed(0),
            data_std=std,
            **options,
        )
        nats = result.bits_per_dim() * D * math.log(2)
        means.append(float(nats.mean()) - exact)
        errors.append(float(nats.std()) / 20)
        assert result.standard_error.tolist() == [0.0] * 400
    one = float((dequantize(levels) ** 2).mean() / (2 * std**2)) * D  # E[−log p] up to a constant
    one += D * math.log(std * math.sqrt(2 * math.pi) * 128) - exact
    assert means[0] == pytest.approx(one, abs=5 * errors[0] + 0.02)
    assert -5 * errors[1] < means[1] < 0.1 * means[0]


def test_draws_are_weighed_by_their_density():
    """By hand: densities 1/4 and 3/4 of their sum."""

    def draw(density, error, failed):
        zero = torch.zeros(1)
        nll = -torch.tensor([density]).log()
        return hosm.NLLResult(
            nll, zero[:, None], zero + 9, zero, zero + error, torch.tensor([failed])
        )

    result = importance_weighted([draw(0.1, 4.0, False), draw(0.3, 8.0, True)])
    assert float(result.nll) == pytest.approx(-math.log(0.2))
    assert float(result.solver_error) == pytest.approx(7.0)
    assert float(result.nfe) == 18
    assert bool(result.failed)


def test_draws_cost_what_they_say():
    model, log_prior = gaussian_pixels(0.1)
    x = torch.zeros(3, D, dtype=torch.uint8)
    result = hosm.ode_nll(
        model,
        x,
        steps=8,
        divergence="exact",
        log_prior=log_prior,
        dequantization="uniform",
        dequantization_draws=5,
    )
    assert result.nfe.tolist() == [5 * 18] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_gets_its_own_dtype(dtype):
    network, shape = networks()["conv"]
    model = hosm.ScoreModel(network.to(dtype), hosm.VPSchedule())
    x = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    result = hosm.ode_nll(model, x, steps=8, dequantization="uniform")
    assert result.latent.dtype == dtype
    assert result.nll.dtype == torch.float64
