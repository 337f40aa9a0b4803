"""With a graph: a sample that failed, or a step that did, leaves the gradients of the others."""

import itertools
import math

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses import _torch_internals
from hosm_losses.likelihood import adaptive as adaptive_of
from hosm_losses.likelihood import paths

SCHEDULE = hosm.VPSchedule()
METHODS = ["fixed", "adaptive"]


class Wild(nn.Module):
    """A network without a value, nor a derivative, where an input is above 50."""

    def __init__(self, until):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.until = until

    def forward(self, x, t):
        late = (t > self.until)[:, None]
        return self.inner(x) + torch.where(late, 50 - x[:, :1], 1.0).clamp(max=1).sqrt()


@pytest.fixture(autouse=True)
def few_evaluations(monkeypatch):
    """A sample that meets a wall is given up soon."""
    monkeypatch.setattr(adaptive_of, "MAX_EVALUATIONS", 400)


def gradients(method, x, until=-1.0, clean=False, **options):
    torch.manual_seed(0)
    network = Wild(until)
    points = x.clone().requires_grad_()
    result = hosm.ode_nll(
        hosm.ScoreModel(network, SCHEDULE),
        points,
        method=method,
        steps=16,
        tolerance=0.1,
        clean=clean,
        enable_grad=True,
        **options,
    )
    wanted = [points, *network.parameters()]
    return result, torch.autograd.grad(result.nll[~result.failed].sum(), wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("until", [-1.0, 0.3])
@pytest.mark.parametrize("clean", [False, True])
def test_the_gradients_are_those_without_the_sample_that_failed(method, until, clean):
    """From its start, or on its way; the others solved alone are the oracle."""
    x = torch.tensor([[0.3, -0.2], [0.1, 0.4], [100.0, 0.5]])
    options = {"divergence": "exact", "clean": clean, "until": until}
    result, found = gradients(method, x, **options)
    alone, expected = gradients(method, x[:2], **options)
    assert result.failed.tolist() == [False, False, True]
    if not clean:  # whose draws of noise are others
        torch.testing.assert_close(result.nll[:2], alone.nll)
        torch.testing.assert_close(found[0][:2], expected[0])
        torch.testing.assert_close(found[1:], expected[1:])
    assert all(each.isfinite().all() for each in found)
    assert found[0][2].abs().sum() == 0


def test_nor_where_nothing_may_be_read(monkeypatch):
    """As on an accelerator: the samples are found by an evaluation without a graph."""
    monkeypatch.setattr(paths, "may_look", lambda _: False)
    x = torch.tensor([[0.3, -0.2], [0.1, 0.4], [100.0, 0.5]])
    _, found = gradients("fixed", x, until=0.3, divergence="exact")
    _, expected = gradients("fixed", x[:2], until=0.3, divergence="exact")
    torch.testing.assert_close(found[0][:2], expected[0])
    torch.testing.assert_close(found[1:], expected[1:])


@pytest.mark.parametrize("method", METHODS)
def test_random_probes_as_well(method):
    x = torch.tensor([[0.3, -0.2], [100.0, 0.5]])
    result, found = gradients(method, x, until=0.3, probes=2)
    assert result.failed.tolist() == [False, True]
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("divergence", ["exact", None])
def test_samples_with_a_graph(method, divergence):
    torch.manual_seed(0)
    network = Wild(0.3)
    latent = torch.tensor([[0.3, -0.2], [100.0, 0.5]])
    drawn = hosm.ode_sample(
        hosm.ScoreModel(network, SCHEDULE),
        latent,
        method=method,
        divergence=divergence,
        enable_grad=True,
    )
    assert drawn.failed.tolist() == [False, True]
    good = drawn.x[~drawn.failed].sum()
    found = torch.autograd.grad(good, list(network.parameters()))
    assert all(each.isfinite().all() for each in found)


WIDTH = 0.05


class Kick(nn.Module):
    """A short kick to x/α at u = −1 by θ, and NaN where |x| > 2, where no path is."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(4.0))
        self.left = False

    def forward(self, x, t):
        self.left = self.left or bool((x.abs() > 2).any())
        alpha, sigma = (part[:, None] for part in SCHEDULE(t))
        kick = torch.exp(-(((sigma / alpha).log() + 1) / WIDTH).square() / 2) * alpha / sigma
        kick = self.theta * kick + 0 * x
        return torch.where(x.abs() > 2, kick * (2 - x.abs()).sqrt(), kick)


def test_a_trial_step_that_was_rejected_is_not_in_the_gradient():
    """x_T = α_T (x/α + θ S) with S the area of the kick, of −log p = ½ x_T² + …"""
    network, x = Kick(), torch.full((1, 1), 0.5)
    result = hosm.ode_nll(
        hosm.ScoreModel(network, SCHEDULE),
        x,
        method="adaptive",
        divergence="exact",
        enable_grad=True,
    )
    assert network.left
    assert not result.failed.any()
    (slope,) = torch.autograd.grad(result.nll.sum(), network.theta)
    alpha = SCHEDULE.alpha(torch.tensor(SCHEDULE.t_max))
    area = WIDTH * math.sqrt(2 * math.pi)
    expected = (result.latent.sum() * alpha * area).detach()
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("enable_grad", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_where_all_is_finite_no_evaluation_is_added(method, enable_grad):
    calls = []

    def network(x, t):
        calls.append(len(x))
        return x

    model, x = hosm.ScoreModel(network, SCHEDULE), torch.ones(1, 2)
    result = hosm.ode_nll(model, x, method=method, steps=8, enable_grad=enable_grad)
    assert sum(calls) == int(result.nfe.sum())


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_looks_at_its_own_graph_alone(method, monkeypatch):
    """Not at those of the evaluations before it, of which there are more with every step."""
    calls, looked = [], []
    plain = _torch_internals.custom_function

    def counted(node):
        looked.append(node)
        return plain(node)

    def network(x, t):
        calls.append(len(looked))
        return x.sin()

    monkeypatch.setattr(_torch_internals, "custom_function", counted)
    x = torch.ones(1, 2, requires_grad=True)
    model = hosm.ScoreModel(network, SCHEDULE)
    hosm.ode_nll(model, x, method=method, steps=8, divergence="exact", enable_grad=True)
    nodes = [after - before for before, after in itertools.pairwise(calls)]
    assert max(nodes) == nodes[0] > 0
