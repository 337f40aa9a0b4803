"""The likelihood as most public code computes it, written for comparison from its description.

The recipe of arXiv 2011.13456, appendix D.2: one solve for the whole batch by scipy's RK45 in t
with rtol = atol = 1e-5, one Rademacher probe for each sample kept along the path, and two passes
through the network an evaluation, one for the drift and one for the vector-Jacobian product.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import hosm_losses as hosm

TOLERANCE = 1e-5


class Recipe(NamedTuple):
    """nll in nats (B,), and how often the solver asked for the drift."""

    nll: Tensor
    evaluations: int


def recipe_nll(
    model: hosm.ScoreModel, x: Tensor, generator: torch.Generator, tolerance: float = TOLERANCE
) -> Recipe:
    """−log p(x) by the recipe."""
    schedule, shape = model.schedule, x.shape
    probe = torch.randint(0, 2, shape, generator=generator).to(x.dtype) * 2 - 1

    def drift(x: Tensor, t: Tensor) -> Tensor:
        f, g2 = schedule.drift(t), schedule.squared_diffusion(t)
        each = (-1, *(1,) * (x.ndim - 1))
        return f.reshape(each) * x - 0.5 * g2.reshape(each) * model.score(x, t)

    def right_side(t: float, state: np.ndarray) -> np.ndarray:
        point = torch.as_tensor(state[: x.numel()], dtype=x.dtype).reshape(shape)
        times = torch.full((len(x),), t, dtype=x.dtype)
        with torch.no_grad():
            moved = drift(point, times)
        point = point.requires_grad_()
        (pulled,) = torch.autograd.grad((drift(point, times) * probe).sum(), point)
        divergence = (pulled * probe).flatten(1).sum(1)
        return np.concatenate([moved.flatten().numpy(), divergence.numpy()])

    start = np.concatenate([x.flatten().numpy(), np.zeros(len(x))])
    span = (schedule.t_min, schedule.t_max)
    solved = solve_ivp(right_side, span, start, rtol=tolerance, atol=tolerance, method="RK45")
    latent = torch.as_tensor(solved.y[: x.numel(), -1]).reshape(shape).flatten(1)
    log_prior = torch.distributions.Normal(0.0, schedule.prior_std).log_prob(latent).sum(1)
    return Recipe(-(log_prior + torch.as_tensor(solved.y[x.numel() :, -1])), solved.nfev)
