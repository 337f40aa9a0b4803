"""With a graph: a sample that failed, or a step that did, leaves the gradients of the others."""

import math

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.likelihood import adaptive as adaptive_of
from hosm_losses.likelihood import paths
from tests.cases import MLP, VP, gradients

pytestmark = pytest.mark.filterwarnings("ignore:network.*jumps")


class Wild(nn.Module):
    """A network without a value, nor a derivative, where an input is above 500, later above 50."""

    def __init__(self, until):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.until, self.calls = nn.Linear(2, 2), until, 0

    def forward(self, x, t):
        self.calls += 1
        assert self.calls < 2000, "samples that are taken out in turns would never end"
        wall = torch.where(t > self.until, 50.0, 500.0)[:, None]
        return self.inner(x) + (wall - x[:, :1]).clamp(max=1).sqrt()


X = [[0.3, -0.2], [0.1, 0.4], [100.0, 0.5], [1000.0, 0.5]]
LOST = [False, False, True, True]
EXACT = {"divergence": "exact"}
FIXED, ADAPTIVE = hosm.FixedGrid(16), hosm.Adaptive(0.1)
TWO = {"divergence": hosm.Hutchinson(2)}


@pytest.fixture(autouse=True)
def few_evaluations(monkeypatch):
    """A sample that meets a wall is given up soon."""
    monkeypatch.setattr(adaptive_of, "MAX_EVALUATIONS", 400)


def solved(x, until, **options):
    """The result, and gradients in x and the parameters."""
    network, points = Wild(until), torch.tensor(x, requires_grad=True)
    options = {"solver": FIXED, "enable_grad": True, **options}
    result = hosm.ode_nll(hosm.ScoreModel(network, VP), points, **options)
    total = result.nll[~result.failed].sum()
    return result, gradients(total, [points, *network.parameters()])


@pytest.mark.parametrize(
    ("solver", "until", "look"),
    [
        (FIXED, -1.0, True),
        (FIXED, 0.3, True),
        (FIXED, 0.3, False),
        (ADAPTIVE, -1.0, True),
        (ADAPTIVE, 0.3, False),
    ],
)
def test_the_gradients_are_those_without_the_samples_that_failed(solver, until, look, monkeypatch):
    """From the start, or one on its way; on an accelerator nothing may be looked at."""
    if not look:
        monkeypatch.setattr(paths, "can_read_values", lambda _: False)
    result, (of_x, *found) = solved(X, until, solver=solver, **EXACT)
    alone, (wanted, *expected) = solved(X[:2], until, solver=solver, **EXACT)
    assert result.failed.tolist() == LOST
    torch.testing.assert_close(result.nll[:2], alone.nll)
    torch.testing.assert_close(of_x, torch.cat([wanted, torch.zeros(2, 2)]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"clean": True}, TWO, {**TWO, "solver": ADAPTIVE}], ids=str)
def test_nor_are_they_lost_where_something_is_drawn(options):
    result, found = solved(X, -1.0 if "clean" in options else 0.3, **options)
    assert result.failed.tolist() == LOST
    assert all(bool(each.isfinite().all()) for each in found)
    assert bool((found[0][2:] == 0).all())


WIDTH = 0.05


class Kick(nn.Module):
    """A short kick to x/α at u = −1 by θ, and NaN where |x| > 2, where no path is."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(4.0))
        self.left = False

    def forward(self, x, t):
        self.left = self.left or bool((x.abs() > 2).any())
        alpha, sigma = (part[:, None] for part in VP(t))
        kick = torch.exp(-(((sigma / alpha).log() + 1) / WIDTH).square() / 2) * alpha / sigma
        kick = self.theta * kick + 0 * x
        return torch.where(x.abs() > 2, kick * (2 - x.abs()).sqrt(), kick)


def test_a_trial_step_that_was_rejected_is_not_in_the_gradient(monkeypatch):
    """x_T = α_T (x/α + θ S) with S the area of the kick, of −log p = ½ x_T² + …"""
    monkeypatch.setattr(adaptive_of, "FIRST_STEP", 0.05)  # into the kick
    network, options = Kick(), {"solver": hosm.Adaptive(), "enable_grad": True, **EXACT}
    result = hosm.ode_nll(hosm.ScoreModel(network, VP), torch.full((1, 1), 0.5), **options)
    assert network.left
    assert not result.failed.any()
    (slope,) = torch.autograd.grad(result.nll.sum(), network.theta)
    alpha = VP.alpha(torch.tensor(VP.t_max))
    expected = (result.latent.sum() * alpha * WIDTH * math.sqrt(2 * math.pi)).detach()
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("solver", [FIXED, ADAPTIVE])
def test_a_network_with_torch_func_inside_has_the_same_gradient(solver):
    """Such a network takes no hooks on saved tensors: all of its activations stay."""

    def of(network):
        x = torch.tensor(X[:2], requires_grad=True)
        nll = hosm.ode_nll(hosm.ScoreModel(network, VP), x, enable_grad=True, solver=solver).nll
        return torch.autograd.grad(nll.sum(), x)[0]

    energy = torch.func.grad(lambda x: x.sin().sum())
    found, expected = of(lambda x, t: energy(x)), of(lambda x, t: x.cos())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson(2)])
def test_a_frozen_network_has_no_graph_but_in_x(divergence):
    network, x = MLP(2).requires_grad_(False), torch.randn(3, 2)
    options = {"solver": hosm.FixedGrid(4), "divergence": divergence, "enable_grad": True}

    frozen = hosm.ode_nll(hosm.ScoreModel(network, VP), x, **options)
    assert not frozen.nll.requires_grad
    assert not frozen.latent.requires_grad
    in_x = []
    for trained in (False, True):
        model, points = hosm.ScoreModel(network.requires_grad_(trained), VP), x.requires_grad_()
        options["generator"] = torch.Generator().manual_seed(0)
        in_x += gradients(hosm.ode_nll(model, points, **options).nll.sum(), [points])
    torch.testing.assert_close(*in_x)
