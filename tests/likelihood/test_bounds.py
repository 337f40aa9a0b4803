"""What ode_nll bounds for clean data and for integers, where that and the bound are known."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Normal

import hosm_losses as hosm
from hosm_losses.likelihood.result import Quantization
from tests.cases import VP, networks
from tests.likelihood.problems import gaussian, marginals, total
from tests.oracles import GaussianMixture, mixture_noise

NARROW = hosm.VESchedule(sigma_min=1e-4, sigma_max=20.0)
CELL = 2 / 255


def solved(schedule, std, x, repeats, **options):
    """Of repeats of x; the path does not move, so four steps will do, and any signs as probes."""
    end, x = marginals(schedule, std=std)[1], x.expand(repeats, *x.shape)
    options |= {"log_prior": lambda latent: total(end.log_prob(latent))}
    solver = hosm.FixedGrid(4, data_std=std)
    return hosm.ode_nll(gaussian(schedule, std=std), x, solver=solver, **options)


def nats(std, levels, repeats, dequantization, schedule=NARROW):
    """Of repeats of levels, under the exact model of N(0, std²)."""
    options = {"dequantization": dequantization, "divergence": "exact"}
    found = solved(schedule, std, levels.byte(), repeats, **options)
    return found.bits_per_dim() * len(levels) * math.log(2)


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
    std, d = 0.004, 2
    cell = torch.tensor(2 / 256)
    exact = -d * float((Normal(0.0, math.hypot(std, 1e-4)).cdf(cell) - 0.5).log())
    gaps, errors = [], []
    for draws in (1, 16):
        found = nats(std, torch.full((d,), 128), 400, hosm.Uniform(draws))
        gaps.append(float(found.mean()) - exact)
        errors.append(float(found.std()) / 20)
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


class Halved(hosm.Schedule):
    """Half of what `VESchedule` has, so that α is not 1 at the start."""

    t_min, t_max = 1e-4, 20.0

    def alpha(self, t):
        return torch.full_like(t, 0.5)

    def sigma(self, t):
        return 0.5 * t


@pytest.mark.parametrize("schedule", [NARROW, hosm.VPSchedule(t_min=1e-6), Halved()])
def test_the_bound_of_a_truncated_normal_is_its_closed_form(schedule):
    """Data N(0, 0.03²): E[−log p_t(x_t)] + E log q(x_t) with the second moment of u."""
    level, std, tau, repeats = torch.tensor([130]), 0.03, 3.0, 40_000
    cell = torch.tensor(CELL)
    y, sigma_hat = -1 + float(level) * CELL, CELL / 6
    found = nats(std, level, repeats, hosm.TruncatedNormal(), schedule)
    mass = math.erf(tau / 2**0.5)
    square = 1 - 2 * tau * math.exp(-(tau**2) / 2) / math.sqrt(2 * math.pi) / mass
    wide = std**2 + sigma_hat**2
    cross = (math.log(2 * math.pi * wide) + (y**2 + sigma_hat**2 * square) / wide) / 2
    entropy = (square + math.log(2 * math.pi)) / 2 + math.log(sigma_hat * mass)
    bound, error = cross - entropy, float(found.std()) / repeats**0.5
    assert abs(float(found.mean()) - bound) < 5 * error < 0.02
    # Above −log P(k), by little.
    law = Normal(0.0, math.sqrt(wide))
    exact = -math.log(float(law.cdf(y + cell / 2) - law.cdf(y - cell / 2)))
    entropy_of_u = entropy - math.log(sigma_hat)
    smooth = math.log(2 * tau) - entropy_of_u
    assert smooth == pytest.approx(0.39, abs=0.005)
    assert bound - exact == pytest.approx(smooth, abs=0.01)
    draws = nats(std, level, 400, hosm.TruncatedNormal(32), schedule)
    assert abs(float(draws.mean()) - exact) < 5 * float(draws.std()) / 20 + 0.02


def test_a_network_of_the_levels_alone_gives_their_probabilities():
    """Uniform noise is not what it was trained on."""
    levels, weights = torch.tensor([20.0, 130.0, 140.0]), torch.tensor([0.2, 0.5, 0.3])
    atoms = (-1 + levels * CELL)[:, None]
    mixture = GaussianMixture(atoms, torch.zeros(3, 1, 1), weights)
    model = hosm.ScoreModel(mixture_noise(mixture, NARROW), NARROW)
    solver = hosm.FixedGrid(512, data_std=0.5)
    x, options = levels.byte().repeat(40)[:, None], {"divergence": "exact", "solver": solver}
    found, uniform = (
        hosm.ode_nll(model, x, dequantization=each, **options).bits_per_dim() * math.log(2)
        for each in (hosm.TruncatedNormal(), hosm.Uniform())
    )
    expected = -weights.log().repeat(40) - math.log(math.erf(3 / 2**0.5))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    assert float(((uniform + weights.log().repeat(40)).abs() < 0.5).double().mean()) < 0.2


def test_levels_may_have_another_range():
    how = hosm.TruncatedNormal(first=0, last=1)
    assert how.quantization == Quantization(256, -1 / 510, 1 + 1 / 510)
    found, law = nats(0.5, torch.tensor([255]), 100, how), Normal(0.0, 0.5)
    exact = -math.log(
        float(law.cdf(torch.tensor(1 + 1 / 510)) - law.cdf(torch.tensor(1 - 1 / 510)))
    )
    # 0.39 nats off, as for all smooth densities.
    assert float(found.mean()) - exact == pytest.approx(0.39, abs=5 * float(found.std()) / 10)


def test_where_a_truncated_normal_does_not_hold_it_is_refused():
    x, options = torch.zeros(1, 2, dtype=torch.uint8), {"dequantization": hosm.TruncatedNormal()}
    with pytest.raises(ValueError, match="dequantization: expected a schedule"):
        hosm.ode_nll(gaussian(hosm.VPSchedule(t_min=1e-3)), x, **options)
    narrow = gaussian(NARROW)
    for call in (hosm.variational_nll, partial(hosm.ode_nll, clean=True)):
        with pytest.raises(ValueError, match=r"dequantization: expected Uniform\("):
            call(narrow, x, **options)
