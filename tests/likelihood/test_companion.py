"""A companion of half the steps changes the claimed error and the count of calls, nothing else."""

import math

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.likelihood.multistep import _guarded
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
    path = torch.tensor([4.0, 4.0, 4.0, 4.0, 4.0])
    difference = torch.tensor([0.0, 9.0, 1199.0, 1201.0, math.nan])
    expected = torch.tensor([1.5, 2.25, 1199 / 4, 3.0, 3.0])
    torch.testing.assert_close(_guarded(path, difference), expected)


def test_a_companion_that_is_lost_does_not_fail_the_sample():
    # Stiff enough for 8 steps to leave the numbers of float64 where 16 do not.
    model = hosm.ScoreModel(lambda x, t: 1e3 * torch.sin(30 * x), SCHEDULE)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = nll(model, x, steps=16, companion=True)
    assert torch.equal(result.failed, nll(model, x, steps=16).failed)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"steps": None}, "steps=None"),
        ({"steps": 63}, "steps=63"),
        ({"steps": 6}, "steps=6"),
        ({"method": "adaptive"}, "method='adaptive'"),
    ],
)
def test_where_there_can_be_none(options, got):
    model, x = model_and_points()
    with pytest.raises(ValueError, match=f"companion: expected False, or method='fixed'.*{got}"):
        nll(model, x, companion=True, **options)
    with pytest.raises(TypeError, match="companion: expected True or False"):
        nll(model, x, companion=1)
