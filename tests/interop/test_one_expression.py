"""Projects that need no function of ours: one ScoreModel(...) each, against the project itself."""

import operator

import pytest
import torch

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
    model = hosm.ScoreModel(
        net,
        schedule,
        "flow_prediction",
        call=lambda net, x, t, **kwargs: net(1 - t, x, **kwargs),
        output=torch.neg,
    )
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
        check_one_line(model, data, pickles=False)


def test_azula():
    """A denoiser that returns a posterior, under azula's own VE schedule."""
    denoise = pytest.importorskip("azula.denoise")
    from azula.noise import VESchedule

    denoiser = denoise.KarrasDenoiser(Net(), VESchedule(0.01, 50.0))
    schedule = hosm.VESchedule(sigma_min=0.01, sigma_max=50.0)
    output = operator.attrgetter("mean")
    model = hosm.ScoreModel(denoiser.double(), schedule, "sample", output=output)
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
