"""The densities of the study are those of their draws, and the true score has no error."""

import math
from dataclasses import replace

import pytest
import torch
from torch.special import ndtri

import hosm_losses as hosm
from tests.oracles import mixture_noise, paper_mixture

pytest.importorskip("matplotlib")

from benchmarks.experiment import seeded
from benchmarks.worth_problems import (
    CELLS,
    Checkerboard,
    Funnel,
    Lattice,
    Line,
    Product,
    Ring,
    Rotated,
    many_well,
    mixture,
)
from benchmarks.worth_quantities import facts, log_ratio, score


def at_level(alpha, sigma, count):
    """α and σ of so many rows of one noise level."""
    return [torch.full((count,), value, dtype=torch.float64) for value in (alpha, sigma)]


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.01), (0.6, 0.8), (1.0, 30.0)])
def test_the_mixture_on_a_grid_is_that_in_closed_form(alpha, sigma):
    x = alpha * torch.linspace(-1.2, 1.5, 40, dtype=torch.float64)[:, None]
    at = at_level(alpha, sigma, len(x))
    log_q, slope = mixture().diffuse(x, *at)
    exact = paper_mixture()
    assert torch.allclose(log_q, exact.log_density(x, *at), atol=1e-7)
    assert torch.allclose(slope, exact.score(x, *at), rtol=1e-6, atol=1e-6)


def test_draws_of_the_mixture_have_its_distribution():
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    exact = paper_mixture()
    normal = (mixture().quantile(u[:, None]) - exact.means.T) / exact.covariances[:, 0, 0].sqrt()
    assert torch.allclose(torch.special.ndtr(normal) @ exact.weights, u, atol=5e-6)


def box(d, length, count):
    """A grid of a line or plane, and the volume of its cells."""
    axis = torch.linspace(-length, length, count, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * d).reshape(-1, d), (axis[1] - axis[0]) ** d


def shells():
    """Points on a line in four dimensions, and the volumes of their shells."""
    radius = torch.linspace(0, 2.5, 501, dtype=torch.float64)[1:]
    direction = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    return radius[:, None] * direction, 2 * math.pi**2 * radius**3 * (radius[1] - radius[0])


def shells_of_three():
    """v, and shells of the three others."""
    axes = (torch.linspace(-6, 6, 61), torch.linspace(-5, 5, 61))  # v, and log of the radius
    grid = torch.cartesian_prod(*axes).double()
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3
    x = torch.cat([grid[:, :1], grid[:, 1:].exp() * direction], 1)
    return x, 4 * math.pi * torch.exp(3 * grid[:, 1]) * (12 / 60) * (10 / 60)


# With a grid, and α and σ.
DENSITIES = {
    "mixture": (mixture(), box(1, 4.0, 401), (0.9, 0.15)),
    "wells": (many_well(2), box(2, 4.5, 121), (0.9, 0.15)),
    "board": (Checkerboard(), box(2, 1.5, 301), (0.9, 0.05)),
    "lattice": (Lattice(2), box(2, 3.0, 601), (1.0, 0.01)),
    "ring": (Ring(), shells(), (0.9, 0.15)),
    "funnel": (Funnel(), shells_of_three(), (0.9, 0.15)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_those_of_their_draws(name):
    """∫ q = 1 and E x·∇log q = −d on a grid, where functions have the mean that they have here."""
    density, (x, mass), (alpha, sigma) = DENSITIES[name]
    log_q, slope = density.diffuse(x, *at_level(alpha, sigma, len(x)))
    mass = mass * log_q.exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    assert float((mass * (x * slope).sum(1)).sum()) == pytest.approx(-x.shape[1], abs=1e-3)
    u = torch.rand((4_000, 2 * x.shape[1]), generator=seeded(0), dtype=torch.float64)
    clean, noise = u.clamp_min(1e-9).chunk(2, 1)
    drawn = alpha * density.quantile(clean) + sigma * ndtri(noise)
    expected = alpha**2 * density.std.double().square() + sigma**2
    off = [(drawn - alpha * density.mean).square() - expected, drawn - alpha * density.mean]
    at_draws, _ = density.diffuse(drawn, *at_level(alpha, sigma, len(drawn)))
    off.append((at_draws - (mass * log_q).sum())[:, None])
    if x.shape[1] <= 2:  # the waves have the opposite sign on the holes of the board
        waves, wave = (torch.cos(2 * math.pi * part.sum(1)) for part in (drawn / alpha, x / alpha))
        off.append((waves - (mass * wave).sum())[:, None])
    off = torch.cat(off, 1)
    assert bool((off.mean(0).abs() < 5 * off.std(0) / math.sqrt(len(off))).all())


def test_a_rotated_density_is_the_same_in_its_own_axes():
    plain, rotated = many_well(4), Rotated(many_well(4))
    u, at = torch.rand((4000, 4), generator=seeded(0)).double(), at_level(1.0, 0.3, 4000)
    x, turned = plain.quantile(u), rotated.quantile(u)
    log_q, slope = plain.diffuse(x, *at)
    turned_log_q, turned_slope = rotated.diffuse(turned, *at)
    assert torch.allclose(log_q, turned_log_q)
    assert torch.allclose((x * slope).sum(1), (turned * turned_slope).sum(1))
    assert torch.allclose(slope.square().sum(1), turned_slope.square().sum(1))
    assert torch.allclose(turned.std(0).float(), rotated.std, rtol=0.03)


@pytest.mark.parametrize(
    "name", [name for name in CELLS if "board" not in name and "digits" not in name]
)
def test_the_score_of_the_data_is_that_of_the_density_without_noise(name):
    """E[−(x − x̄)·∇log p₀] = d, and at t_min the score of q is near that of the data."""
    cell = replace(CELLS[name](), points=8)
    x, _, noisy_score = cell.at_t_min
    data_score, scale = cell.density.data_score(x), noisy_score.abs().amax()
    assert (data_score - noisy_score).abs().max() < 0.1 * scale
    draws = cell.draw(20_000, seeded(0)).double()
    products = -((draws - cell.density.mean) * cell.density.data_score(draws)).sum(1)
    error = products.std() / math.sqrt(len(draws))
    assert abs(products.mean() - cell.density.elements) < 5 * error
    assert error < 0.1 * cell.density.elements


def test_the_lattice_is_smoothed():
    """q = p₀ * N(0, σ²) by Gauss–Hermite quadrature, at a few points of two sites."""
    lattice = Lattice(2)
    points = torch.tensor([[0.3, -0.9], [1.1, 1.2], [-1.0, -0.8]], dtype=torch.float64)
    nodes = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    near = points[:, None] + 0.01 * torch.cartesian_prod(nodes, nodes)
    bonds = (near[..., 0] - near[..., 1]).square()  # two bonds, each of half a square
    energy = bonds + (near.square() - 1).square().sum(-1) + lattice.log_z
    smoothed = (torch.outer(weights, weights).flatten() * (-energy).exp()).sum(1).log()
    log_q, _ = lattice.diffuse(points, *at_level(1.0, 0.01, 3))
    assert torch.allclose(log_q, smoothed, atol=1e-6)


def test_a_grid_that_is_coarser_than_the_noise_is_refused():
    """Its density of many wells was off by 3 nats under VP with the default t_min."""
    with pytest.raises(ValueError, match=r"expected 0\.004, .* or more; got 0\.001\."):
        many_well(2).diffuse(torch.zeros(3, 2, dtype=torch.float64), *at_level(1.0, 0.001, 3))


class Board:
    """The true score of the checkerboard, as oracles give it."""

    def score(self, x, alpha, sigma):
        return Checkerboard().diffuse(x, alpha, sigma)[1]


@pytest.mark.parametrize(
    ("name", "exact", "tolerance"),
    [("mixture, d = 1, VP", paper_mixture(), 1e-4), ("checkerboard, d = 2", Board(), 1e-3)],
    ids=["mixture", "board"],
)
def test_the_exact_score_is_at_no_distance(name, exact, tolerance):
    cell = replace(CELLS[name]().small(), solver=256, points=4, scored=2)
    model = hosm.ScoreModel(mixture_noise(exact, cell.schedule), cell.schedule)
    assert log_ratio(cell, model, 2).abs().max() < tolerance
    found = score(cell, model, 2)
    truth = cell.at_t_min[2].reshape(8, 4, -1)[:, :2].square().sum(-1).mean()
    assert max(found["score_mean"]) < 1e-4 * truth
    assert max(found["j_sm"]) < 1e-8


def test_the_noise_of_targets_is_the_loss_of_the_true_score():
    """Of a Gaussian N(0, 1) in each element, Var(ε | x) = 1/(1 + σ̂²): ∫ du over u = log σ̂."""
    normals = Product([Line(lambda a: -(a**2) / 2, -8, 8, 2001)] * 2)
    cell = replace(CELLS["many-well, d = 2"]().small(), density=normals, points=512)
    low, high = cell.schedule.log_sigma_hat_range
    exact = [u - math.log1p(math.exp(2 * u)) / 2 for u in (low, high)]
    found = facts(cell)
    assert found["elements"] == 2
    assert found["noise"] == pytest.approx(2 * (exact[1] - exact[0]), rel=0.02)
    # Without a score J_SM is the rest of E‖ε‖² = d.
    nothing = hosm.ScoreModel(lambda x, t: 0 * x, cell.schedule)
    rest = 2 * (high - low) - 2 * (exact[1] - exact[0])
    assert score(cell, nothing, 1)["j_sm"] == pytest.approx([rest], rel=0.02)
