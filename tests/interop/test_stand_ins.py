"""What closed forms do not show of the functions for other projects, which are not imported here.

Objects have the attributes that the projects document.
"""

from types import SimpleNamespace as Is

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses import interop
from tests.cases import Sine, assert_same, default_dtype, with_gradients
from tests.interop.checks import Diffusers, Net, check_one_line

TABLE = np.cumprod(1 - np.linspace(1e-3, 0.2, 100))
VE, KINDS = Is(sigma_min=0.02, sigma_max=40.0), Is(name="EPSILON")
SPACED = Is(alphas_cumprod=TABLE[::7], timestep_map=range(0, 100, 7), rescale_timesteps=True)
vars(SPACED).update(model_mean_type=KINDS, model_var_type=KINDS, original_num_steps=100)
CONFIG = Is(prediction_type="v_prediction", timestep_type="continuous", num_train_timesteps=9)
CONTINUOUS = Is(alphas_cumprod=torch.as_tensor(TABLE), config=CONFIG)
FLOW = type("FlowMatchEulerDiscreteScheduler", (), {"config": CONFIG})()
MADE = {
    "edm": lambda: interop.from_edm(Net()),
    "guided": lambda: interop.from_guided_diffusion(Net(), SPACED),
    "score_sde": lambda: interop.from_score_sde(Net(), VE),
    "continuous": lambda: interop.from_diffusers(Diffusers(Net()), CONTINUOUS),
    "flow": lambda: interop.from_diffusers(Diffusers(Net()), FLOW),
}


@pytest.mark.parametrize("name", MADE)
def test_all_from_one_line(name):
    x0 = torch.randn(4, 2, 4, 4)
    check_one_line(MADE[name](), x0, {"y": torch.tensor([0, 2, 1, 1])})


def test_tables_keep_their_digits():
    """In float32, 1 − ᾱ has lost them at the first steps, and the buffer beside ᾱ has not."""
    exact = np.cumprod(1 - np.linspace(2.5e-7, 5e-5, 4000))
    buffers = {"alphas_cumprod": exact, "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - exact)}
    diffusion = Is(model=Net(), objective="pred_v")
    vars(diffusion).update({name: torch.tensor(each).float() for name, each in buffers.items()})
    found = interop.from_denoising_diffusion(diffusion).schedule(torch.arange(4000.0))
    for part, expected in zip(found, (exact, 1 - exact), strict=True):
        torch.testing.assert_close(part, torch.tensor(expected).sqrt(), rtol=1e-6, atol=0)
    numbers = Is(model=Net(), objective="pred_v", alphas_cumprod=[0.9999, 0.5, 0.1])
    with default_dtype(torch.float32):
        model = interop.from_denoising_diffusion(numbers)
    assert model.schedule.alphas_cumprod == (0.9999, 0.5, 0.1)


@pytest.mark.parametrize(
    ("table", "dtype", "told"),
    [
        ([0.9, 0.5, 2.0**-24], torch.float32, "zero terminal SNR"),
        ([0.9999, 0.9998, 0.5], torch.bfloat16, "Half precision may round"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(table, dtype, told):
    diffusion = Is(model=Net(), objective="pred_v", alphas_cumprod=torch.tensor(table).to(dtype))
    with pytest.raises(ValueError, match=told):
        interop.from_denoising_diffusion(diffusion)


def test_classes_are_dropped_in_training_alone():
    net, x, t = Net(), torch.randn(2, 2, 4, 4), torch.tensor([0, 2])
    net.cond_drop_prob = 0.5
    diffusion = Is(model=net, objective="pred_v", alphas_cumprod=TABLE)
    model = interop.from_denoising_diffusion(diffusion)
    seen = []
    for training, kwargs in ((True, {}), (False, {}), (False, {"cond_drop_prob": 1.0})):
        model.train(training).noise(x, t, **kwargs)
        seen.append(net.options)
    assert seen == [{}, {"cond_drop_prob": 0.0}, {"cond_drop_prob": 1.0}]


def test_what_a_network_of_diffusers_returns_as_a_tuple():
    model, x, t = MADE["flow"](), torch.randn(2, 2, 4, 4), torch.tensor([0.1, 0.6])
    torch.testing.assert_close(model.noise(x, t, return_dict=False), model.noise(x, t))


def test_the_class_inside_of_wrappers_says_which_time_it_is_given():
    """Those of torch.compile, DistributedDataParallel and PEFT."""
    flux = type("FluxTransformer2DModel", (Diffusers,), {})(Net())
    for name in ("model", "base_model", "module", "_orig_mod"):
        flux, inside = nn.Module(), flux
        flux.add_module(name, inside)
    assert interop.from_diffusers(flux, FLOW).time == 1


def test_a_hunyuan_dit_is_given_times_in_the_dtype_of_the_data():
    scheduler = Is(alphas_cumprod=TABLE, config=Is(prediction_type="epsilon"))
    for name, dtype in (("HunyuanDiT2DModel", torch.float32), ("UNet2DModel", torch.int64)):
        network = type(name, (Diffusers,), {})(Net().float())
        x, t = torch.randn(2, 2, 4, 4, dtype=torch.float32), torch.tensor([0, 2])
        interop.from_diffusers(network, scheduler).noise(x, t)
        assert network.network.seen.dtype == dtype


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel])
def test_score_sde_asks_the_configuration_that_a_network_keeps(wrap):
    """The argument is easily forgotten, and nothing else tells such a network apart."""
    net, sde = Net(), Is(beta_0=0.1, beta_1=20.0)
    net.config = Is(training=Is(continuous=False))
    for refused in (VE, Is(**vars(sde), discrete_betas=0)):
        with pytest.raises(ValueError):
            interop.from_score_sde(wrap(net), refused)
    # Under subVPSDE a network is given 999 t, whatever the flag.
    assert interop.from_score_sde(wrap(net), sde, continuous=False).time == 999
    net.config.training.continuous = True
    assert interop.from_score_sde(wrap(net), VE).prediction == "score"


@pytest.mark.parametrize("divergence", [hosm.Hutchinson(2), "exact"])
def test_what_vmap_cannot_follow_is_called_for_each_probe(divergence):
    """As EDM's attention: a backward of its own, of differentiable operators, no rule for vmap."""
    found, x, layer = [], torch.randn(2, 3), nn.Linear(3, 3)
    for sine in (Sine.apply, torch.sin):
        network = lambda x, t, sine=sine: sine(layer(x))  # noqa: E731
        model = hosm.ScoreModel(network, hosm.VPSchedule())
        torch.manual_seed(1)
        options = {"divergence": divergence, "enable_grad": True}
        value = hosm.ode_nll(model, x, solver=hosm.FixedGrid(4), **options).nll.sum()
        if divergence != "exact":
            value = value + hosm.third_order_dsm(model, x, engine="reverse", probes=2)
        found.append(with_gradients(value, layer))
    assert_same(*found)
