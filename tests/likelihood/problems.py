"""Models whose likelihood is known: independent Gaussians in closed form, and mixtures."""

import torch
from torch.distributions import Normal

import hosm_losses as hosm
from hosm_losses._checks import expand_right
from tests.oracles import PREDICTIONS_OF_ORACLE, mixture_noise


def total(values):
    """The sum over the elements of each sample, (B, *) -> (B,)."""
    return values.reshape(len(values), -1).sum(1)


def gaussian(schedule, mean=0.0, std=0.5, prediction="epsilon"):
    """A model with the exact score of data N(mean, std²); a `gain` (B,) multiplies its std."""

    def network(x, t, gain=None):
        widths = std if gain is None else std * expand_right(gain, x)
        alpha, sigma = (expand_right(each, x) for each in schedule(t.double()))
        rates = [expand_right(each, x) for each in schedule.rates(t.double())]
        noise = sigma * (x - alpha * mean) / ((alpha * widths) ** 2 + sigma**2)
        return PREDICTIONS_OF_ORACLE[prediction](noise, x, alpha, sigma, rates).to(x.dtype)

    return hosm.ScoreModel(network, schedule, prediction)


def marginals(schedule, mean=0.0, std=0.5):
    """The laws at t_min and at t_max of data N(mean, std²)."""
    alphas, sigmas = schedule(torch.tensor([schedule.t_min, schedule.t_max]))
    return [
        Normal(alpha * mean, ((alpha * std) ** 2 + sigma**2).sqrt())
        for alpha, sigma in zip(alphas, sigmas, strict=True)
    ]


def problem(schedule, mixture, points=50):
    """A model with the exact score, points at t_min, their log-densities and the exact prior."""
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = schedule(torch.tensor([schedule.t_min, schedule.t_max]))
    x = alpha[0] * mixture.sample(points, generator)
    x = x + sigma[0] * torch.randn(x.shape, generator=generator)

    def log_density(x, end):
        return mixture.log_density(x, alpha[end].expand(len(x)), sigma[end].expand(len(x)))

    model = hosm.ScoreModel(mixture_noise(mixture, schedule), schedule)
    return model, x, log_density(x, 0), lambda latent: log_density(latent, 1)
