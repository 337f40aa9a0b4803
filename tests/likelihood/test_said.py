"""What a likelihood says of a network or a schedule with which it is another number."""

import contextlib
import math
import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hosm_losses as hosm
from tests.cases import VP, Learned, OfX
from tests.likelihood.problems import gaussian, total
from tests.schedules.checks import own

FAR = {
    "alphas for alphas_cumprod": hosm.DiscreteSchedule(1 - torch.linspace(1e-4, 0.02, 1000)),
    "half of the time": hosm.CosineSchedule(t_max=0.5),
}
NEAR = [VP, hosm.SubVPSchedule(), hosm.VESchedule(), hosm.CosineSchedule(), hosm.EDMSchedule()]
NEAR += [hosm.LinearFlowSchedule(), hosm.DiscreteSchedule.linear(1000, scaled=True)]
NEAR += [hosm.DiscreteSchedule.cosine(1000)]
FEW = hosm.FixedGrid(8)
CALLS = {
    "nll": partial(hosm.ode_nll, solver=FEW),
    "adaptive": partial(hosm.ode_nll, solver=hosm.Adaptive(1e9)),
    "graph": partial(hosm.ode_nll, solver=FEW, enable_grad=True),
    "bound": partial(hosm.variational_nll, samples=8),
    "sample": lambda model, x, solver=FEW, **given: hosm.ode_sample(
        model, tuple(x.shape), solver=solver, **given
    ),
}
PRIOR = "schedule: expected one that ends in its prior"
DRAWS = "network: .*draws random numbers"


def told(said):
    return pytest.warns(UserWarning, match=said)


@contextlib.contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def model_of(network):
    return hosm.ScoreModel(network, VP)


def spread(call, std):
    """The data's standard deviation, as the call takes it."""
    if call is CALLS["bound"]:
        return {"data_std": std}
    return {"solver": hosm.FixedGrid(8, data_std=std)}


@pytest.mark.parametrize("call", ["nll", "bound", "sample"])
def test_a_schedule_that_does_not_end_in_its_prior(call):
    call, x = CALLS[call], 0.5 * torch.randn(4, 3)
    for schedule in FAR.values():
        with told(PRIOR):
            call(gaussian(schedule), x)
        with silence():
            # Who gives a prior, or latents, knows of it; and data may start as the prior is.
            call(gaussian(schedule, std=1.0), x, **spread(call, 1.0))
            hosm.ode_sample(gaussian(schedule), x, solver=FEW)
            if call is not CALLS["sample"]:
                call(gaussian(schedule), x, log_prior=lambda z: -total(z.square()) / 2)
    with silence():
        for schedule in NEAR:
            for std in (0.1, 0.5, 1.0):
                call(gaussian(schedule, std=std), x, **spread(call, std))


def test_by_how_much_in_nats():
    """That of Gaussian data is the divergence of what it ends in from the prior."""
    schedule = FAR["half of the time"]
    alpha, sigma = schedule(torch.tensor(schedule.t_max))
    variance = alpha**2 * torch.tensor([0.25, 4.0, 1.0]) + sigma**2
    mean = alpha * torch.tensor([0.3, -1.0, 0.0])
    expected = 0.5 * (variance + mean**2 - 1 - variance.log()).sum()
    moments = {"data_mean": torch.tensor([0.3, -1, 0]), "data_std": torch.tensor([0.5, 2, 1])}
    with told(f"ends {float(expected):.2g} nats per sample"):
        hosm.ode_nll(gaussian(schedule), torch.zeros(2, 3), solver=hosm.FixedGrid(**moments))


def test_a_schedule_that_scales_the_data():
    """The point at t_min is not the data then, and its density another."""
    x = 0.5 * torch.randn(4, 3)
    model = gaussian(own(lambda t: 3 * (1 - t), lambda t: 1.0 * t, (1e-3, 1 - 1e-3)))
    with told(r"schedule: expected α\(t_min\) near 1"):
        found = hosm.ode_nll(model, 3 * x).nll - 3 * math.log(3)
    with told(r"schedule: expected α\(t_min\) near 1"):
        CALLS["sample"](model, x)
    truth = -total(torch.distributions.Normal(0, 0.5).log_prob(x))
    torch.testing.assert_close(found, truth, rtol=0, atol=0.05)
    with silence():
        hosm.ode_nll(model, x, clean=True)
        hosm.variational_nll(model, x)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_schedule_that_is_learned_has_no_gradient(frozen):
    """The grid and the prior would be constants in the graph, and the gradient wrong."""
    rate, x = torch.tensor(20.0, requires_grad=not frozen), torch.randn(4, 2)
    model = gaussian(Learned(rate))
    for call in (CALLS["graph"], partial(CALLS["sample"], enable_grad=True)):
        said = r"schedule: expected α and σ without .*; got Learned\(.* requires_grad_\(False\)"
        with contextlib.nullcontext() if frozen else pytest.raises(ValueError, match=said):
            call(model, x)
    with torch.no_grad(), contextlib.nullcontext() if frozen else pytest.raises(ValueError):
        CALLS["graph"](model, x)
    for name in ("nll", "bound", "sample"):
        CALLS[name](model, x)


@pytest.mark.parametrize("call", ["nll", "bound"])
def test_levels_of_images_without_dequantization(call):
    call, k = CALLS[call], torch.randint(0, 256, (20, 1, 8, 8)).float()
    images = {"k": k, "k / 255": k / 255, "k / 127.5 - 1": 2 * (k / 255) - 1}
    for form, x in (*images.items(), ("k", k.flatten(1) % 17)):
        with told(rf"^x: .* levels {re.escape(form)} of 8-bit .*dequantization=Uniform\(\)"):
            call(gaussian(VP), x)
    with silence():
        u, bit = torch.rand(k.shape), (k > 99).float()
        for x in (k % 16, bit, 2 * bit - 1, k[..., 1:], k - 1, k + 1, k / 2, k + u, (k + u) / 256):
            call(gaussian(VP), x)
        call(gaussian(VP), k.byte(), dequantization=hosm.Uniform())


def built(*layers):
    return OfX(nn.Sequential(nn.Linear(2, 6), *layers, nn.Linear(6, 2)))


TRAINING = [nn.Dropout(0.5), nn.BatchNorm1d(6), nn.FeatureAlphaDropout(0.5), nn.RReLU()]
TRAINING += [nn.MultiheadAttention(6, 1, dropout=0.1)]


@pytest.mark.parametrize("call", ["nll", "bound"])
def test_a_network_in_training_mode(call):
    call, x = CALLS[call], torch.randn(8, 2)
    for layer in TRAINING:
        network = OfX(nn.Identity())
        network.layer = layer.train()  # its mode is looked at, whether it is called or not
        said = f"evaluation mode, .* got layer, a {type(layer).__name__} in training mode"
        with told(said):
            call(model_of(network), x)
        with silence():
            call(model_of(network.eval()), x)
    with silence():
        call(model_of(built(nn.Dropout(0.0), nn.LayerNorm(6))), x)


@pytest.mark.filterwarnings("ignore:network. expected evaluation mode")
@pytest.mark.parametrize("call", ["nll", "graph", "bound", "sample"])
def test_running_statistics_stay_as_they_were(call):
    network, x = built(nn.BatchNorm1d(6)), torch.randn(8, 2)
    network(x, None)
    before = [buffer.clone() for buffer in network.buffers()]
    result = CALLS[call](model_of(network), x)
    assert all(map(torch.equal, network.buffers(), before))
    if call == "graph":
        result.nll.sum().backward()


class Labelled(nn.Module):
    """Drops a tenth of the labels in training, by code of its own, as DiT does for guidance."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(1, 2)

    def forward(self, x, t, y):
        if self.training:
            y = torch.where(torch.rand(y.shape) < 0.1, 9.0, y)
        return x * self.table(y[:, None])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("call", CALLS)
def test_a_network_that_draws_by_code_of_its_own(call, seed):
    """Of four labels often none is dropped in several calls."""
    torch.manual_seed(seed)
    model, x, given = model_of(Labelled()), torch.randn(4, 2), {"y": torch.arange(4.0)}
    with told(DRAWS) as seen:
        CALLS[call](model, x, model_kwargs=given)
    assert [each.filename for each in seen] == [__file__]  # of the user's line
    with silence():
        CALLS[call](model.eval(), x, model_kwargs=given)


def energy(x, t):
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(x.square().sum(), x)[0]


def test_a_network_without_a_derivative_is_refused():
    layer, x = nn.Linear(2, 2), torch.randn(4, 2)
    for network in (energy, lambda x, t: checkpoint(layer, x, use_reentrant=True)):
        with pytest.raises(hosm.DerivativeError):
            hosm.ode_nll(model_of(network), x)
    plain = model_of(lambda x, t: checkpoint(layer, x, use_reentrant=False))
    assert not hosm.ode_nll(plain, x).failed.any()
