"""Networks that know the answer, each in the convention of its project, against closed forms.

The data are a mixture of Gaussians, or the component that a class names. A network here returns
what one of the project would if its training had come to an end. It has its noise level from the
time that it is given alone, so that schedule, prediction and time have to be read right.
"""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.interop import from_edm, from_guided_diffusion, from_score_sde
from tests.interop.checks import column

MEANS = torch.tensor([[0.6, -0.3], [-0.5, 0.4], [0.1, 0.9]], dtype=torch.float64)
STDS, WEIGHTS = torch.tensor([[0.2, 0.35, 0.15], [0.5, 0.3, 0.2]], dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1, 0])
HALF_PI = math.pi / 2


def closed_form(x, alpha, sigma, classes=None):
    """log q_t(x), the mean of the data given x, and that of the noise, of x (B, 2, 1, 1)."""
    alpha, sigma = (torch.as_tensor(part).expand(len(x))[:, None] for part in (alpha, sigma))
    variance = (alpha * STDS) ** 2 + sigma**2
    away = x.flatten(1)[:, None] - alpha[..., None] * MEANS
    joint = WEIGHTS.log() - (away**2).sum(2) / (2 * variance) - (2 * math.pi * variance).log()
    if classes is not None:
        joint = joint + torch.log(nn.functional.one_hot(classes, 3) / WEIGHTS)
    means = MEANS + (alpha * STDS**2 / variance)[..., None] * away
    data = (joint.softmax(1)[..., None] * means).sum(1)
    noise = (x.flatten(1) - alpha * data) / sigma
    return joint.logsumexp(1), data.reshape(x.shape), noise.reshape(x.shape)


def check(model, t, alpha, sigma, own, classes=None, tolerance=1e-5, **options):
    """Score, noise, loss and likelihood. `own` is the project's loss of (x_t, x_0, noise)."""
    which = torch.tensor([2, 0, 1, 0]) if classes is None else classes
    draws = torch.randn(2, 4, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    x0, noise = MEANS[which, :, None, None] + column(STDS[which]) * draws[0], draws[1]
    x_t = column(alpha) * x0 + column(sigma) * noise
    kwargs = options.get("model_kwargs", {})
    expected = closed_form(x_t, alpha, sigma, classes)[2]
    close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-9)
    for found, true in zip(model.schedule(t), (alpha, sigma), strict=True):
        close(found, true)
    close(model.noise(x_t, t, **kwargs), expected)
    close(model.score(x_t, t, **kwargs) * column(sigma), -expected)
    loss = hosm.first_order_dsm(model, x0, t=t, noise=noise, **options)
    close(loss, own(x_t, x0, noise))
    first, last = (model.schedule(end) for end in (model.schedule.t_min, model.schedule.t_max))
    x = first[0] * x0 + first[1] * noise
    prior = {"log_prior": lambda z: closed_form(z, *last, classes)[0], "model_kwargs": kwargs}
    result = hosm.ode_nll(model, x, steps=256, divergence="exact", **prior)
    expected = -closed_form(x, *first, classes)[0]
    torch.testing.assert_close(result.nll, expected, rtol=0, atol=tolerance)


LEVELS = torch.zeros(1001, dtype=torch.float64)
for j in range(1000, 0, -1):  # arXiv 2206.00364, equation 18 of appendix C
    kept = [math.sin(HALF_PI * k / 1008) ** 2 for k in (j - 1, j)]
    LEVELS[j - 1] = ((LEVELS[j] ** 2 + 1) / max(kept[0] / kept[1], 1e-3) - 1) ** 0.5
RANGES = {"EDMPrecond": (0, math.inf), "VPPrecond": (1e-3, 152.2), "VEPrecond": (0.02, 100)}
RANGES["iDDPMPrecond"] = (float(LEVELS[999]), float(LEVELS[0]))


@pytest.mark.parametrize("kind", RANGES)
def test_edm(kind):
    """D(x, σ) under one-hot classes; iDDPMPrecond gives its network the nearest of its levels."""

    def denoiser(x, sigma, class_labels):
        scale = level = sigma
        if kind == "iDDPMPrecond":
            level = LEVELS[(sigma[:, None] - LEVELS).abs().argmin(1)]
        scaled = x * column(((1 + level**2) / (1 + scale**2)) ** 0.5)
        return x - column(scale) * closed_form(scaled, 1.0, level, class_labels.argmax(1))[2]

    def weight(t):
        return (t**2 + 0.25) / 0.25 if kind == "EDMPrecond" else torch.ones_like(t)

    def own(x_t, x0, noise):
        return (
            (denoiser(x_t, sigma, **kwargs) - x0) ** 2 * column(weight(sigma) / sigma**2)
        ).mean()

    low, high = RANGES[kind]
    vars(denoiser).update(sigma_min=low, sigma_max=high)
    model = from_edm(denoiser)
    assert (model.schedule.t_min, model.schedule.t_max) == (max(low, 0.002), 80)
    sigma = LEVELS[[960, 800, 500, 300]]
    kwargs = {"class_labels": nn.functional.one_hot(CLASSES, 3).double()}
    tolerance = 2e-3 if kind == "iDDPMPrecond" else 1e-5  # of its jumps
    options = {"weighting": weight, "model_kwargs": kwargs}
    check(model, sigma, torch.ones(4), sigma, own, CLASSES, tolerance, **options)


@pytest.mark.parametrize("kind", ["VPSDE", "subVPSDE", "VESDE"])
def test_score_sde(kind):
    sde = SimpleNamespace(beta_0=0.1, beta_1=20.0)
    if kind == "VPSDE":
        sde.discrete_betas = torch.linspace(1e-4, 0.02, 1000)
    elif kind == "VESDE":
        sde = SimpleNamespace(sigma_min=0.01, sigma_max=50)

    def marginal(t):
        if kind == "VESDE":
            return torch.ones_like(t), 0.01 * 5000**t
        kept = torch.exp(-0.1 * t - 9.95 * t**2)
        return kept**0.5, 1 - kept if kind == "subVPSDE" else (1 - kept) ** 0.5

    def network(x, labels):
        if kind == "VESDE":
            return -closed_form(x, 1.0, labels)[2] / column(labels)
        return closed_form(x, *marginal(labels / 999))[2]

    def own(x_t, x0, noise):
        labels = sigma if kind == "VESDE" else 999 * t
        scale = column(sigma) if kind == "VESDE" else -1
        return ((scale * network(x_t, labels) + noise) ** 2).mean()

    sde.marginal_prob = lambda x, t: (column(marginal(t)[0]) * x, marginal(t)[1])
    t = torch.tensor([1e-3, 0.05, 0.4, 1.0])
    alpha, sigma = marginal(t)
    check(from_score_sde(network, sde), t, alpha, sigma, own)


@pytest.mark.parametrize("kept", [1000, 250, 25])
@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_guided_diffusion(mean, betas, kept):
    """Respaced, the network knows all 1000 steps, and the diffusion those that are kept."""
    angle = (np.arange(1001) / 1000 + 0.008) / 1.008 * HALF_PI
    steps = np.linspace(1e-4, 0.02, 1000)
    if betas == "cosine":
        steps = np.minimum(1 - (np.cos(angle[1:]) / np.cos(angle[:-1])) ** 2, 0.999)
    table = np.cumprod(1 - steps)
    snr = np.log(table / (1 - table))
    used = np.linspace(0, 999, kept).round().astype(int)
    kinds = {"model_mean_type": mean, "model_var_type": "LEARNED_RANGE"}
    diffusion = SimpleNamespace(alphas_cumprod=table[used], timestep_map=used.tolist())
    vars(diffusion).update({name: SimpleNamespace(name=kind) for name, kind in kinds.items()})

    def network(x, labels, y):
        level = torch.as_tensor(np.interp(labels, np.arange(1000), snr))
        found = closed_form(x, level.sigmoid() ** 0.5, (-level).sigmoid() ** 0.5, y)
        return torch.cat([found[2 if mean == "EPSILON" else 1], torch.full_like(x, 7.0)], 1)

    def own(x_t, x0, noise):
        found = network(x_t, torch.tensor(used)[t], **kwargs)[:, :2]
        return ((found - (noise if mean == "EPSILON" else x0)) ** 2).mean()

    kwargs = {"y": CLASSES}
    t = torch.tensor([0, 3, kept // 2, kept - 1])
    kept_table = torch.as_tensor(table[used])[t]
    model = from_guided_diffusion(network, diffusion)
    options = {"weighting": "native", "model_kwargs": kwargs}
    levels = kept_table**0.5, (1 - kept_table) ** 0.5
    # Where every step is kept the network is given them exactly.
    check(model, t, *levels, own, CLASSES, 1e-5 if kept == 1000 else 1e-3, **options)


SCHEDULES = {
    "CondOTScheduler": hosm.LinearFlowSchedule(),
    "CosineScheduler": hosm.CosineSchedule(offset=0),
    "VPScheduler": hosm.VPSchedule(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_flow_matching(name):
    """u = α′ x₀ + σ′ ε in its own time s, with the data at s = 1; conditions stand in a dict."""

    def levels(s):
        if name == "VPScheduler":
            integral = 0.1 * (1 - s) + 9.95 * (1 - s) ** 2
            return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))
        if name == "CosineScheduler":
            return torch.sin(HALF_PI * s), torch.cos(HALF_PI * s)
        return s, 1 - s

    def velocity(s, data, noise):
        rates = torch.func.jvp(levels, (s,), (torch.ones_like(s),))[1]
        return column(rates[0]) * data + column(rates[1]) * noise

    def network(x, s, extra):
        return velocity(s, *closed_form(x, *levels(s), extra["label"])[1:])

    def own(x_t, x0, noise):
        return ((network(x_t, 1 - t, **kwargs) - velocity(1 - t, x0, noise)) ** 2).mean()

    options = {"time": lambda t: 1 - t, "output": torch.neg}
    model = hosm.ScoreModel(network, SCHEDULES[name], "flow_prediction", **options)
    kwargs = {"extra": {"label": CLASSES}}
    t = torch.tensor([1e-3, 0.2, 0.6, 0.99])
    options = {"weighting": "native", "model_kwargs": kwargs}
    check(model, t, *levels(1 - t), own, CLASSES, **options)
