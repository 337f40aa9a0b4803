"""The start of the fixed grid: what its low orders err by, at as many calls of the network."""

import math

import pytest
import torch

import hosm_losses as hosm
from tests.likelihood.problems import gaussian, marginals, problem, total
from tests.oracles import anisotropic, paper_mixture, ring

CALLS = (20, 40, 74)
# Median errors in nats of the start by three Runge-Kutta steps, with ten calls more than steps.
ROWS = {
    "VP": (hosm.VPSchedule(), ring(), (9.4e-2, 2.9e-4, 4.5e-5)),
    "VE": (hosm.VESchedule(), ring(5, 0.2), (4.6e-2, 2.9e-4, 1.6e-5)),
    "flow": (hosm.LinearFlowSchedule(), ring(), (1.6e-1, 8.8e-4, 6.8e-5)),
    "EDM": (hosm.EDMSchedule(), anisotropic(2, 3), (4.1e-2, 1.6e-4, 1.2e-5)),
    "cosine": (hosm.CosineSchedule(), anisotropic(3, 4), (8.0e-2, 2.6e-4, 1.5e-5)),
    "sub-VP": (hosm.SubVPSchedule(), paper_mixture(), (5.3e-2, 7.0e-4, 4.0e-5)),
}
LATE = {  # from σ̂ of 0.1 on, at 24, 44 and 74 calls
    "VP": (hosm.VPSchedule(t_min=0.0268), ring(), (1.5e-2, 2.2e-4, 1.8e-5)),
    "VE": (hosm.VESchedule(sigma_min=0.1), ring(5, 0.2), (1.4e-3, 1.4e-4, 6.9e-6)),
    "flow": (hosm.LinearFlowSchedule(t_min=1 / 11), anisotropic(2, 3), (1.4e-3, 6.0e-5, 2.7e-6)),
}


def gains(rows, index, calls, more):
    """Errors of the rows before over those now, at as many calls, and the shares covered."""
    found, covered = [], []
    for schedule, mixture, errors in rows.values():
        model, x, log_density, log_prior = problem(schedule, mixture, 60)
        data = mixture.sample(4000, torch.Generator().manual_seed(1))
        moments = {"data_mean": float(data.mean()), "data_std": float(data.std())}
        solver, times = hosm.FixedGrid(calls - more, **moments), []
        counted = hosm.ScoreModel(
            lambda x, t, network=model.network, times=times: times.append(t) or network(x, t),
            schedule,
        )
        options = {"divergence": "exact", "log_prior": log_prior, "solver": solver}
        result = hosm.ode_nll(counted, x, **options)
        assert len(times) == calls == int(result.nfe[0])
        error = (result.nll + log_density).abs()
        found.append(errors[index] / float(error.median()))
        covered.append(float((error <= 2 * result.solver_error + 1e-6).double().mean()))
    return found, covered


@pytest.mark.parametrize(("index", "gain"), [(0, 10.0), (1, 2.2), (2, 1.5)])
def test_low_orders_err_less_than_runge_kutta_at_as_many_calls(index, gain):
    found, covered = gains(ROWS, index, CALLS[index], 2)
    assert math.prod(found) ** (1 / len(found)) > gain
    assert min(found) > 1.4
    assert min(covered) > 0.98


@pytest.mark.filterwarnings("ignore:schedule. expected α")
@pytest.mark.parametrize(("index", "calls"), [(0, 24), (1, 44), (2, 74)])
def test_a_start_in_the_middle_takes_two_runge_kutta_steps(index, calls):
    """No row is worse than before."""
    found, covered = gains(LATE, index, calls, 8)
    assert min(found) > 1.1
    assert min(covered) > 0.9


@pytest.mark.filterwarnings("ignore:schedule. expected")
@pytest.mark.parametrize("solve", [hosm.ode_nll, hosm.ode_sample])
@pytest.mark.parametrize("companion", [False, True])
def test_every_call_of_a_start_in_the_middle_is_counted(companion, solve):
    """Those of both Runge-Kutta starts, if there is a companion or a way back."""
    times, schedule = [], hosm.VESchedule(sigma_min=0.1, sigma_max=1.0)
    model = hosm.ScoreModel(lambda x, t: times.append(t) or x.sin(), schedule)
    solver = hosm.FixedGrid(16, companion=companion, data_std=0.3)
    assert solve(model, torch.randn(2, 3), solver=solver).nfe.tolist() == [len(times)] * 2
    second = 10 if solve is hosm.ode_nll else 18
    assert len(times) == 18 + 3 * 2 + companion * (second + 3 * 2)


@pytest.mark.parametrize("by_element", [False, True])
def test_data_thinner_than_the_noise_wants_its_deviations_by_element(by_element):
    """Points off it, under one number for both: the known loss, which the estimate covers."""
    schedule, std = hosm.EDMSchedule(), torch.tensor([0.6, 0.001])
    model, (near, far) = gaussian(schedule, std=std), marginals(schedule, std=std)
    along = 0.6 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    x = torch.stack([along, torch.full_like(along, 0.02)], 1)
    for calls in CALLS:
        solver = hosm.FixedGrid(calls - 2, data_std=std if by_element else 0.424)
        prior = {"log_prior": lambda latent: total(far.log_prob(latent))}
        result = hosm.ode_nll(model, x, solver=solver, divergence="exact", **prior)
        error = (result.nll + total(near.log_prob(x))).abs()
        if by_element:
            assert float(error.max()) < 1e-9
        else:
            assert float(error.min()) > 0.1
            assert bool((error <= 2 * result.solver_error).all())
