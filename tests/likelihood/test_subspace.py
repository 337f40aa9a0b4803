"""Likelihoods on a subspace are those in its coordinates."""

import math
from dataclasses import replace

import pytest
import torch

import hosm_losses as hosm
from tests.cases import assert_same, gradients
from tests.subspaces import CASES, PARTICLES, Draws, centred, masked, pair

SOLVERS = {
    "grid": hosm.FixedGrid(16, data_std=0.6),
    "companion": hosm.FixedGrid(16, companion=True),
    "tolerance": hosm.ToTolerance(5.0),
    "adaptive": hosm.Adaptive(3.0),
}
SCALARS = ("nll", "standard_error", "solver_error", "nfe", "failed", "kinks", "cause")
QUIET = pytest.mark.filterwarnings("ignore:schedule. expected")


def points(Q, count=3):
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(count, Q.shape[1], generator=generator, dtype=torch.float64)
    return (y @ Q.T).reshape(count, *PARTICLES), y


def assert_equal(results, Q, tolerance=1e-8, project=centred):
    whole, small = results
    assert whole.dimensions == Q.shape[1]
    assert small.dimensions is None
    assert_same(project(whole.latent), whole.latent)
    assert_same(whole.latent.flatten(1) @ Q, small.latent, tolerance)
    for name in SCALARS:
        value, expected = getattr(whole, name), getattr(small, name)
        assert (value is None) == (expected is None), name
        if value is not None:
            assert_same(value.double(), expected.double(), tolerance)
    assert whole.steps == small.steps
    assert_same(whole.bits_per_dim(), small.bits_per_dim(), tolerance)
    assert_same(torch.tensor(whole.summary().bits_per_dim), small.bits_per_dim().mean())


@QUIET
@pytest.mark.parametrize(("schedule", "prediction"), CASES)
@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson(2)], ids=str)
def test_likelihoods_are_those_in_coordinates(schedule, prediction, divergence, monkeypatch):
    model, small, Q = pair(schedule, prediction)
    x, y = points(Q)
    draws = Draws(monkeypatch, Q)
    options = {"solver": hosm.FixedGrid(12, data_std=0.6), "divergence": divergence}
    for clean in (False, True)[: 1 + (divergence == hosm.Hutchinson(2))]:
        options["clean"] = clean
        results = draws.both(
            lambda: hosm.ode_nll(model, x, **options), lambda: hosm.ode_nll(small, y, **options)
        )
        assert_equal(results, Q)


@QUIET
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson(4)], ids=str)
def test_solvers_and_samples_are_those_in_coordinates(solver, divergence, monkeypatch):
    model, small, Q = pair("flow", "x0")
    x, y = points(Q)
    options = {"solver": SOLVERS[solver], "divergence": divergence}
    draws = Draws(monkeypatch, Q)
    results = draws.both(
        lambda: hosm.ode_nll(model, x, **options), lambda: hosm.ode_nll(small, y, **options)
    )
    assert_equal(results, Q)
    if solver == "companion":
        return
    for each in (divergence, None):
        options["divergence"] = each
        results = draws.both(
            lambda: hosm.ode_sample(model, x, **options),
            lambda: hosm.ode_sample(small, y, **options),
        )
        assert_same(results[0].x.flatten(1) @ Q, results[1].x, 1e-8)
        if each is not None:
            assert_equal(results, Q)


@QUIET
@pytest.mark.parametrize(
    ("schedule", "prediction", "project"),
    [*((*case, centred) for case in CASES), ("vp", "v", masked), ("flow", "x0", masked)],
)
def test_bounds_are_those_in_coordinates(schedule, prediction, project, monkeypatch):
    model, small, Q = pair(schedule, prediction, project)
    x, y = points(Q)
    draws = Draws(monkeypatch, Q)
    moments = {"data_mean": project(torch.full((1, *PARTICLES), 0.3).double())[0], "data_std": 0.8}
    if project is masked:
        moments["data_std"] = torch.linspace(0.4, 0.9, 6).double().reshape(PARTICLES)
    own = {"data_mean": moments["data_mean"].flatten() @ Q, "data_std": 0.8}
    if project is masked:
        own["data_std"] = moments["data_std"].flatten() @ Q.abs()
    results = draws.both(
        lambda: hosm.variational_nll(model, x, samples=8, **moments),
        lambda: hosm.variational_nll(small, y, samples=8, **own),
    )
    assert_equal(results, Q, project=project)
    if project is masked:
        for solver in (hosm.FixedGrid(12, **moments), hosm.Adaptive(3.0, **moments)):
            results = draws.both(
                lambda solver=solver: hosm.ode_nll(model, x, solver=solver, divergence="exact"),
                lambda solver=solver: hosm.ode_nll(
                    small, y, solver=replace(solver, **own), divergence="exact"
                ),
            )
            assert_equal(results, Q, 1e-7, masked)


def test_the_moments_change_the_error_of_the_solver_alone():
    """A mean outside of the subspace does not count."""
    model, _, Q = pair("flow", "velocity")
    x, _ = points(Q)
    solvers = hosm.FixedGrid(16), hosm.FixedGrid(16, data_mean=5.0)
    results = [hosm.ode_nll(model, x, solver=each, divergence="exact").nll for each in solvers]
    assert_same(*results)


def test_latents_and_the_distribution_stay_on_the_subspace(monkeypatch):
    model, small, Q = pair("flow", "velocity")
    x, y = points(Q)
    options = {"solver": hosm.FixedGrid(12), "divergence": "exact"}
    draws = Draws(monkeypatch, Q)
    results = draws.both(
        lambda: hosm.ode_sample(model, (4, *PARTICLES), **options),
        lambda: hosm.ode_sample(small, (4, Q.shape[1]), **options),
    )
    assert_same(results[0].x.flatten(1) @ Q, results[1].x, 1e-8)
    assert_equal(results, Q)
    whole = hosm.ODEDistribution(model, PARTICLES, **options)
    own = hosm.ODEDistribution(small, (Q.shape[1],), **options)
    with torch.no_grad():
        assert_same(whole.log_prob(x), own.log_prob(y), 1e-8)
        drawn = draws.both(
            lambda: whole.rsample_and_log_prob((5,)), lambda: own.rsample_and_log_prob((5,))
        )
    assert_same(drawn[0][0].flatten(1) @ Q, drawn[1][0], 1e-8)
    assert_same(drawn[0][1], drawn[1][1], 1e-8)


def test_gradients_of_a_likelihood_stay_on_the_subspace():
    model, small, Q = pair("vp", "v")
    x, y = (points.requires_grad_() for points in points(Q))
    options = {"solver": hosm.FixedGrid(12), "divergence": "exact", "enable_grad": True}
    found, expected = (
        gradients(hosm.ode_nll(each, data, **options).nll.sum(), [data, *each.parameters()])
        for each, data in ((model, x), (small, y))
    )
    assert_same(found[0], (expected[0] @ Q.T).reshape(found[0].shape), 1e-8)
    assert_same(found[1:], expected[1:], 1e-8)


def test_a_divergence_of_the_users_own_is_that_on_the_subspace():
    model, _, Q = pair("flow", "x0")
    x, _ = points(Q)

    def known(x, t):
        columns = Q.T.reshape(-1, *PARTICLES)
        value, traces = model.network(x, t), []
        for column in columns:
            v = column.expand_as(x)
            _, slope = torch.func.jvp(lambda x: model.network(x, t), (x,), (v,))
            traces.append((v * slope).flatten(1).sum(1))
        return value, torch.stack(traces).sum(0)

    options = {"solver": hosm.FixedGrid(12)}
    expected = hosm.ode_nll(model, x, divergence="exact", **options)
    assert_same(hosm.ode_nll(model, x, divergence=known, **options).nll, expected.nll)


def test_rounding_outside_does_not_grow_along_a_path():
    """An ε̂ with x outside, as of a network that predicts x₀, would grow with σ: 10⁴ times."""
    model, _, Q = pair("ve", "x0")
    x = points(Q)[0].float()
    model.float()
    model.network.Q = model.network.Q.float()
    latent = hosm.ode_nll(model, x, divergence="exact", solver=hosm.FixedGrid(16)).latent
    outside = (latent - centred(latent)).abs().max()
    assert outside < 1e-6 * latent.abs().max()


@pytest.mark.parametrize("project", [centred, masked])
def test_large_samples_need_their_dimensions(project):
    """More than 4,096 elements, where the diagonal of a projection is known of a mask alone."""
    elements, removed = 5000, 2
    mask = torch.ones(elements, 1).double()
    mask[-removed:] = 0

    def wide(x):
        return x * mask.to(x.dtype) if project is masked else centred(x)

    rank = elements - removed if project is masked else elements - 1
    schedule = hosm.VPSchedule()

    def network(x, t):
        alpha, sigma = (part[:, None, None] for part in schedule(t))
        return sigma * x / (0.25 * alpha**2 + sigma**2)

    model = hosm.ScoreModel(network, schedule, subspace=(wide, rank))
    generator = torch.Generator().manual_seed(0)
    x = wide(0.5 * torch.randn(2, elements, 1, generator=generator).double())
    result = hosm.ode_nll(model, x, divergence=hosm.Hutchinson())
    exact = 2 * x.square().sum((1, 2)) + rank / 2 * math.log(2 * math.pi * 0.25)
    assert result.dimensions == rank
    if project is masked:  # a Jacobian that is diagonal, for which signs are exact
        assert (result.nll - exact).abs().max() < 0.2
    stds = torch.where(mask > 0, 0.5, 0.8)
    solver = hosm.FixedGrid(8, data_std=stds)
    if project is masked:
        by_element = hosm.ode_nll(model, x, divergence=hosm.Hutchinson(), solver=solver)
        assert (by_element.nll - exact).abs().max() < 0.2
    else:
        with pytest.raises(ValueError, match="data_std: expected one number"):
            hosm.ode_nll(model, x, divergence=hosm.Hutchinson(), solver=solver)


def test_errors_say_what_does_not_go_with_a_subspace():
    model, _, Q = pair()
    x, _ = points(Q)
    off = x + 0.1
    calls = (
        lambda x: hosm.ode_nll(model, x),
        lambda x: hosm.ode_sample(model, x),
        lambda x: hosm.variational_nll(model, x),
        lambda x: hosm.ODEDistribution(model, PARTICLES).log_prob(x),
        lambda x: hosm.denoising_posterior(model, x, torch.full((3,), 0.5).double()),
    )
    for call in calls:
        call(x)
        with pytest.raises(ValueError, match=r"expected samples on the subspace; got some that"):
            call(off)
    stds = torch.linspace(0.4, 0.9, 6).reshape(PARTICLES)
    with pytest.raises(ValueError, match="data_std: expected one number, or numbers that commute"):
        hosm.ode_nll(model, x, solver=hosm.FixedGrid(data_std=stds))
    alike = torch.tensor([0.4, 0.9]).expand(PARTICLES)  # of each coordinate of all particles
    hosm.ode_nll(model, x, solver=hosm.FixedGrid(data_std=alike))
    images = torch.zeros(2, *PARTICLES, dtype=torch.uint8)
    with pytest.raises(ValueError, match="dequantization: expected None with a subspace"):
        hosm.ode_nll(model, images, dequantization=hosm.Uniform())
    results = hosm.ode_nll(model, x), hosm.ode_nll(pair()[1], points(Q)[1])
    with pytest.raises(ValueError, match="cat: expected"):
        hosm.NLLResult.cat(list(results))
    again = hosm.NLLResult.from_dict(results[0].to_dict())
    assert_same(again.bits_per_dim(), results[0].bits_per_dim())
