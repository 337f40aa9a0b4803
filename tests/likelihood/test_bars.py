"""Numbers on the page of a likelihood's errors: accuracy at a count of calls, and coverage."""

import re
from pathlib import Path

import pytest
import torch

import hosm_losses as hosm
from tests.cases import MLP, SCHEDULES, VP
from tests.likelihood.problems import problem
from tests.oracles import anisotropic, paper_mixture, ring

PAGE = (Path(__file__).parents[2] / "docs" / "likelihood_errors.md").read_text(encoding="utf-8")
# A mixture, how many points are taken, and the mean number of evaluations that the default
# tolerance may take.
MIXTURES = {"1-D": (paper_mixture, 32, 200), "2-D": (ring, 32, 210), "64-D": (anisotropic, 6, 260)}


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("mixture", ["1-D", "2-D", pytest.param("64-D", marks=pytest.mark.slow)])
def test_adaptive_at_its_default_tolerance(name, mixture):
    make, points, most = MIXTURES[mixture]
    model, x, log_density, log_prior = problem(SCHEDULES[name], make(), 32)
    x, log_density = x[:points], log_density[:points]
    options = {"divergence": "exact", "log_prior": log_prior}
    result = hosm.ode_nll(model, x, solver=hosm.Adaptive(), **options)
    error = float((result.nll + log_density).abs().max())
    evaluations = float(result.nfe.double().mean())
    print(f"{mixture} {name}: {error:.1e} nats at most, {evaluations:.0f} calls")  # noqa: T201
    assert error < 1e-4
    assert evaluations <= most
    ((*vp, nats, calls),) = re.findall(
        rf"{mixture} \| (\S+) nats, (\d+) \| (\S+) nats, (\d+) ", PAGE
    )
    nats, calls = vp if name == "vp" else (nats, calls)
    assert error == pytest.approx(float(nats), abs=1e-5)
    assert evaluations == pytest.approx(float(calls), abs=1 if points == 32 else 8)


def test_the_steps_of_the_fixed_grid_at_default_tolerance():
    """The sentence below the table of the page."""
    model, x, log_density, log_prior = problem(VP, paper_mixture(), 32)
    said = r"error is (\S+) nats with (\d+) steps and (\S+) nats with (\d+)\."
    ((coarse, half, error, steps),) = re.findall(said, PAGE)
    for count, expected in ((steps, error), (half, coarse)):
        solver = hosm.FixedGrid(int(count))
        options = {"divergence": "exact", "log_prior": log_prior, "solver": solver}
        found = float((hosm.ode_nll(model, x, **options).nll + log_density).abs().max())
        assert found == pytest.approx(float(expected), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "solver"), [(1, hosm.FixedGrid()), (2, hosm.FixedGrid()), (4, hosm.Adaptive(1e-2))]
)
def test_two_standard_errors_cover_what_they_should(count, solver):
    """Of repeats of one sample: its rows have probes of their own."""
    said = r"covers (\d+) to (\d+) % of the errors with two probes, and (\d+) % or more with one"
    ((two, most, one),) = re.findall(said, PAGE)
    least = {1: int(one), 2: int(two), 4: 93}[count]
    model = hosm.ScoreModel(MLP(64, 32), VP)
    x, options = 0.5 * torch.randn(1, 64), {"divergence": hosm.Hutchinson(count)}
    exact = hosm.ode_nll(model, x, divergence="exact", solver=solver).nll
    generator = torch.Generator().manual_seed(0)
    result = hosm.ode_nll(model, x.expand(1000, -1), solver=solver, generator=generator, **options)
    inside = ((result.nll - exact).abs() < 2 * result.standard_error).double().mean()
    assert least < 100 * float(inside) < int(most)
