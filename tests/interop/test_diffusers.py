"""Against diffusers itself: x_t, ε̂, the time that its models are given, and its own loss."""

import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import hosm_losses as hosm
from hosm_losses.interop import from_diffusers
from tests.integration.measure import arguments
from tests.integration.networks import NETWORKS, SHAPE, unet_2d
from tests.interop.checks import PREDICTED, Diffusers, Net, check_one_line, close, column, noised

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # in diffusers
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
WITH_FLOW_SIGMAS = ("DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver")
WITH_FLOW_SIGMAS += ("UniPCMultistep",)
WITH_TABLES = ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "CogVideoXDDIM")
WITH_TABLES += ("PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")
WITH_TABLES += WITH_FLOW_SIGMAS
T = torch.tensor([3, 500, 997])


def scheduler_of(kind, **options):
    return getattr(diffusers, f"{kind}Scheduler")(**options)


def batch():
    return torch.randn(2, 3, *SHAPE)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_schedulers_with_a_table(prediction):
    for kind in WITH_TABLES:
        scheduler = scheduler_of(kind, prediction_type=prediction, beta_schedule="scaled_linear")
        model = from_diffusers(Diffusers(Net()), scheduler)
        table = tuple(scheduler.alphas_cumprod.double().tolist())
        assert model.schedule.alphas_cumprod == table
        assert model.prediction == {"sample": "x0", "v_prediction": "v"}.get(
            prediction, prediction
        )
        model.noise(batch()[0], T)
        assert torch.equal(model.network.network.seen, T)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", BETAS)
def test_the_schedulers_own_loss(betas, prediction):
    scheduler = scheduler_of("DDPM", beta_schedule=betas, prediction_type=prediction)
    network = unet_2d().double()
    model, (x0, noise) = from_diffusers(network, scheduler), batch()
    x_t = scheduler.add_noise(x0, noise, T)
    close(noised(model, x0, T, noise), x_t)
    alpha, sigma = (column(part).double() for part in model.schedule(T))
    target = PREDICTED[prediction](alpha, sigma, x0, noise)
    if prediction == "v_prediction":
        target = scheduler.get_velocity(x0, noise, T)
    found, ours = network(x_t, T).sample, model.noise(x_t, T)
    loss = hosm.first_order_dsm(model, x0, t=T, noise=noise, weighting="native")
    close(loss, F.mse_loss(found, target))
    data = (x_t - sigma * ours) / alpha
    close(PREDICTED[prediction](alpha, sigma, data, ours), found, 1e-4)


def test_the_known_tables_are_those_of_the_scheduler():
    linear = hosm.DiscreteSchedule.linear
    known = linear(500), linear(500, scaled=True), hosm.DiscreteSchedule.cosine(500)
    for betas, schedule in zip(BETAS, known, strict=True):
        scheduler = diffusers.DDPMScheduler(500, beta_schedule=betas)
        table = scheduler.alphas_cumprod.tolist()
        assert schedule.alphas_cumprod == pytest.approx(table, rel=1e-4)
        own = hosm.DiscreteSchedule.from_betas(scheduler.betas)
        assert own.alphas_cumprod == pytest.approx(table, rel=1e-5)


def test_euler_in_the_coordinates_of_what_the_model_is_given():
    """Its continuous time, as Stable Video Diffusion has it, is that of the scheduler."""
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    scheduler, continuous = scheduler_of("EulerDiscrete"), scheduler_of("EulerDiscrete", **options)
    model, (x0, noise) = from_diffusers(Diffusers(Net()), scheduler), batch()
    for row in range(3):
        scheduler.set_timesteps(1000)
        x, eps, t = x0[row][None], noise[row][None], T[row : row + 1]
        sample = scheduler.add_noise(x, eps, t.float())
        close(noised(model, x, t, eps), scheduler.scale_model_input(sample, t[0].float()))
    model = from_diffusers(Diffusers(Net()), continuous)
    model.noise(x0, T)
    continuous.set_timesteps(1000)
    close(model.network.network.seen, continuous.timesteps[999 - T], 1e-4)


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscrete", *WITH_FLOW_SIGMAS])
def test_flows_are_linear_with_times_up_to_a_thousand(kind):
    """Steps of a scheduler with a table are 1000 σ, rounded down, along α = 1 − σ."""
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    scheduler = scheduler_of(kind, **({"shift": 3.0} if kind.startswith("Flow") else flow))
    network = unet_2d().double()
    model, (x0, noise) = from_diffusers(network, scheduler), batch()
    scheduler.set_timesteps(100)
    places = torch.tensor([10, 40, 90])
    steps, t = scheduler.timesteps[places], scheduler.sigmas[places].double()
    assert bool(((1000 * t - steps).abs() < 1).all())
    if kind.startswith("Flow"):
        x_t = scheduler.scale_noise(x0, steps, noise)
    else:  # by add_noise as well, but of SASolver, which has the table
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(t)
        x_t = column(alpha) * x0 + column(sigma) * noise
    close(noised(model, x0, t, noise), x_t)
    own = F.mse_loss(network(x_t, 1000 * t).sample, noise - x0)
    close(hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting="native"), own)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("diffusers UNet2DConditionModel", "DDIM"),
        ("diffusers DiTTransformer2DModel", "DDPM"),  # it learns its variance
        ("diffusers SD3Transformer2DModel", "FlowMatchEulerDiscrete"),  # takes its time by name
    ],
)
def test_one_line_is_enough(name, kind):
    network, given = (
        NETWORKS[name].score_model(torch.float32).network,
        arguments(name, torch.float32),
    )
    model = from_diffusers(network, scheduler_of(kind))
    check_one_line(model, given["x0"], given["model_kwargs"])


def test_a_model_that_takes_its_dtype_from_the_timestep_gets_a_float():
    """HunyuanDiT, which learns its variance, and says so by another name."""
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1}
    sizes |= {"attention_head_dim": 8, "num_attention_heads": 2, "hidden_size": 16, "text_len": 4}
    sizes |= {"cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 4}
    network = diffusers.HunyuanDiT2DModel(
        **sizes, text_len_t5=4, activation_fn="gelu-approximate"
    ).float()
    kwargs = {
        "encoder_hidden_states": torch.randn(2, 4, 8, dtype=torch.float32),
        "encoder_hidden_states_t5": torch.randn(2, 4, 8, dtype=torch.float32),
        "text_embedding_mask": torch.ones(2, 4),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.randn(2, 6, dtype=torch.float32),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": [torch.randn(16, 8, dtype=torch.float32) for _ in range(2)],
    }
    x0, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float32)
    scheduler, t = scheduler_of("DDPM"), T[:2]
    model = from_diffusers(network, scheduler)
    x_t = scheduler.add_noise(x0, noise, t)
    own = network(x_t, t.float(), **kwargs).sample[:, :4]  # as its pipeline calls it
    loss = hosm.first_order_dsm(model, x0, t=t, noise=noise, model_kwargs=kwargs)
    close(loss, F.mse_loss(own, noise))
    between = t + 0.25
    close(model.noise(x0, between, **kwargs), network(x0, between.float(), **kwargs).sample[:, :4])


def test_zero_terminal_snr_is_refused():
    for kind in ("DDPM", "EulerDiscrete"):  # one writes 2⁻²⁴ in its place
        scheduler = scheduler_of(kind, rescale_betas_zero_snr=True)
        with pytest.raises(ValueError, match="zero terminal SNR"):
            from_diffusers(Diffusers(Net()), scheduler)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LCM", {"prediction_type": "v_prediction"}),
        ("TCD", {"prediction_type": "sample", "num_train_timesteps": 500}),
        ("FlowMatchLCM", {}),
        ("Helios", {}),
        ("HeliosDMD", {"stages": 1}),
    ],
)
def test_schedulers_of_jumps_and_stages_are_refused_with_advice(kind, options):
    if not hasattr(diffusers, f"{kind}Scheduler"):
        pytest.skip("diffusers is older")
    scheduler = scheduler_of(kind, **options)
    with pytest.raises(ValueError, match=f"got {kind}Scheduler, whose ") as refused:
        from_diffusers(Diffusers(Net()), scheduler)
    advised = eval(re.search(r"pass (.*)\.$", str(refused.value))[1], vars(diffusers), locals())
    model = from_diffusers(Diffusers(Net()), advised)
    if hasattr(scheduler, "alphas_cumprod"):
        assert torch.equal(advised.alphas_cumprod, scheduler.alphas_cumprod)
    assert model.prediction == {"LCM": "v", "TCD": "x0"}.get(kind, "velocity")
