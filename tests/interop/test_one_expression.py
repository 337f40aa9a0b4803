"""Projects wrapped by one expression, each against the project itself."""

import operator

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.integration.networks import NETWORKS, SHAPE
from tests.interop.checks import Net, check_one_line, close, noised


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
    net = NETWORKS["torchcfm UNetModel"].score_model(torch.float32).network
    model = hosm.from_flow_matching(net, schedule, data_at=1, time_first=True)
    data, noise = torch.randn(2, 3, *SHAPE, dtype=torch.float32)
    s = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float32)
    matcher = getattr(matchers, kind)(sigma=0.0)
    _, x_s, target, eps = matcher.sample_location_and_conditional_flow(
        noise, data, t=s, return_noise=True
    )
    noise = eps if kind.startswith("Target") else noise
    close(noised(model, data, 1 - s, noise), x_s, 1e-6)
    own = (net(s, x_s) - target).square().mean()
    ours = hosm.first_order_dsm(model, data, t=1 - s, noise=noise, weighting="native")
    close(ours, own)
    if kind == "ConditionalFlowMatcher":
        check_one_line(model, data)


class Velocity(nn.Module):
    """A velocity of (x, t), or of (t, x) as in torchcfm, in a time of `factor` at its end."""

    def __init__(self, time_first, factor):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.time_first, self.factor = time_first, factor

    def forward(self, x, t, shift=0.0):
        x, t = (t, x) if self.time_first else (x, t)
        return self.layers(torch.cat([x, t[:, None] / self.factor], 1)) + shift


@pytest.mark.parametrize("schedule", [None, hosm.VPSchedule()])
@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize(("time_first", "factor"), [(False, 999.0), (True, 1.0)])
def test_flow_matching_is_the_wrapping_by_hand(time_first, factor, data_at, schedule):
    """Losses, likelihoods and samples, whichever end the data are at."""
    net, x0 = Velocity(time_first, factor), torch.randn(4, 2)

    def by_hand(x, t, shift):
        s = factor * (1 - t if data_at == 1 else t)
        velocity = net(s, x, shift) if time_first else net(x, s, shift)
        return -velocity if data_at == 1 else velocity

    models = (
        hosm.from_flow_matching(
            net, schedule, data_at=data_at, time=factor, time_first=time_first
        ),
        hosm.ScoreModel(by_hand, schedule or hosm.LinearFlowSchedule(), "velocity"),
    )
    found = []
    for model in models:
        net.zero_grad()
        torch.manual_seed(0)
        kwargs = {"model_kwargs": {"shift": torch.ones(4, 2)}}
        loss = hosm.third_order_dsm(model, x0, weighting="native", **kwargs)
        loss.backward()
        solved = {"solver": hosm.FixedGrid(8), "divergence": "exact", **kwargs}
        nll, drawn = hosm.ode_nll(model, x0, **solved).nll, hosm.ode_sample(model, x0, **solved).x
        grads = [parameter.grad.flatten().clone() for parameter in net.parameters()]
        found.append(torch.cat([loss.detach()[None], nll, drawn.flatten(), *grads]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_azula():
    """A denoiser that returns a posterior, under azula's own VE schedule."""
    denoise = pytest.importorskip("azula.denoise")
    from azula.noise import VESchedule

    denoiser = denoise.KarrasDenoiser(Net(), VESchedule(0.01, 50.0))
    schedule = hosm.VESchedule(sigma_min=0.01, sigma_max=50.0)
    output = operator.attrgetter("mean")
    model = hosm.ScoreModel(denoiser.double(), schedule, "x0", output=output)
    x0, t = torch.randn(3, *SHAPE), torch.tensor([0.2, 0.5, 0.9])
    torch.manual_seed(3)
    own = denoiser.loss(x0, t)
    torch.manual_seed(3)
    noise = torch.randn_like(x0)

    def weight(t):
        """Its (α² + σ²)/σ² on the sample is (α² + σ²)/α² on the noise."""
        alpha, sigma = schedule(t)
        return (alpha**2 + sigma**2) / alpha**2

    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting=weight)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    check_one_line(model, x0)
