"""A solver of the user's: a class with `integrate`."""

import pytest
import torch
from torch.autograd import gradcheck

import hosm_losses as hosm
from tests.cases import VP, assert_same
from tests.likelihood.problems import gaussian, marginals, total

STEPS = 64


class RK4(hosm.Solver):
    def integrate(self, paths, z, span):
        h = (span[1] - span[0]) / STEPS
        probes, integral = paths.draw_probes(z), 0.0
        for u in (span[0] + h * step for step in range(STEPS)):
            k1, q1 = paths.rates(z, u, probes)
            k2, q2 = paths.rates(z + h / 2 * k1, u + h / 2, probes)
            k3, q3 = paths.rates(z + h / 2 * k2, u + h / 2, probes)
            k4, q4 = paths.rates(z + h * k3, u + h, probes)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            integral = integral + h / 6 * (q1 + 2 * q2 + 2 * q3 + q4)
        return hosm.ODESolution(z, integral, nfe=4 * STEPS)


class OfKnownData(RK4):
    data_mean, data_std = 0.0, 1.0


@pytest.mark.parametrize("solver", [RK4(), OfKnownData()])
@pytest.mark.parametrize("schedule", [VP, hosm.LinearFlowSchedule()])
def test_its_density_is_that_of_the_data(solver, schedule):
    model, (start, end) = gaussian(schedule), marginals(schedule)
    x = start.sample((5, 2)).double()
    options = {"solver": solver, "log_prior": lambda latent: total(end.log_prob(latent))}
    found = hosm.ode_nll(model, x, **options)
    assert_same(found.nll, -total(start.log_prob(x)), 1e-5)
    assert found.solver_error.isnan().all()
    assert found.nfe.tolist() == [4 * STEPS] * 5
    assert found.products.tolist() == [2 * 4 * STEPS] * 5
    assert not found.failed.any()
    drawn = hosm.ode_sample(model, found.latent, **options)
    assert_same(drawn.x, x, 1e-5)
    assert_same(drawn.nll, found.nll, 1e-5)
    if schedule is VP:
        distribution = hosm.ODEDistribution(model, (2,), solver=solver)
        assert_same(distribution.log_prob(x), total(start.log_prob(x)), 2e-4)


def test_what_it_can_use_is_what_the_others_do():
    """Probes, batches, gradients and paths that end nowhere."""
    x = torch.randn(3, 2, dtype=torch.float64)
    options = {"solver": RK4(), "divergence": hosm.Hutchinson(2)}
    found = hosm.ode_nll(gaussian(VP), x, batch_size=2, **options)
    assert found.standard_error is None
    assert_same(found.nll, hosm.ode_nll(gaussian(VP), x, solver=hosm.FixedGrid(64)).nll, 1e-3)
    model = hosm.ScoreModel(lambda x, t: torch.where(x > 9, torch.nan, 0.5 * x.tanh()), VP)
    x[1] = 10
    assert hosm.ode_nll(model, x, solver=RK4()).failed.tolist() == [False, True, False]

    def nll(x):
        return hosm.ode_nll(model, x, solver=RK4(), enable_grad=True).nll

    assert gradcheck(nll, x[:1].requires_grad_(), atol=1e-5)


def test_a_solver_without_integrate_is_none():
    half = type("Half", (hosm.Solver,), {})()
    with pytest.raises(NotImplementedError, match=r"Half: expected a method integrate\(paths"):
        hosm.ode_nll(gaussian(VP), torch.zeros(1, 2), solver=half)
