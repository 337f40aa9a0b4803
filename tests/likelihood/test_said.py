"""What a likelihood says of a network or a schedule with which it is another number."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hosm_losses as hosm
from tests.oracles import Learned

VP = hosm.VPSchedule()
BETAS = torch.linspace(1e-4, 0.02, 1000)
FAR = {
    "betas of DDPM for those of VP": hosm.VPSchedule(beta_min=1e-4, beta_max=0.02),
    "alphas for alphas_cumprod": hosm.DiscreteSchedule(1 - BETAS),
    "a tenth of the steps": hosm.DiscreteSchedule.linear(100),
    "half of the time": hosm.CosineSchedule(t_max=0.5),
}
NEAR = [
    VP,
    hosm.SubVPSchedule(),
    hosm.VESchedule(),
    hosm.CosineSchedule(),
    hosm.EDMSchedule(),
    hosm.LinearFlowSchedule(),
    hosm.DiscreteSchedule.linear(1000),
    hosm.DiscreteSchedule.linear(1000, scaled=True),
    hosm.DiscreteSchedule.cosine(1000),
]


def normal(schedule, std=0.5):
    """The exact noise of data N(0, std²)."""

    def noise(x, t):
        alpha, sigma = (each[:, None] for each in schedule(t))
        return sigma * x / ((alpha * std) ** 2 + sigma**2)

    return hosm.ScoreModel(noise, schedule)


@pytest.mark.parametrize("function", [hosm.ode_nll, hosm.variational_nll])
@pytest.mark.parametrize("name", FAR)
def test_a_schedule_that_does_not_end_in_its_prior(name, function):
    x = 0.5 * torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"schedule: expected one that ends in its prior"):
        function(normal(FAR[name]), x)
    # Those who give a prior know of it, and so does data that starts as the prior is.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(normal(FAR[name]), x, log_prior=lambda z: -0.5 * z.square().sum(1))
        function(normal(FAR[name], 1.0), x, data_std=1.0)


def test_latents_that_are_drawn_from_a_prior_where_the_schedule_does_not_end():
    """Not where they are given: those who give them know of which law they are."""
    model = normal(FAR["a tenth of the steps"])
    said = r"schedule: expected one that ends in its prior.* nats .*samples from the prior are off"
    with pytest.warns(UserWarning, match=said):
        hosm.ode_sample(model, (4, 3), steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.ode_sample(model, torch.randn(4, 3), steps=8)
        hosm.ode_sample(model, (4, 3), steps=8, data_std=1.0)
        for schedule in NEAR:
            hosm.ode_sample(normal(schedule), (4, 3), steps=8)


def test_by_how_much_in_nats():
    """That of Gaussian data is the divergence of what it ends in from the prior."""
    schedule = FAR["half of the time"]
    alpha, sigma = schedule(torch.tensor(schedule.t_max))
    variance = alpha**2 * torch.tensor([0.25, 4.0, 1.0]) + sigma**2
    mean = alpha * torch.tensor([0.3, -1.0, 0.0])
    expected = 0.5 * (variance + mean**2 - 1 - variance.log()).sum()
    moments = {"data_mean": torch.tensor([0.3, -1, 0]), "data_std": torch.tensor([0.5, 2, 1])}
    with pytest.warns(UserWarning, match=f"ends {float(expected):.2g} nats a sample"):
        hosm.ode_nll(normal(schedule), torch.zeros(2, 3), **moments)


@pytest.mark.parametrize("schedule", NEAR, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("std", [0.1, 0.5, 1.0])
def test_nothing_is_said_of_those_that_do(schedule, std):
    hosm.ode_nll(normal(schedule, std), std * torch.randn(4, 3), steps=8, data_std=std)


def built(*layers):
    network = nn.Sequential(nn.Linear(2, 6), *layers, nn.Linear(6, 2))
    return hosm.ScoreModel(network, VP, call=lambda network, x, t: network(x))


@pytest.mark.parametrize("kind", ["Dropout", "BatchNorm1d"])
@pytest.mark.parametrize("function", [hosm.ode_nll, hosm.variational_nll])
def test_a_network_in_training_mode(function, kind):
    layer = nn.Dropout(0.5) if kind == "Dropout" else nn.BatchNorm1d(6)
    model, x = built(layer), torch.randn(8, 2)
    with pytest.warns(UserWarning, match=rf"evaluation mode, .* got 1, a {kind} in training mode"):
        function(model, x)
    function(model.eval(), x)


@pytest.mark.parametrize(
    "layer", [nn.FeatureAlphaDropout(0.5), nn.RReLU(), nn.MultiheadAttention(6, 1, dropout=0.1)]
)
def test_other_layers_in_training_mode(layer):
    network = nn.Sequential(nn.Linear(2, 6), layer)
    model = hosm.ScoreModel(network, VP, call=lambda network, x, t: x)
    with pytest.warns(UserWarning, match="evaluation mode"):
        hosm.variational_nll(model, torch.randn(8, 2))


class Labelled(nn.Module):
    """Drops the labels of samples in training, by code of its own, as DiT does."""

    def __init__(self, share=0.5):
        super().__init__()
        self.table, self.share = nn.Linear(1, 2), share

    def forward(self, x, t, y):
        if self.training:
            y = torch.where(torch.rand(y.shape) < self.share, 9.0, y)
        return x * self.table(y[:, None])


@pytest.mark.parametrize("options", [{}, {"method": "adaptive"}, {"enable_grad": True}])
@pytest.mark.parametrize("function", [hosm.ode_nll, hosm.variational_nll, hosm.ode_sample])
def test_a_network_that_draws_by_code_of_its_own(function, options):
    """The warning is of the user's line, and the generators are where they would be."""
    model, x = hosm.ScoreModel(Labelled(), VP), torch.randn(8, 2)
    given = {"model_kwargs": {"y": torch.arange(8.0)}}
    given |= {} if function is hosm.variational_nll else options
    with pytest.warns(UserWarning, match=r"network: .*draws random numbers") as told:
        function(model, x, **given)
    assert [each.filename for each in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(model.eval(), x, **given)


def test_labels_that_are_dropped_now_and_then():
    """Of two samples a tenth of the labels, as for guidance: often none in several calls."""
    network = Labelled(0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(20):
            torch.manual_seed(seed)
            given = {"steps": 6, "model_kwargs": {"y": torch.arange(2.0)}}
            hosm.ode_nll(hosm.ScoreModel(network, VP), torch.randn(2, 2), **given)
    assert sum("draws random numbers" in str(each.message) for each in told) > 15


def test_a_network_that_draws_and_does_not_use_it():
    """As a dropout of zero, or a layer that starts the generator by itself."""

    def network(x, t):
        torch.manual_seed(3)
        return x + torch.randn(2) + 0 * torch.rand(())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.ode_nll(hosm.ScoreModel(network, VP), torch.randn(8, 2), steps=8)


@pytest.mark.parametrize("method", [False, True])
def test_a_function_around_a_network_in_training_mode(method):
    norm = nn.BatchNorm1d(2)
    network = norm.forward if method else lambda x, t: norm(x)
    call = (lambda network, x, t: network(x)) if method else None
    model = hosm.ScoreModel(network, VP, call=call)
    with pytest.warns(UserWarning, match="a BatchNorm1d in training mode"):
        hosm.ode_nll(model, torch.randn(8, 2), steps=8)
    assert norm.num_batches_tracked == 0


def test_nothing_is_said_where_nothing_trains():
    hosm.ode_nll(built(nn.Dropout(0.0), nn.LayerNorm(6)), torch.randn(8, 2), steps=8)


@pytest.mark.filterwarnings("ignore:network. expected evaluation mode")
@pytest.mark.parametrize("enable_grad", [False, True])
def test_running_statistics_stay_as_they_were(enable_grad):
    layer = nn.BatchNorm1d(6)
    model, x = built(layer), torch.randn(8, 2)
    for _ in range(2):
        model.noise(x, torch.full((8,), 0.5))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    result = hosm.ode_nll(model, x, steps=8, enable_grad=enable_grad)
    hosm.variational_nll(model, x)
    hosm.ode_sample(model, (4, 2), steps=8)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    if enable_grad:
        result.nll.sum().backward()


def test_a_schedule_that_is_learned_is_looked_at_without_a_graph():
    rate = torch.tensor(20.0, requires_grad=True)
    model = normal(Learned(rate))
    result = hosm.ode_nll(model, torch.randn(4, 2), steps=8, enable_grad=True)
    (gradient,) = torch.autograd.grad(result.nll.sum(), rate)
    assert torch.isfinite(gradient)


def test_the_gap_tells_the_solver_error():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))
    model = hosm.ScoreModel(network, VP, call=lambda network, x, t: network(x))
    x = torch.randn(32, 2)
    few, many = (
        hosm.likelihood_gap(model, x, ode_score=False, nodes=2, steps=steps).numbers
        for steps in (8, 64)
    )
    name = "solver error of ode nll"
    assert many[name].value < 0.01 < few[name].value
    assert abs(few["ode nll"].value - many["ode nll"].value) < 30 * few[name].value


def energy(x, t):
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(x.square().sum(), x)[0]


def checkpointed(layer, reentrant):
    return lambda x, t: checkpoint(layer, x, use_reentrant=reentrant)


def test_what_to_do_about_a_network_is_told():
    layer, x = nn.Linear(2, 2), torch.randn(4, 2)
    with pytest.raises(
        hosm.DerivativeError, match="create_graph=True to a gradient that it takes"
    ):
        hosm.ode_nll(hosm.ScoreModel(energy, VP), x)
    with pytest.raises(hosm.DerivativeError, match=r"In a likelihood .* use_reentrant=False"):
        hosm.ode_nll(hosm.ScoreModel(checkpointed(layer, True), VP), x)
    assert not hosm.ode_nll(hosm.ScoreModel(checkpointed(layer, False), VP), x).failed.any()


def test_a_prior_without_mass_is_named():
    def box(latent):
        return torch.where(latent.abs().amax(1) < 1e-9, 0.0, -torch.inf).to(latent)

    found = hosm.ode_nll(normal(VP), torch.ones(2, 3), divergence="exact", log_prior=box)
    assert found.failed.all()
    assert all("log_prior" in text for text in found.failures().values())


class Scaled(hosm.Schedule):
    """Data times three, at both ends of the noise as the flow's."""

    t_min, t_max = 1e-3, 1 - 1e-3

    def alpha(self, t):
        return 3 * (1 - t)

    def sigma(self, t):
        return 1.0 * t


def test_a_schedule_that_scales_the_data():
    """The point at t_min is not the data then, and its density another."""
    x = 0.5 * torch.randn(4, 3, dtype=torch.float64)
    model, options = normal(Scaled()), {"divergence": "exact"}
    said = r"schedule: expected α\(t_min\) near 1"
    with pytest.warns(UserWarning, match=said):
        found = hosm.ode_nll(model, 3 * x, **options).nll - 3 * math.log(3)
    with pytest.warns(UserWarning, match=said):
        hosm.ode_sample(model, (2, 3))
    truth = -torch.distributions.Normal(0, 0.5).log_prob(x).sum(1)
    torch.testing.assert_close(found, truth, rtol=0, atol=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.ode_nll(model, x, clean=True, **options)
        hosm.variational_nll(model, x)
        for schedule in NEAR:
            hosm.ode_nll(normal(schedule), x.float(), steps=8)
