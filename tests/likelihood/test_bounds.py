"""What ode_nll bounds for clean data and for integers, where that and the bound are known."""

import math

import pytest
import torch
from torch.distributions import Normal

import hosm_losses as hosm
from hosm_losses.likelihood.integers import importance_weighted
from tests.cases import VP, networks
from tests.likelihood.problems import gaussian, marginals, total


def solved(schedule, std, x, repeats, **options):
    """Of repeats of x; the path does not move, so four steps will do, and any signs as probes."""
    end, x = marginals(schedule, std=std)[1], x.expand(repeats, *x.shape)
    options |= {"log_prior": lambda latent: total(end.log_prob(latent))}
    solver = hosm.FixedGrid(4, data_std=std)
    return hosm.ode_nll(gaussian(schedule, std=std), x, solver=solver, **options)


SCHEDULES = {
    "vp": VP,
    "much noise": hosm.VESchedule(sigma_min=0.3, sigma_max=20.0),
    "little alpha": hosm.VPSchedule(t_min=0.2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_mean_for_clean_data_and_that_of_its_density_by_hand(name):
    """−log p(x_t) and ½‖ε̂ − ε‖² are quadratic in ε; exp(−nll) is ∫ p(x_t) p(x|x_t) dx_t."""
    schedule, d, count, std = SCHEDULES[name], 2, 20_000, 0.5
    x = torch.tensor([0.2, -1.0])
    nll = solved(schedule, std, x, count, clean=True).nll
    alpha, sigma = schedule(torch.tensor(schedule.t_min))
    variance = (alpha * std) ** 2 + sigma**2
    square = (alpha * x).square() + sigma**2
    density = 0.5 * ((2 * math.pi * variance).log() + square / variance).sum()
    rest = sigma**2 / variance
    error = 0.5 * ((sigma * alpha * x / variance).square() + (rest - 1) ** 2 - 1).sum()
    wide = ((alpha * std**2).square() / variance + (sigma / alpha) ** 2).sqrt()
    for found, mean in (
        (nll, density + error - d * alpha.log()),
        ((-nll).exp(), Normal(0.0, wide).log_prob(x).sum().exp()),
    ):
        assert abs(float(found.mean() - mean)) < 5 * float(found.std()) / count**0.5


def test_the_bound_of_many_draws_approaches_the_probability_of_the_cell():
    """Narrow against the cell of 2/256: one draw is far from it and many are near."""
    schedule, std, d = hosm.VESchedule(sigma_min=1e-4, sigma_max=20.0), 0.004, 2
    cell = torch.tensor(2 / 256)
    exact = -d * float((Normal(0.0, math.hypot(std, 1e-4)).cdf(cell) - 0.5).log())
    levels, gaps, errors = torch.full((d,), 128, dtype=torch.uint8), [], []
    for draws in (1, 16):
        options = {"dequantization": hosm.Uniform(draws), "divergence": "exact"}
        result = solved(schedule, std, levels, 400, **options)
        nats = result.bits_per_dim() * d * math.log(2)
        gaps.append(float(nats.mean()) - exact)
        errors.append(float(nats.std()) / 20)
    # E[−log p] of a uniform draw of the cell.
    one = d * (float(cell) ** 2 / 6 / std**2 + math.log(std * math.sqrt(2 * math.pi) * 128))
    assert gaps[0] == pytest.approx(one - exact, abs=5 * errors[0] + 0.02)
    assert -5 * errors[1] < gaps[1] < 0.1 * gaps[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_of_images_gets_its_own_dtype(dtype):
    network, shape = networks()["conv"]
    x = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    model = hosm.ScoreModel(network.to(dtype), VP)
    result = hosm.ode_nll(model, x, solver=hosm.FixedGrid(8), dequantization=hosm.Uniform())
    assert (result.latent.dtype, result.nll.dtype) == (dtype, torch.float64)


def test_draws_are_weighed_by_their_density():
    """By hand: densities 1/4 and 3/4 of their sum."""

    def draw(density, error, failed):
        zero = torch.zeros(1)
        parts = {"latent": zero[:, None], "nfe": zero + 9, "standard_error": zero}
        nll, failed = -torch.tensor([density]).log(), torch.tensor([failed])
        return hosm.NLLResult(nll, solver_error=zero + error, failed=failed, **parts)

    result = importance_weighted([draw(0.1, 4.0, False), draw(0.3, 8.0, True)])
    assert float(result.nll) == pytest.approx(-math.log(0.2))
    assert float(result.solver_error) == pytest.approx(7.0)
    assert (float(result.nfe), bool(result.failed)) == (18, True)
