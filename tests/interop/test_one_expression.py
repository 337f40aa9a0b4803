"""Projects that need no function of ours: one ScoreModel(...) each, against the project itself."""

import operator

import pytest
import torch

import hosm_losses as hosm
from tests.integration import builders
from tests.interop.checks import noised


def batch():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *builders.SHAPE, generator=generator) for _ in range(2)]


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("ConditionalFlowMatcher", hosm.LinearFlowSchedule()),
        ("TargetConditionalFlowMatcher", hosm.LinearFlowSchedule()),
        ("VariancePreservingConditionalFlowMatcher", hosm.CosineSchedule(offset=0)),
    ],
)
def test_torchcfm(kind, schedule):
    """Time runs from noise to data, and comes first among the arguments."""
    matchers = pytest.importorskip("torchcfm.conditional_flow_matching")

    torch.manual_seed(0)
    net = builders.torchcfm().network.float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = hosm.ScoreModel(
        net,
        schedule,
        "flow_prediction",
        call=lambda net, x, t, **kwargs: net(1 - t, x, **kwargs),
        output=torch.neg,
    )
    data, noise = (part.float() for part in batch())
    s = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float32)
    matcher = getattr(matchers, kind)(sigma=0.0)
    drawn = matcher.sample_location_and_conditional_flow(noise, data, t=s, return_noise=True)
    _, x_s, target, eps = drawn
    noise = eps if kind.startswith("Target") else noise
    torch.testing.assert_close(noised(model, data, 1 - s, noise), x_s, rtol=0, atol=1e-6)
    own = (net(s, x_s) - target).square().mean()
    ours = hosm.first_order_dsm(model, data, t=1 - s, noise=noise, weighting="native")
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    hosm.third_order_dsm(model, data).backward()
    assert not bool(hosm.ode_nll(model, data, steps=6).failed.any())


@pytest.mark.parametrize("kind", ["KarrasDenoiser", "SimpleDenoiser"])
def test_azula(kind):
    """A denoiser that returns a posterior, under azula's own VE schedule."""
    denoise = pytest.importorskip("azula.denoise")
    from azula.noise import VESchedule

    torch.manual_seed(0)

    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x, log_sigma):
            return torch.tanh(self.layer(x) + log_sigma[:, None, None, None])

    denoiser = getattr(denoise, kind)(Backbone().double(), VESchedule(0.01, 50.0))
    model = hosm.ScoreModel(
        denoiser,
        hosm.VESchedule(sigma_min=0.01, sigma_max=50.0),
        "sample",
        output=operator.attrgetter("mean"),
    )
    x0, _ = batch()
    t = torch.tensor([0.2, 0.5, 0.9])
    torch.manual_seed(3)
    options = {"max_weight": float("inf")} if kind == "SimpleDenoiser" else {}
    own = denoiser.loss(x0, t, **options)
    torch.manual_seed(3)
    noise = torch.randn_like(x0)

    def weight(t):
        """Its (α² + σ²)/σ² on the sample is (α² + σ²)/α² on the noise."""
        alpha, sigma = model.schedule(t)
        return (alpha**2 + sigma**2) / alpha**2

    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting=weight)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    hosm.third_order_dsm(model, x0).backward()
    # On six steps the solver error of an untrained network may be thousands of nats.
    assert bool(hosm.ode_nll(model, x0, steps=6).solver_error.isfinite().all())


def test_a_denoiser_of_sigma_as_those_of_k_diffusion():
    """D(x, σ) is "sample" under the EDM schedule, whatever wraps the network inside."""
    layer = torch.nn.Linear(3, 3)

    def denoiser(x, sigma, **kwargs):
        scale = sigma[:, None]
        return x / (1 + scale**2) + scale / (1 + scale**2).sqrt() * torch.tanh(layer(x))

    model = hosm.ScoreModel(denoiser, hosm.EDMSchedule(t_min=0.01, t_max=50.0), "sample")
    x0, noise = torch.randn(4, 3), torch.randn(4, 3)
    sigma = torch.tensor([0.02, 0.5, 4.0, 40.0])
    own = (denoiser(x0 + sigma[:, None] * noise, sigma) - x0).square().mean()
    ours = hosm.first_order_dsm(model, x0, t=sigma, noise=noise, weighting="native")
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
