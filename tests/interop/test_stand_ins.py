"""Projects that are not on a package index: stand-ins with their attributes, from their papers.

Each stand-in says what its project documents: which arguments the network takes, what it returns,
and which loss it is trained with. None of their code is here.
"""

import enum
import math

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.interop import from_edm, from_guided_diffusion
from tests.interop.checks import check_all_from_one_line, noised
from tests.oracles import default_dtype


class Net(nn.Module):
    """F(x, label) on images of two channels, that remembers the labels it was given."""

    def __init__(self, out=2, classes=0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, out, 3, padding=1)
        self.embed = nn.Embedding(classes, 8) if classes else None
        self.seen = None

    def forward(self, x, labels, y=None):
        self.seen = labels.detach()
        hidden = self.first(x) + torch.sin(labels / 100).reshape(-1, 1, 1, 1)
        if y is not None:
            hidden = hidden + self.embed(y)[:, :, None, None]
        return self.last(torch.tanh(hidden))


def batch():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 2, 4, 4, generator=generator) for _ in range(2)]


class EDMPrecond(nn.Module):
    """arXiv 2206.00364, table 1: D = c_skip x + c_out F(c_in x, c_noise), in float32."""

    def __init__(self, sigma_min=0.0, sigma_max=float("inf")):
        super().__init__()
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, 0.5
        self.inner = Net(classes=3)

    def forward(self, x, sigma, class_labels=None):
        sigma = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        inner = self.inner(x / total.sqrt(), sigma.flatten().log() / 4, class_labels)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * inner


def test_edm():
    net = EDMPrecond().double()
    model = from_edm(net)
    x0, noise = batch()
    sigma = torch.tensor([0.01, 0.5, 3.0, 60.0])
    labels = {"class_labels": torch.tensor([0, 2, 1, 1])}
    x_t = x0 + sigma[:, None, None, None] * noise
    torch.testing.assert_close(noised(model, x0, sigma, noise), x_t)
    denoised = net(x_t, sigma, **labels)
    torch.testing.assert_close(
        model.noise(x_t, sigma, **labels), (x_t - denoised) / sigma[:, None, None, None]
    )
    # Its loss: λ(σ) = (σ² + σ_d²)/(σ σ_d)² on the denoiser.
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    own = (weight * (denoised - x0).square().mean((1, 2, 3))).mean()
    ours = hosm.first_order_dsm(
        model,
        x0,
        t=sigma,
        noise=noise,
        weighting=lambda t: (t**2 + 0.25) / 0.25,
        model_kwargs=labels,
    )
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    check_all_from_one_line(model, x0, labels)


def test_edm_takes_its_range_from_the_network():
    schedule = from_edm(EDMPrecond()).schedule
    assert (schedule.t_min, schedule.t_max) == (0.002, 80.0)
    schedule = from_edm(EDMPrecond(0.02, 50.0)).schedule
    assert (schedule.t_min, schedule.t_max) == (0.02, 50.0)


class ModelMeanType(enum.Enum):
    PREVIOUS_X, START_X, EPSILON = 1, 2, 3


class ModelVarType(enum.Enum):
    LEARNED, FIXED_SMALL, FIXED_LARGE, LEARNED_RANGE = 1, 2, 3, 4


class GaussianDiffusion:
    """A table of ᾱ as a numpy array, and what the model predicts."""

    def __init__(self, mean="EPSILON", variance="LEARNED_RANGE", rescale=False, steps=1000):
        betas = torch.linspace(0.1 / steps, 20.0 / steps, steps, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).numpy()
        self.model_mean_type, self.model_var_type = ModelMeanType[mean], ModelVarType[variance]
        self.rescale_timesteps, self.num_timesteps = rescale, steps


class SpacedDiffusion(GaussianDiffusion):
    """A subset of the steps of another, whose model is given the steps of the other."""

    def __init__(self, use, **options):
        super().__init__(**options)
        self.original_num_steps = len(self.alphas_cumprod)
        self.timestep_map = sorted(use)
        self.alphas_cumprod = self.alphas_cumprod[self.timestep_map]
        self.num_timesteps = len(self.timestep_map)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("variance", ["LEARNED", "LEARNED_RANGE", "FIXED_SMALL"])
def test_guided_diffusion(variance, mean, spaced, rescale):
    options = {"mean": mean, "variance": variance, "rescale": rescale, "steps": 500}
    diffusion = (
        SpacedDiffusion(range(0, 500, 7), **options) if spaced else GaussianDiffusion(**options)
    )
    learned = variance.startswith("LEARNED")
    net = Net(out=4 if learned else 2, classes=3).double()
    model = from_guided_diffusion(net, diffusion)
    x0, noise = batch()
    t = torch.tensor([0, 5, 40, 70])
    y = {"y": torch.tensor([0, 2, 1, 1])}
    table = torch.as_tensor(diffusion.alphas_cumprod)[t][:, None, None, None]
    x_t = table.sqrt() * x0 + (1 - table).sqrt() * noise
    torch.testing.assert_close(noised(model, x0, t, noise), x_t)
    steps = torch.tensor(diffusion.timestep_map)[t] if spaced else t
    labels = steps * (1000 / 500) if rescale else steps
    predicted = net(x_t, labels, **y)[:, :2]
    target = noise if mean == "EPSILON" else x0
    own = (predicted - target).square().mean()
    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting="native", model_kwargs=y)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    torch.testing.assert_close(net.seen.double(), labels.double())
    # Between two indices the label is that of their noise in the table of all steps.
    between = torch.full((4,), 5.25)
    model.noise(x0, between, **y)
    every = hosm.DiscreteSchedule(GaussianDiffusion(**options).alphas_cumprod)
    levels = [
        every.log_sigma_hat(net.seen * (0.5 if rescale else 1)),
        model.schedule.log_sigma_hat(between),
    ]
    torch.testing.assert_close(*levels, rtol=0, atol=1e-4 if spaced else 1e-9)
    with pytest.raises(ValueError):
        model.noise(x0, -between, **y)
    check_all_from_one_line(model, x0, y)


def test_a_table_of_python_numbers_keeps_its_digits():
    diffusion = GaussianDiffusion(variance="FIXED_SMALL")
    diffusion.alphas_cumprod = [0.9999, 0.5, 0.1]
    with default_dtype(torch.float32):
        model = from_guided_diffusion(nn.Identity(), diffusion)
    assert model.schedule.alphas_cumprod == (0.9999, 0.5, 0.1)


class VelocityModel(Net):
    """Flow matching with data at t = 1: u = x_1 − x_0 along x_t = (1 − t) x_0 + t x_1."""


@pytest.mark.parametrize("order", ["x, t", "t, x"])
def test_flow_matching_with_reversed_time_in_one_expression(order):
    net = VelocityModel().double()
    if order == "x, t":
        model = hosm.ScoreModel(
            net,
            hosm.LinearFlowSchedule(),
            "flow_prediction",
            time=lambda t: 1 - t,
            output=torch.neg,
        )
        velocity = net
    else:

        class Swapped(VelocityModel):
            def forward(self, t, x):
                return super().forward(x, t)

        net = Swapped().double()
        model = hosm.ScoreModel(
            net,
            hosm.LinearFlowSchedule(),
            "flow_prediction",
            call=lambda network, x, t: network(1 - t, x),
            output=torch.neg,
        )

        def velocity(x, t):
            return net(t, x)

    data, noise = batch()
    s = torch.tensor([0.001, 0.3, 0.6, 0.999])  # the project's time
    each = s[:, None, None, None]
    x_s = (1 - each) * noise + each * data
    torch.testing.assert_close(noised(model, data, 1 - s, noise), x_s)
    u = velocity(x_s, s)
    # x_s and u fix the noise: noise = x_s − s u.
    torch.testing.assert_close(model.noise(x_s, 1 - s), x_s - each * u)
    own = (u - (data - noise)).square().mean()
    ours = hosm.first_order_dsm(model, data, t=1 - s, noise=noise, weighting="native")
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    assert math.isfinite(hosm.third_order_dsm(model, data).item())
    assert not bool(hosm.ode_nll(model, data, steps=6).failed.any())
    assert {key.partition(".")[0] for key in model.state_dict()} == {"network"}
