"""Networks that know the answer, each in the convention of its project, against closed forms.

A network here returns what one of the project would if its training had come to an end. It has its
noise level from the time that it is given alone, so that schedule, prediction and time have to be
read right. No project is imported: objects have the attributes that they document.
"""

import math
from types import SimpleNamespace as Is

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses import interop
from tests.interop.checks import (
    CLASSES,
    PREDICTED,
    Diffusers,
    check,
    closed_form,
    column,
    of_table,
)

HALF_PI = math.pi / 2
RANGES = {"EDMPrecond": (0, math.inf), "VPPrecond": (1e-3, 152.2), "VEPrecond": (0.02, 50)}


@pytest.mark.parametrize("kind", RANGES)
def test_edm(kind):
    """D(x, σ) under one-hot classes; EDM's own loss weighs by the deviation of its data, 0.5."""

    def denoiser(x, sigma, class_labels):
        return closed_form(x, 1.0, sigma, class_labels.argmax(1))[1]

    def weight(t):
        return (t**2 + 0.25) / 0.25 if kind == "EDMPrecond" else torch.ones_like(t)

    def own(x_t, x0, noise):
        squares = (denoiser(x_t, sigma, **kwargs) - x0) ** 2
        return (squares * column(weight(sigma) / sigma**2)).mean()

    low, high = RANGES[kind]
    vars(denoiser).update(sigma_min=low, sigma_max=high)
    model = interop.from_edm(denoiser)
    assert (model.schedule.t_min, model.schedule.t_max) == (max(low, 0.002), min(high, 80))
    sigma = torch.tensor([0.03, 0.3, 2.0, 20.0])
    kwargs = {"class_labels": nn.functional.one_hot(CLASSES, 3).double()}
    weighting = hosm.EDMWeighting() if kind == "EDMPrecond" else "noise"
    options = {"weighting": weighting, "model_kwargs": kwargs}
    check(model, sigma, (torch.ones(4), sigma), own, CLASSES, **options)


@pytest.mark.parametrize("kind", ["VPSDE", "subVPSDE", "VESDE"])
def test_score_sde(kind):
    """arXiv 2011.13456, appendices B and C."""
    sde = Is(beta_0=0.2, beta_1=15.0)
    if kind == "VPSDE":
        sde.discrete_betas = torch.linspace(2e-4, 0.015, 1000)
    elif kind == "VESDE":
        sde = Is(sigma_min=0.02, sigma_max=40)

    def marginal(t):
        if kind == "VESDE":
            return torch.ones_like(t), 0.02 * 2000**t
        kept = torch.exp(-0.2 * t - 7.4 * t**2)
        return kept**0.5, 1 - kept if kind == "subVPSDE" else (1 - kept) ** 0.5

    def network(x, labels):
        if kind == "VESDE":
            return -closed_form(x, 1.0, labels)[2] / column(labels)
        return closed_form(x, *marginal(labels / 999))[2]

    def own(x_t, x0, noise):
        label = sigma if kind == "VESDE" else 999 * t
        scale = column(sigma) if kind == "VESDE" else -1
        return ((scale * network(x_t, label) + noise) ** 2).mean()

    sde.marginal_prob = lambda x, t: (column(marginal(t)[0]) * x, marginal(t)[1])
    t = torch.tensor([1e-3, 0.05, 0.4, 1.0])
    alpha, sigma = marginal(t)
    check(interop.from_score_sde(network, sde), t, (alpha, sigma), own)


STEPS = 2000


def step_table(betas):
    """ᾱ of every step."""
    if betas == "linear":
        return np.cumprod(1 - np.linspace(5e-5, 0.01, STEPS))
    angle = (np.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * HALF_PI
    return np.cumprod(1 - np.minimum(1 - (np.cos(angle[1:]) / np.cos(angle[:-1])) ** 2, 0.999))


def from_guided_diffusion(network, table, kept, kind, variant):
    mean = {"epsilon": "EPSILON", "sample": "START_X"}[kind]
    variance = "LEARNED_RANGE" if variant == "learned" else "FIXED_LARGE"
    diffusion = Is(model_mean_type=Is(name=mean), model_var_type=Is(name=variance))
    diffusion.alphas_cumprod, diffusion.rescale_timesteps = table[kept], variant == "rescaled"
    if len(kept) < STEPS:
        diffusion.timestep_map, diffusion.original_num_steps = kept.tolist(), STEPS
    return interop.from_guided_diffusion(network, diffusion)


def from_diffusers(network, table, kept, kind, variant):
    # A continuous time is that of v_prediction alone.
    config = Is(prediction_type=kind, timestep_type=variant or "continuous")
    scheduler = Is(alphas_cumprod=torch.as_tensor(table), config=config)
    model = Diffusers(network, 4 if variant == "learned" else 2)
    return interop.from_diffusers(model, scheduler)


def from_denoising_diffusion(network, table, kept, kind, variant):
    objective = {"epsilon": "pred_noise", "sample": "pred_x0", "v_prediction": "pred_v"}[kind]
    vars(network).update(channels=2, out_dim=4 if variant == "learned" else 2)
    diffusion = Is(model=network, alphas_cumprod=table.tolist(), objective=objective)
    return interop.from_denoising_diffusion(diffusion)


@pytest.mark.parametrize(
    ("project", "kind", "betas", "kept", "variant"),
    [
        (from_guided_diffusion, "epsilon", "cosine", STEPS, "learned"),
        (from_guided_diffusion, "epsilon", "linear", STEPS, "rescaled"),
        (from_guided_diffusion, "sample", "linear", 25, "learned"),
        (from_guided_diffusion, "sample", "cosine", 25, ""),
        (from_guided_diffusion, "epsilon", "cosine", 250, "rescaled"),
        (from_diffusers, "epsilon", "linear", STEPS, ""),
        (from_diffusers, "sample", "cosine", STEPS, "learned"),
        (from_diffusers, "v_prediction", "linear", STEPS, "discrete"),
        (from_diffusers, "v_prediction", "cosine", STEPS, "continuous"),
        (from_denoising_diffusion, "epsilon", "linear", STEPS, "learned"),
        (from_denoising_diffusion, "sample", "linear", STEPS, ""),
        (from_denoising_diffusion, "v_prediction", "cosine", STEPS, ""),
    ],
)
def test_tables(project, kind, betas, kept, variant):
    """Respaced, the network knows all steps, and the diffusion those that are kept."""
    table = step_table(betas)
    snr, used = np.log(table / (1 - table)), np.linspace(0, STEPS - 1, kept).round().astype(int)

    def network(x, labels, y):
        if variant == "rescaled":
            labels = labels * STEPS / 1000
        elif variant == "continuous":  # ¼ log(σ/α)
            labels = np.interp(-8 * labels, snr[::-1], np.arange(STEPS)[::-1])
        found = of_table(kind, table, x, labels, y)
        return torch.cat([found, torch.full_like(x, 7.0)], 1) if variant == "learned" else found

    def own(x_t, x0, noise):
        target = PREDICTED[kind](column(alpha), column(sigma), x0, noise)
        return ((of_table(kind, table, x_t, used[t], CLASSES) - target) ** 2).mean()

    t = torch.tensor([0, 3, kept // 2, kept - 1])
    alpha, sigma = (torch.as_tensor(part[used])[t] ** 0.5 for part in (table, 1 - table))
    model = project(network, table, used, kind, variant)
    options = {"weighting": "native", "model_kwargs": {"y": CLASSES}}
    # Where every step is kept the network is given them exactly.
    tolerance = 1e-3 if kept < STEPS else 1e-5 if variant in ("rescaled", "continuous") else None
    check(model, t, (alpha, sigma), own, CLASSES, tolerance, **options)


FLOWS = {
    "SD3Transformer2DModel": hosm.LinearFlowSchedule(),
    "Flux2Transformer2DModel": hosm.LinearFlowSchedule(),
    "CondOTScheduler": hosm.LinearFlowSchedule(),
    "VPScheduler": hosm.VPSchedule(),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows(name):
    """α′ x₀ + σ′ ε, in models of diffusers, and in the time of flow_matching, 1 − t.

    Flux multiplies its time by the number of steps itself, as its subclasses do.
    """
    of_diffusers, factor = name.endswith("Model"), 1 if name.startswith("Flux") else 500

    def levels(t):
        if name == "VPScheduler":
            integral = 0.1 * t + 9.95 * t**2
            return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))
        return 1 - t, t

    def velocity(t, data, noise):
        rates = torch.func.jvp(levels, (t,), (torch.ones_like(t),))[1]
        return column(rates[0]) * data + column(rates[1]) * noise

    def network(x, label, y):
        t = label / factor if of_diffusers else 1 - label
        found = velocity(t, *closed_form(x, *levels(t), y)[1:])
        return found if of_diffusers else -found

    def own(x_t, x0, noise):
        found = velocity(t, *closed_form(x_t, *levels(t), CLASSES)[1:])
        return ((found - velocity(t, x0, noise)) ** 2).mean()

    if of_diffusers:
        config = Is(num_train_timesteps=500, shift=3.0)
        scheduler = type("FlowMatchHeunDiscreteScheduler", (), {"config": config})()
        tuned = type("Tuned", (type(name, (Diffusers,), {}),), {})(network)
        model = interop.from_diffusers(tuned, scheduler)
    else:
        model = interop.from_flow_matching(network, FLOWS[name], data_at=1)
    t = torch.tensor([1e-3, 0.2, 0.6, 0.99])
    options = {"weighting": "native", "model_kwargs": {"y": CLASSES}}
    check(model, t, levels(t), own, CLASSES, **options)
