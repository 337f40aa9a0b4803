"""Against diffusers itself: x_t, ε̂ and its own loss."""

import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import hosm_losses as hosm
from hosm_losses.interop import from_diffusers
from tests.integration import builders
from tests.interop.checks import check_all_from_one_line, noised

diffusers = pytest.importorskip("diffusers")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def built(build, **options):
    """A network of the integration tests, away from where its parameters start."""
    torch.manual_seed(0)
    network = build(**options).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def unet(**options):
    return built(builders.unet_2d, **options)


def batch():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, *builders.SHAPE, generator=generator) for _ in range(2))
    return x0, torch.tensor([3, 500, 997]), noise


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_the_schedulers_own_loss(kind, betas, prediction):
    scheduler = getattr(diffusers, kind)(beta_schedule=betas, prediction_type=prediction)
    network = unet()
    model = from_diffusers(network, scheduler)
    x0, t, noise = batch()
    x_t = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(noised(model, x0, t, noise), x_t, rtol=0, atol=1e-5)
    predicted = network(x_t, t).sample
    target = {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: scheduler.get_velocity(x0, noise, t),
    }[prediction]()
    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting="native")
    torch.testing.assert_close(ours, F.mse_loss(predicted, target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("betas", "schedule"),
    [
        ("linear", hosm.DiscreteSchedule.linear(500)),
        ("scaled_linear", hosm.DiscreteSchedule.linear(500, scaled=True)),
        ("squaredcos_cap_v2", hosm.DiscreteSchedule.cosine(500)),
    ],
)
def test_the_known_tables_are_those_of_the_scheduler(betas, schedule):
    scheduler = diffusers.DDPMScheduler(500, beta_schedule=betas)
    assert schedule.alphas_cumprod == pytest.approx(scheduler.alphas_cumprod.tolist(), rel=1e-4)
    own = hosm.DiscreteSchedule.from_betas(scheduler.betas)
    assert own.alphas_cumprod == pytest.approx(scheduler.alphas_cumprod.tolist(), rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", BETAS)
def test_the_noise_by_the_conversion_of_the_sampler(betas, prediction):
    scheduler = diffusers.DDPMScheduler(beta_schedule=betas, prediction_type=prediction)
    network = unet()
    model = from_diffusers(network, scheduler)
    x0, t, noise = batch()
    x_t = noised(model, x0, t, noise)
    step = scheduler.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
    predicted = network(x_t, t).sample
    expected = {
        "epsilon": lambda: predicted,
        "sample": lambda: (x_t - step.sqrt() * predicted) / (1 - step).sqrt(),
        "v_prediction": lambda: step.sqrt() * predicted + (1 - step).sqrt() * x_t,
    }[prediction]()
    torch.testing.assert_close(model.noise(x_t, t), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_euler_in_the_coordinates_of_what_the_model_is_given():
    scheduler = diffusers.EulerDiscreteScheduler()
    model = from_diffusers(unet(), scheduler)
    x0, t, noise = batch()
    for row in range(3):
        scheduler.set_timesteps(1000)
        each = t[row : row + 1].float()
        sample = scheduler.add_noise(x0[row : row + 1], noise[row : row + 1], each)
        given = scheduler.scale_model_input(sample, each[0])
        ours = noised(model, x0[row : row + 1], t[row : row + 1], noise[row : row + 1])
        torch.testing.assert_close(ours, given, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_continuous_timesteps_of_euler_as_the_scheduler_gives_them():
    """Stable Video Diffusion's configuration."""
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction"
    )
    seen = []

    class Network(torch.nn.Module):
        def forward(self, sample, timestep):
            seen.append(timestep)
            return SimpleNamespace(sample=sample)

    model = from_diffusers(Network(), scheduler)
    t = torch.tensor([999, 400, 0])
    model.noise(torch.ones(3, 2), t)
    scheduler.set_timesteps(1000)
    expected = scheduler.timesteps[999 - t]
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert pickle.loads(pickle.dumps(model.time))(t).shape == (3,)


def test_what_a_network_returns_as_a_tuple():
    model = from_diffusers(unet(), diffusers.DDPMScheduler())
    x0, t, _ = batch()
    torch.testing.assert_close(model.noise(x0, t, return_dict=False), model.noise(x0, t))


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "SD3Transformer2DModel"])
def test_models_that_multiply_the_time_themselves_are_given_fractions(name):
    def forward(self, sample, timestep):
        self.seen = timestep
        return SimpleNamespace(sample=sample)

    network = type(name, (torch.nn.Module,), {"forward": forward})()
    model = from_diffusers(network, diffusers.FlowMatchEulerDiscreteScheduler())
    t = torch.tensor([0.3, 0.6])
    model.noise(torch.ones(2, 3), t)
    torch.testing.assert_close(network.seen, t if "Flux" in name else 1000 * t)


def test_fractions_of_a_subclass_and_through_wrappers():
    def forward(self, sample, timestep):
        self.seen = timestep
        return SimpleNamespace(sample=sample)

    flux = type("FluxTransformer2DModel", (torch.nn.Module,), {"forward": forward})
    network, t = type("Tuned", (flux,), {})(), torch.tensor([0.3, 0.6])
    network.layer = torch.nn.Linear(1, 1)
    wrapped = torch.compile(network, backend="eager")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    for given in (network, wrapped):
        model = from_diffusers(given, scheduler)
        model.noise(torch.ones(2, 3), t)
        torch.testing.assert_close(network.seen, t)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module.*got .*type function"):
        from_diffusers(lambda x, timestep: network(x, timestep), scheduler)


def test_flow_matching_is_a_linear_flow_with_times_up_to_a_thousand():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    network = unet()
    model = from_diffusers(network, scheduler)
    x0, _, noise = batch()
    steps = scheduler.timesteps[[10, 400, 900]]
    t = (steps / 1000).double()
    x_t = scheduler.scale_noise(x0, steps, noise)
    torch.testing.assert_close(noised(model, x0, t, noise), x_t, rtol=0, atol=1e-5)
    own = F.mse_loss(network(x_t, steps.double()).sample, noise - x0)
    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting="native")
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


WITH_FLOW_SIGMAS = [
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # in diffusers
@pytest.mark.parametrize("kind", WITH_FLOW_SIGMAS)
def test_a_scheduler_with_flow_sigmas_is_a_linear_flow(kind):
    """Its timesteps are 1000 sigma, rounded down, and it samples along alpha = 1 - sigma."""
    options = {"use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = getattr(diffusers, kind)(prediction_type="flow_prediction", **options)
    scheduler.set_timesteps(100)
    network = unet()
    model = from_diffusers(network, scheduler)
    x0, _, noise = batch()
    places = torch.tensor([10, 40, 90])
    steps, t = scheduler.timesteps[places], scheduler.sigmas[places].double()
    assert bool(((1000 * t - steps).abs() < 1).all())
    alpha, sigma = (p[:, None, None, None] for p in scheduler._sigma_to_alpha_sigma_t(t))
    x_t = alpha * x0 + sigma * noise  # by add_noise as well, but of SASolver, which has the table
    torch.testing.assert_close(noised(model, x0, t, noise), x_t, rtol=0, atol=1e-5)
    own = F.mse_loss(network(x_t, 1000 * t).sample, noise - x0)
    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting="native")
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_one_line_is_enough_for_a_unet(scheduler):
    model = from_diffusers(unet(), getattr(diffusers, scheduler)())
    check_all_from_one_line(model, batch()[0])


def test_one_line_is_enough_for_a_text_to_image_unet():
    network = built(builders.unet_2d_condition)
    model = from_diffusers(network, diffusers.DDIMScheduler(beta_schedule="scaled_linear"))
    check_all_from_one_line(model, batch()[0], {"encoder_hidden_states": torch.randn(3, 5, 6)})


def test_one_line_is_enough_for_a_dit_that_learns_its_variance():
    network = built(builders.dit).eval()
    model = from_diffusers(network, diffusers.DDPMScheduler())
    x0, t, noise = batch()
    kwargs = {"class_labels": torch.tensor([1, 2, 3])}
    own = F.mse_loss(network(noised(model, x0, t, noise), t, **kwargs).sample[:, :2], noise)
    ours = hosm.first_order_dsm(model, x0, t=t, noise=noise, model_kwargs=kwargs)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    check_all_from_one_line(model, x0, kwargs)


def test_one_line_is_enough_for_sd3_which_takes_its_time_by_name():
    network = built(lambda: builders.sd3().network).float()
    model = from_diffusers(network, diffusers.FlowMatchEulerDiscreteScheduler())
    kwargs = {
        "encoder_hidden_states": torch.randn(3, 4, 6, dtype=torch.float32),
        "pooled_projections": torch.randn(3, 5, dtype=torch.float32),
    }
    check_all_from_one_line(model, batch()[0].float(), kwargs)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr_is_refused_with_the_cut(kind):
    scheduler = getattr(diffusers, kind)(
        rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    with pytest.raises(ValueError):
        from_diffusers(unet(), scheduler)
    cut = hosm.DiscreteSchedule(scheduler.alphas_cumprod[:-1])
    model = hosm.ScoreModel(unet(), cut, "v_prediction", output=lambda out: out.sample)
    assert bool(torch.isfinite(hosm.first_order_dsm(model, batch()[0])))


def test_a_learned_variance_is_left_out():
    network = unet(out_channels=4)
    model = from_diffusers(network, diffusers.DDPMScheduler())
    assert model.noise(batch()[0], batch()[1]).shape == (3, *builders.SHAPE)


def test_the_table_is_kept_in_its_precision():
    scheduler = diffusers.DDPMScheduler()
    model = from_diffusers(unet(), scheduler)
    assert dataclasses.asdict(model.schedule)["alphas_cumprod"] == tuple(
        scheduler.alphas_cumprod.double().tolist()
    )
