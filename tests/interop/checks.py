"""Data whose scores are known, networks that know them, and what every ScoreModel has to do.

The data are a mixture of Gaussians, or the component that a class names.
"""

import copy
import math
import pickle
from functools import partial
from types import SimpleNamespace as Is

import numpy as np
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import FUNCTIONS

MEANS = torch.tensor([[0.6, -0.3], [-0.5, 0.4], [0.1, 0.9]], dtype=torch.float64)
STDS, WEIGHTS = torch.tensor([[0.2, 0.35, 0.15], [0.5, 0.3, 0.2]], dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1, 0])
# What networks predict, of α, σ, the data and the noise.
PREDICTED = {
    "epsilon": lambda alpha, sigma, data, noise: noise,
    "sample": lambda alpha, sigma, data, noise: data,
    "v_prediction": lambda alpha, sigma, data, noise: alpha * noise - sigma * data,
}


def column(t):
    """(B,) beside images."""
    return t.reshape(-1, 1, 1, 1)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def noised(model, x0, t, noise):
    """Our x_t."""
    alpha, sigma = (column(part).to(x0.dtype) for part in model.schedule(t))
    return alpha * x0 + sigma * noise


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


def of_table(kind, table, x, steps, classes):
    """What a perfect network predicts at steps of a table, or between two of them."""
    snr = np.log(table / (1 - table))
    level = torch.as_tensor(np.interp(steps, np.arange(len(table)), snr))
    alpha, sigma = level.sigmoid() ** 0.5, (-level).sigmoid() ** 0.5
    _, data, noise = closed_form(x, alpha, sigma, classes)
    return PREDICTED[kind](column(alpha), column(sigma), data, noise)


class Net(nn.Module):
    """F(x, label) on images of two channels, that remembers what it was given."""

    sigma_min, sigma_max = 0.02, 50.0

    def __init__(self):
        super().__init__()
        self.layer, self.embed = nn.Conv2d(2, 2, 3, padding=1), nn.Embedding(3, 2)

    def forward(self, x, labels, y=None, **options):
        self.seen, self.options = labels, options
        hidden = self.layer(x) + column(torch.sin(labels / 100))
        return torch.tanh(hidden if y is None else hidden + self.embed(y)[:, :, None, None])


class Diffusers(nn.Module):
    """A model of diffusers: the time may not be its second argument."""

    def __init__(self, network, outputs=2):
        super().__init__()
        self.network, self.config = network, Is(in_channels=2, out_channels=outputs)

    def forward(self, sample, y=None, timestep=None, return_dict=True):
        found = self.network(sample, timestep, y)
        return Is(sample=found) if return_dict else (found,)


def check(model, t, levels, own, classes=None, tolerance=1e-5, **options):
    """Score, noise, loss and, to a tolerance, likelihood.

    `own` is the project's loss of (x_t, x_0, noise).
    """
    alpha, sigma = levels
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
    if tolerance is None:
        return
    first, last = (model.schedule(end) for end in (model.schedule.t_min, model.schedule.t_max))
    x = first[0] * x0 + first[1] * noise
    prior = {"log_prior": lambda z: closed_form(z, *last, classes)[0], "model_kwargs": kwargs}
    result = hosm.ode_nll(model, x, solver=hosm.FixedGrid(256), divergence="exact", **prior)
    expected = -closed_form(x, *first, classes)[0]
    torch.testing.assert_close(result.nll, expected, rtol=0, atol=tolerance)


def check_one_line(model, x0, kwargs=None, pickles=True):
    """A training step at orders 1 to 3, the likelihood, copies, and the keys of the network."""
    for function in FUNCTIONS.values():
        model.zero_grad()
        function(model, x0, model_kwargs=kwargs).backward()
        grads = [each.grad for each in model.network.parameters() if each.grad is not None]
        assert all(bool(each.isfinite().all()) for each in grads)
        assert any(bool(each.any()) for each in grads)
    # On six steps the solver error of an untrained network may be thousands of nats.
    result = hosm.ode_nll(model, x0, solver=hosm.FixedGrid(6), model_kwargs=kwargs)
    assert bool(result.solver_error.isfinite().all())
    assert {key.partition(".")[0] for key in model.state_dict()} == {"network"}
    t, kwargs = model.schedule.sample_time(len(x0)), kwargs or {}
    t = t.to(x0.dtype) if t.is_floating_point() else t
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if pickles else model):
        torch.testing.assert_close(same.noise(x0, t, **kwargs), model.noise(x0, t, **kwargs))
