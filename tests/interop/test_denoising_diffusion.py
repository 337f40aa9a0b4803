"""Against denoising-diffusion-pytorch itself: x_t, ε̂ and its own loss."""

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.interop import from_denoising_diffusion
from tests.integration.networks import lucidrains
from tests.interop.checks import check_one_line, close, noised

package = pytest.importorskip("denoising_diffusion_pytorch")
T = torch.tensor([0, 1800, 3900])


def made(objective="pred_v", **options):
    options |= {"image_size": 8, "timesteps": 4000, "objective": objective}
    return package.GaussianDiffusion(lucidrains(), **options).double()


@pytest.mark.parametrize(
    ("objective", "betas", "min_snr"),
    [
        ("pred_noise", "linear", False),
        ("pred_x0", "cosine", False),
        ("pred_v", "sigmoid", False),
        *((objective, "cosine", True) for objective in ("pred_noise", "pred_v")),
    ],
)
def test_its_own_loss(objective, betas, min_snr):
    """Which weighs by min(SNR, 5)/SNR if asked."""
    diffusion = made(objective, beta_schedule=betas, min_snr_loss_weight=min_snr)
    model = from_denoising_diffusion(diffusion)
    x0, noise = diffusion.normalize(torch.rand(3, 2, 8, 8)), torch.randn(3, 2, 8, 8)
    x_t = noised(model, x0, T, noise)
    close(x_t, diffusion.q_sample(x0, T, noise))
    own = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
    for part, expected in zip(model.schedule(torch.arange(4000.0)), own, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=0)

    def weight(t):
        alpha, sigma = model.schedule(t)
        return ((alpha / sigma) ** 2).clamp(max=5) * (sigma / alpha) ** 2

    weighting = weight if min_snr else "noise"
    loss = hosm.first_order_dsm(model, x0, t=T, noise=noise, weighting=weighting)
    close(loss, diffusion.p_losses(x0, T, noise))
    close(model.noise(x_t, T), diffusion.model_predictions(x_t, T).pred_noise, 1e-4)


def test_one_line_is_enough():
    diffusion = made()
    model = from_denoising_diffusion(diffusion)
    assert model.network is diffusion.model
    check_one_line(model, torch.randn(3, 2, 8, 8), pickles=False)


def test_no_class_is_dropped_after_training():
    from denoising_diffusion_pytorch import classifier_free_guidance as guided

    network = guided.Unet(dim=8, dim_mults=(1,), num_classes=3, channels=2)
    model = from_denoising_diffusion(guided.GaussianDiffusion(network, image_size=8))
    x, classes = torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 2])
    model.eval()
    expected = network(x, T, classes=classes, cond_drop_prob=0.0)
    assert torch.equal(model.predict(x, T, classes=classes), expected)


def test_the_variance_of_a_learned_one_is_left_out():
    from denoising_diffusion_pytorch import learned_gaussian_diffusion as learned

    network = package.Unet(dim=8, dim_mults=(1,), channels=2, learned_variance=True).double()
    model = from_denoising_diffusion(learned.LearnedGaussianDiffusion(network, image_size=8))
    x = torch.randn(3, 2, 8, 8)
    assert torch.equal(model.predict(x, T), network(x, T)[:, :2])
