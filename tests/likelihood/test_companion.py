"""A companion of half the steps changes the claimed error and the count of calls, nothing else."""

import math

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.likelihood.multistep import MultistepSolution, _estimate
from tests.oracles import mixture_noise, ring

SCHEDULE = hosm.VPSchedule()


def model_and_points():
    model = hosm.ScoreModel(mixture_noise(ring(), SCHEDULE), SCHEDULE)
    return model, ring().sample(5, torch.Generator().manual_seed(0))


def nll(model, x, **options):
    return hosm.ode_nll(model, x, generator=torch.Generator().manual_seed(1), **options)


@pytest.mark.parametrize("options", [{}, {"probes": 2}, {"divergence": "exact"}, {"steps": 8}])
def test_the_numbers_are_those_without(options):
    model, x = model_and_points()
    alone, both = nll(model, x, **options), nll(model, x, companion=True, **options)
    steps = options.get("steps", 64)
    assert set((both.nfe - alone.nfe).tolist()) == {steps // 2 + 10}
    for name in ("nll", "latent", "standard_error", "failed"):
        mine, theirs = getattr(both, name), getattr(alone, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert not torch.equal(both.solver_error, alone.solver_error)


def test_both_paths_share_their_probes(monkeypatch):
    from hosm_losses.likelihood import paths

    model, x = model_and_points()
    drawn, used = [], []
    draw, evaluate = paths.Paths.draw, paths.with_divergence
    monkeypatch.setattr(
        paths.Paths, "draw", lambda self, z: drawn.append(draw(self, z)) or drawn[-1]
    )
    monkeypatch.setattr(
        paths, "with_divergence", lambda f, x, v: used.append(v) or evaluate(f, x, v)
    )
    nll(model, x, steps=8, companion=True)
    assert len(drawn) == 9
    expected = [v for place, v in enumerate(drawn) for _ in range(1 + (place % 2 == 0))]
    assert [id(v) for v in used] == [id(v) for v in expected]


def test_gradients_are_those_without():
    model, x = model_and_points()
    found = []
    for companion in (False, True):
        point = x.clone().requires_grad_()
        result = nll(model, point, steps=16, enable_grad=True, companion=companion)
        assert not result.solver_error.requires_grad
        found.append(torch.autograd.grad(result.nll.sum(), point)[0])
    assert torch.equal(*found)


def test_the_estimate_by_hand():
    # Where the path is resolved, by the spread and by the difference; where it is not, by the
    # difference for m = 1 and 2, and by the spread for m = 1 and more; where the companion is
    # lost; where both paths have no error, and the companion alone.
    path = torch.tensor([8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 0.0, 0.0])
    companion = torch.tensor([128.0, 128.0, 256.0, 512.0, 256.0, 1e6, 128.0, 0.0, 1.0])
    difference = torch.tensor([0.0, 40.0, 400.0, 400.0, 0.0, 400.0, math.nan, 5.0, 5.0])
    spread = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0])
    expected = torch.tensor([1.0, 5.0, 50.0, 3.125, 2.0, 2.8, 8.0, 0.625, 0.625])
    found = MultistepSolution(*[path] * 3, path, spread, path)
    torch.testing.assert_close(_estimate(found, companion, difference), expected)


def kicked(x, t):
    """A narrow kick at σ̂ = 1/e that the path stretches later, of which no local error tells."""
    alpha, sigma = SCHEDULE(t)
    u, alpha = (sigma / alpha).log()[:, None], alpha[:, None]
    scale = (0.25 + u.exp().square()).sqrt()
    ratio = u.exp() / scale
    z = x / alpha / scale
    moved = torch.sigmoid(3 * (u + 0.2)) * z + 0.01 * torch.exp(-(((u + 1) / 0.1) ** 2))
    return ratio * z + moved / ratio


@pytest.mark.parametrize("options", [{"divergence": "exact"}, {}])
def test_a_kick_that_is_stretched_later_is_covered(options):
    model = hosm.ScoreModel(kicked, SCHEDULE)
    x = 1e-4 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    truth = hosm.ode_nll(model, x, divergence="exact", steps=1024).nll
    error = (hosm.ode_nll(model, x, divergence="exact").nll - truth).abs()
    alone, both = nll(model, x, **options), nll(model, x, companion=True, **options)
    assert not (error <= 2 * alone.solver_error).any()
    assert (error <= 2 * both.solver_error).all()


def lost(x, t):
    """Of which 16 steps leave the numbers of float64 and 32 do not, for one sample of the two."""
    return -2 * x**3 / SCHEDULE(t)[1][:, None]


def test_a_companion_that_is_lost_says_nothing():
    shown = []

    def log_prior(latent):
        shown.append(latent)
        assert not latent.requires_grad or torch.is_grad_enabled()
        return torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(1)

    model = hosm.ScoreModel(lost, SCHEDULE)
    x = torch.tensor([[1.0, 1.0], [0.01, 0.01]])
    options = {"steps": 32, "divergence": "exact", "log_prior": log_prior}
    alone = nll(model, x, **options)
    shown.clear()
    both = nll(model, x, companion=True, **options)
    assert len(shown) == 3
    assert torch.equal(both.latent, alone.latent)
    quadrature = both.solver_error[0] - alone.solver_error[0]
    assert float(quadrature) == 0.0  # what it is alone, of the sample whose companion is lost
    assert both.solver_error[1] != alone.solver_error[1]
