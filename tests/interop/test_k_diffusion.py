"""Against k-diffusion itself, which needs an environment of its own: its packages want numpy 1."""

import warnings

import pytest
import torch

import hosm_losses as hosm
from tests.interop.checks import Net, check_one_line

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    K = pytest.importorskip("k_diffusion")


def model_of(denoiser):
    return hosm.ScoreModel(denoiser, hosm.EDMSchedule(t_min=0.02, t_max=50.0), "x0")


@pytest.mark.parametrize("weighting", ["karras", "soft-min-snr", "snr"])
def test_its_own_loss(weighting):
    denoiser = K.Denoiser(Net().double(), sigma_data=0.5, weighting=weighting)
    model = model_of(denoiser)
    x0, noise = torch.randn(2, 4, 2, 4, 4)
    sigma = torch.tensor([0.03, 0.5, 4.0, 40.0])
    own = denoiser.loss(x0, noise, sigma).mean()

    def weight(t):
        """Its loss is on F = (D − c_skip x)/c_out: (σ² + σ_d²)/σ_d² on the noise."""
        return denoiser.weighting(t) * (t**2 + 0.25) / 0.25

    ours = hosm.first_order_dsm(model, x0, t=sigma, noise=noise, weighting=weight)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    check_one_line(model, x0, pickles=False)


def test_its_likelihood():
    """A diagonal Jacobian: one probe of signs is exact, so that both give one number."""
    denoiser = K.Denoiser(lambda x, sigma: torch.sin(x), sigma_data=0.5)
    x = 0.5 * torch.randn(3, 2, 4, 4)
    theirs, _ = K.sampling.log_likelihood(denoiser, x, 0.02, 50.0, atol=1e-7, rtol=1e-7)
    ours = hosm.ode_nll(model_of(denoiser), x, solver=hosm.Adaptive(1e-6), divergence="exact")
    torch.testing.assert_close(-ours.nll, theirs, rtol=0, atol=1e-3)
