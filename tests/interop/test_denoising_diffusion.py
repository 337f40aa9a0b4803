"""Against denoising-diffusion-pytorch itself: x_t, ε̂ and its own loss."""

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.interop import from_denoising_diffusion
from tests.integration import builders
from tests.interop.checks import check_all_from_one_line, noised

package = pytest.importorskip("denoising_diffusion_pytorch")


def made(objective="pred_v", self_condition=False, **options):
    torch.manual_seed(0)
    network = builders.lucidrains(flash=False, self_condition=self_condition)
    return package.GaussianDiffusion(
        network, image_size=8, timesteps=200, objective=objective, **options
    ).double()


def batch(diffusion):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 8, 8, generator=generator)
    noise = torch.randn(3, 2, 8, 8, generator=generator)
    return diffusion.normalize(images), torch.tensor([0, 90, 195]), noise


@pytest.mark.parametrize("betas", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_its_own_loss(objective, betas):
    diffusion = made(objective, beta_schedule=betas)
    model = from_denoising_diffusion(diffusion)
    x0, t, noise = batch(diffusion)
    torch.testing.assert_close(
        noised(model, x0, t, noise), diffusion.q_sample(x0, t, noise), rtol=0, atol=1e-5
    )
    own = diffusion.p_losses(x0, t, noise)
    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    x_t = noised(model, x0, t, noise)
    expected = diffusion.model_predictions(x_t, t).pred_noise
    torch.testing.assert_close(model.noise(x_t, t), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("betas", ["linear", "cosine", "sigmoid"])
def test_the_noise_of_every_step_is_that_of_the_project(betas):
    network = builders.lucidrains(flash=False)
    diffusion = package.GaussianDiffusion(
        network, image_size=8, timesteps=4000, beta_schedule=betas, objective="pred_x0"
    )
    alpha, sigma = from_denoising_diffusion(diffusion).schedule(torch.arange(4000.0))
    own = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
    for found, expected in zip((alpha, sigma), own, strict=True):
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


def test_the_known_tables_are_those_of_the_project():
    linear = hosm.DiscreteSchedule.linear(200, 5e-4, 0.1)
    for betas, schedule in (("linear", linear), ("cosine", hosm.DiscreteSchedule.cosine(200))):
        table = made(beta_schedule=betas).alphas_cumprod.tolist()
        assert schedule.alphas_cumprod == pytest.approx(table, rel=1e-6)


def test_min_snr_as_a_callable_weighting():
    diffusion = made("pred_v", min_snr_loss_weight=True)
    model = from_denoising_diffusion(diffusion)
    x0, t, noise = batch(diffusion)
    table = diffusion.alphas_cumprod

    def weight(t):
        snr = (table / (1 - table))[t]
        return (snr.clamp(max=5) / snr).to(x0.dtype)

    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting=weight)
    torch.testing.assert_close(ours, diffusion.p_losses(x0, t, noise), rtol=1e-5, atol=1e-5)


def test_one_line_is_enough():
    diffusion = made()
    model = from_denoising_diffusion(diffusion)
    assert model.network is diffusion.model
    check_all_from_one_line(model, batch(diffusion)[0], pickles=False)


def test_self_conditioning_is_refused():
    with pytest.raises(ValueError):
        from_denoising_diffusion(made(self_condition=True))


def test_classes_are_dropped_in_training_alone():
    from denoising_diffusion_pytorch import classifier_free_guidance as guided

    torch.manual_seed(0)
    network = guided.Unet(dim=8, dim_mults=(1,), num_classes=3, channels=2)
    model = from_denoising_diffusion(guided.GaussianDiffusion(network, image_size=8))
    x, t, classes = torch.randn(3, 2, 8, 8), torch.tensor([20, 90, 195]), torch.tensor([0, 1, 2])
    drawn = [model.predict(x, t, classes=classes) for _ in range(9)]
    assert not all(torch.equal(drawn[0], each) for each in drawn)
    model.eval()
    expected = network(x, t, classes=classes, cond_drop_prob=0.0)
    assert torch.equal(model.predict(x, t, classes=classes), expected)
    dropped = model.predict(x, t, classes=classes, cond_drop_prob=1.0)
    assert torch.equal(dropped, network(x, t, classes=classes, cond_drop_prob=1.0))
    assert not torch.equal(dropped, expected)


def test_the_variance_of_a_learned_one_is_left_out():
    from denoising_diffusion_pytorch import learned_gaussian_diffusion as learned

    network = package.Unet(dim=8, dim_mults=(1,), channels=2, learned_variance=True).double()
    model = from_denoising_diffusion(learned.LearnedGaussianDiffusion(network, image_size=8))
    x, t = torch.randn(3, 2, 8, 8), torch.tensor([20, 90, 195])
    assert torch.equal(model.predict(x, t), network(x, t)[:, :2])


@pytest.mark.parametrize(
    ("betas", "dtype"),
    [("cosine", torch.float16), ("cosine", torch.bfloat16), ("linear", torch.bfloat16)],
)
def test_a_table_that_a_half_type_has_rounded_is_told_as_such(betas, dtype):
    """Not as zero terminal SNR, with a cut that would not help."""
    network = builders.lucidrains(flash=False)
    diffusion = package.GaussianDiffusion(network, image_size=8, beta_schedule=betas)
    schedule = from_denoising_diffusion(diffusion).schedule
    assert schedule.alphas_cumprod[-1] > 0
    with pytest.raises(ValueError):
        from_denoising_diffusion(diffusion.to(dtype))
