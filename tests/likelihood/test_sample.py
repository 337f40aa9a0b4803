"""ode_sample: what it has beside the paths of ode_nll backwards, which are tested with them."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.likelihood.result import Cause
from tests.cases import MLP, VP
from tests.likelihood.problems import problem, total
from tests.oracles import ring

VE = hosm.VESchedule(sigma_max=20.0)
TOLERANCE = hosm.ToTolerance(companion=False)  # a companion compares densities


@pytest.mark.parametrize("solver", [hosm.FixedGrid(9), hosm.Adaptive(), TOLERANCE], ids=str)
def test_without_a_divergence_nothing_is_differentiated(solver):
    """Not even what cannot be."""
    model, latent, calls = hosm.ScoreModel(MLP(3), VP), torch.randn(4, 3), []

    def detached(x, t):
        calls.append(len(x))
        return model.network(x, t).detach()

    bare = hosm.ScoreModel(detached, VP)
    drawn = hosm.ode_sample(bare, latent, divergence=None, solver=solver)
    assert drawn.nll is drawn.standard_error is drawn.solver_error is None
    assert sum(calls) == int(drawn.nfe.sum())
    tolerance = 1e-2 if solver == hosm.Adaptive() else 1e-12  # the density has a part in its steps
    same = hosm.ode_sample(model, latent, solver=solver)
    assert str(same.steps) == str(drawn.steps)
    torch.testing.assert_close(drawn.x, same.x, rtol=0, atol=tolerance)
    with pytest.raises(hosm.DerivativeError):
        hosm.ode_sample(bare, latent, solver=hosm.FixedGrid(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shape_draws_latents_of_the_prior(dtype):
    model, seed = hosm.ScoreModel(MLP(3).to(dtype), VE), torch.Generator().manual_seed
    solver = hosm.FixedGrid(9)
    drawn = hosm.ode_sample(model, torch.Size((5, 3)), solver=solver, generator=seed(0))
    noise = torch.randn((5, 3), generator=seed(0), dtype=dtype)
    torch.testing.assert_close(drawn.latent, VE.prior_std * noise)
    assert (drawn.x.dtype, drawn.x.shape) == (dtype, (5, 3))


@pytest.mark.parametrize(("steps", "most"), [(32, 32), (64, 40)])
@pytest.mark.parametrize("schedule", [hosm.LinearFlowSchedule(), hosm.EDMSchedule(), VE], ids=repr)
def test_a_companion_tells_the_error_of_the_density_at_the_samples(schedule, steps, most):
    """For 95 % of samples, and no larger than need be.

    No network is differentiated for a companion where no density is wanted.
    """
    mixture = ring(5, 0.2)
    model, _, _, log_prior = problem(schedule, mixture, 1)
    latent = schedule.prior_std * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    moments = {"data_std": float(mixture.sample(999, torch.Generator().manual_seed(1)).std())}
    options = {"divergence": "exact", "log_prior": log_prior}
    solver = hosm.FixedGrid(steps, companion=True, **moments)
    drawn = hosm.ode_sample(model, latent, solver=solver, **options)
    truth = hosm.ode_nll(model, drawn.x, solver=hosm.FixedGrid(512, **moments), **options)
    error = (drawn.nll - truth.nll).abs()
    assert float((error <= 2 * drawn.solver_error).double().mean()) >= 0.95
    assert float(drawn.solver_error.median() / error.median()) <= most
    assert drawn.nfe.tolist() == [2 * (steps + 2)] * 60
    bare = hosm.ode_sample(model, latent, solver=solver, divergence=None)
    torch.testing.assert_close(bare.x, drawn.x)
    assert bare.nfe.tolist() == [steps + 2] * 60


def log_prior(latent):
    return -total(latent.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson(2)], ids=str)
def test_a_companion_compares_with_the_way_back_from_the_samples(divergence, dtype):
    """By hand: the same call without one, then `ode_nll` with the probes that follow."""
    model, latent = hosm.ScoreModel(MLP(3).to(dtype), VP), torch.randn(4, 3, dtype=dtype)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    options = {"divergence": divergence, "log_prior": log_prior}
    grid, sample = hosm.FixedGrid(10), partial(hosm.ode_sample, model, latent, enable_grad=True)
    solver = replace(grid, companion=True)
    found = sample(solver=solver, generator=seeds[0], **options)
    alone = sample(solver=grid, generator=seeds[1], **options)
    back = hosm.ode_nll(model, alone.x.detach(), solver=grid, generator=seeds[1], **options)
    difference = found.nll - back.nll
    if divergence != "exact":
        difference = log_prior(latent).double() - log_prior(back.latent)
    expected = torch.maximum(difference.abs(), back.solver_error)
    torch.testing.assert_close(found.solver_error, expected.detach(), rtol=0, atol=0)
    assert bool((found.solver_error > back.solver_error).any())
    for name in ("x", "nll", "standard_error"):
        assert torch.equal(getattr(found, name), getattr(alone, name))
    for name in ("nfe", "products"):
        assert torch.equal(getattr(found, name), 2 * getattr(alone, name))
    assert not found.solver_error.requires_grad
    assert torch.equal(*(torch.rand(1, generator=seed) for seed in seeds))


def test_a_way_back_that_fails_is_no_small_error():
    calls = []

    def network(x, t):
        calls.append(t)
        return x.sin() if len(calls) <= 18 + 4 else x * math.nan

    model, solver = hosm.ScoreModel(network, VP), hosm.FixedGrid(16, companion=True)
    found = hosm.ode_sample(model, torch.randn(2, 3), solver=solver)
    assert found.solver_error.tolist() == [math.inf] * 2
    assert found.cause.tolist() == [Cause.SOLVER] * 2
    assert bool(found.x.isfinite().all() & found.nll.isnan().all())
