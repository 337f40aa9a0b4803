"""log Z of the referee is right, and so is what is made of it."""

import math

import pytest
import torch

import hosm_losses as hosm

pytest.importorskip("matplotlib")

from benchmarks import densities, density_problems
from benchmarks.density_problems import Annealing, anneal, lattice, lattice_log_z, mean_of


def test_the_transfer_matrix_is_the_integral_of_the_lattice():
    """Brute force by the trapezoid rule, which knows the energy alone."""
    axis = torch.linspace(-2.8, 2.8, 29, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * 4)
    brute = float(lattice(grid).logsumexp(0) + 4 * (axis[1] - axis[0]).log())
    assert lattice_log_z(2, 12) == pytest.approx(brute, abs=1e-6)


@pytest.mark.parametrize(("side", "nodes"), [(2, 9), (3, 4)])
def test_the_transfer_matrix_is_the_sum_over_its_own_nodes(side, nodes):
    axis, log_weights = density_problems.site_rule(nodes)
    sites = torch.cartesian_prod(*[torch.arange(nodes)] * side**2)
    brute = torch.logsumexp(lattice(axis[sites]) + log_weights[sites].sum(1), 0)
    assert lattice_log_z(side, nodes) == pytest.approx(float(brute), abs=1e-12)


def test_nodes_of_the_transfer_matrix_are_enough():
    assert lattice_log_z(4, 8) == pytest.approx(lattice_log_z(4, 9), abs=1e-5)
    assert lattice_log_z(3, 10) == pytest.approx(lattice_log_z(3, 12), abs=1e-7)


@pytest.mark.parametrize("project", [density_problems.as_it_is, density_problems.without_centre])
def test_annealing_finds_the_log_z_and_the_spread_of_a_gaussian(project):
    """Of correlated elements, with a mean, on all of space and on a subspace."""
    rows = torch.randn(8, 8, dtype=torch.float64)
    basis = project(torch.eye(8, dtype=torch.float64))
    precision = basis @ (torch.eye(8) + rows @ rows.T / 8) @ basis
    mean = project(torch.randn(1, 8, dtype=torch.float64))

    def log_target(x):
        return -((x - mean) @ precision * (x - mean)).sum(1) / 2

    eigenvalues = torch.linalg.eigvalsh(precision)
    eigenvalues = eigenvalues[eigenvalues > 1e-9]
    exact = float((2 * math.pi / eigenvalues).log().sum()) / 2
    runs, x = anneal(log_target, 8, 1.5, Annealing(16, 500, 20, 3), project)
    log_z, error = mean_of(runs)
    assert abs(log_z - exact) < 5 * error < 0.1
    torch.testing.assert_close(project(x), x)
    # Particles of a run share ancestors, so that the spread over runs is the error.
    means = x.reshape(16, 500, 8).mean(1)
    errors = means.std(0) / 4
    assert bool(((means.mean(0) - mean[0]).abs() < 5 * errors).all())
    squares = (((x - mean) @ precision) * (x - mean)).sum(1).reshape(16, 500).mean(1)
    assert abs(float(squares.mean()) - len(eigenvalues)) < 5 * float(squares.std()) / 4


def test_claims_are_over_the_true_errors():
    row, error = densities.summary([1.3, 0.6], [0.3, 0.4], 1.0, 0.0), math.sqrt(0.125)
    expected = {"claim": 0.35, "error": error, "ratio": 0.35 / error}
    assert row == pytest.approx(expected | {"bias": -0.05, "bias_error": 0.35})
    row = densities.summary([1.3, 0.6], [0.3, 0.4], 1.0, 0.4)
    assert row["claim"] == pytest.approx((0.5 + math.sqrt(0.32)) / 2)


def test_simulators_are_those_of_the_paper():
    theta, x = density_problems.two_moons(20_000)
    first = x[:, 0] + (theta[:, 0] + theta[:, 1]).abs() / 2**0.5 - 0.25
    second = x[:, 1] - (theta[:, 1] - theta[:, 0]) / 2**0.5
    radius, angle = torch.hypot(first, second), torch.atan2(second, first)
    assert bool((first > 0).all())
    error = 5 / 20_000**0.5
    assert float(radius.mean()) == pytest.approx(0.1, abs=0.01 * error)
    assert float(radius.std()) == pytest.approx(0.01, abs=0.01 * error)
    assert float(angle.std()) == pytest.approx(math.pi / 12**0.5, abs=error)
    theta, x = density_problems.gaussian_linear(20_000)
    for part in (theta, x - theta):
        assert part.shape == (20_000, 10)
        assert part.var(0).tolist() == pytest.approx([0.1] * 10, abs=0.1 * 1.5 * error)
    assert x.var(0).tolist() == pytest.approx([0.2] * 10, abs=0.2 * 1.5 * error)


def test_a_classifier_tells_what_differs():
    pytest.importorskip("sklearn")
    x = torch.randn(100, 2)
    assert densities.c2st(x, x + 20) == 1
    assert 0.35 < densities.c2st(x, torch.randn(100, 2)) < 0.65


@pytest.mark.parametrize("name", density_problems.ENERGIES)
def test_scores_are_slopes_of_the_log_density(name):
    energy = density_problems.ENERGIES[name](densities.SMOKE.annealing)
    x, score = energy.data, energy.score(energy.data)
    small = 1e-5 * torch.randn_like(x)
    moved = energy.log_target(x + small) - energy.log_target(x - small)
    torch.testing.assert_close(moved, 2 * (small * score).sum(1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("project", [density_problems.as_it_is, density_problems.without_centre])
def test_both_solvers_give_an_exact_model_the_log_z_of_its_data(project, monkeypatch):
    """N(0, 1.5² I), and its part on a subspace, for which a probe with v·Pv = tr P is taken."""
    std = torch.full((8,), 1.5)
    schedule = hosm.VESchedule(sigma_max=200.0)
    network = densities.Network(schedule, 0 * std, std, 4, 8)
    torch.nn.init.zeros_(network.last.weight)
    torch.nn.init.zeros_(network.last.bias)
    dimensions = 8 if project is density_problems.as_it_is else 6
    log_z = dimensions * math.log(1.5 * math.sqrt(2 * math.pi))
    energy = density_problems.Energy(
        lambda x: -x.double().square().sum(1) / 4.5, torch.zeros(1, 8), log_z, project=project
    )
    model = densities.model_of(network, schedule, energy)
    size = densities.SMOKE._replace(solver=64)
    row = densities.ours(model, energy, size, {"data_std": 1.5})
    assert row["log_z"] == pytest.approx([log_z] * 3, abs=1e-3)
    assert row["effective"] == pytest.approx(1, abs=1e-3)
    pytest.importorskip("torchdiffeq")
    probe = torch.tensor([1.0, 1.0, 1.0, -1.0]).repeat_interleave(2).double()
    monkeypatch.setattr(densities, "signs", lambda x, _: probe.expand(len(x), -1))
    row = densities.by_torchdiffeq(model.double(), energy, size)
    assert row["log_z"] == pytest.approx([log_z] * 3, abs=1e-3)
