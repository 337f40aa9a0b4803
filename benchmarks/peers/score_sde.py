"""The likelihood as most public code computes it, written for comparison from its description.

The recipe of arXiv 2011.13456, appendix D.2: one solve for the whole batch by scipy's RK45 in t
with rtol = atol = 1e-5, one Rademacher probe for each sample kept along the path, and two passes
through the network at each call, one for the drift and one for the vector-Jacobian product.
Needs scipy.
"""

import numpy as np
import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks.trained import Problem


def signs(x: Tensor, seed: int) -> Tensor:
    """A Rademacher probe for each sample, the same in every precision."""
    drawn = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(x.dtype) * 2 - 1


def flow(model: hosm.ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt = f x − ½ g² s of the probability-flow ODE, at times (B,)."""
    schedule, each = model.schedule, (-1, *(1,) * (x.ndim - 1))
    f, g2 = schedule.drift(t).reshape(each), schedule.squared_diffusion(t).reshape(each)
    return f * x - 0.5 * g2 * model.score(x, t)


def log_prior(model: hosm.ScoreModel, latent: Tensor) -> Tensor:
    """log N(0, prior_std² I) of a batch, (B,)."""
    normal = torch.distributions.Normal(0.0, model.schedule.prior_std)
    return normal.log_prob(latent).flatten(1).sum(1)


def nll(problem: Problem, x: Tensor, tolerance: float, seed: int) -> Tensor:
    """−log p(x) in nats, (B,)."""
    from scipy.integrate import solve_ivp

    model, probe, count = problem.model, signs(x, seed), x.numel()

    def right_side(t: float, state: np.ndarray) -> np.ndarray:
        point = torch.as_tensor(state[:count], dtype=x.dtype).reshape(x.shape)
        times = torch.full((len(x),), t, dtype=x.dtype)
        with torch.no_grad():
            moved = flow(model, point, times)
        point = point.requires_grad_()
        (pulled,) = torch.autograd.grad((flow(model, point, times) * probe).sum(), point)
        divergence = (pulled * probe).flatten(1).sum(1)
        return np.concatenate([moved.flatten().numpy(), divergence.numpy()])

    start = np.concatenate([x.flatten().numpy(), np.zeros(len(x))])
    span = (model.schedule.t_min, model.schedule.t_max)
    solved = solve_ivp(right_side, span, start, rtol=tolerance, atol=tolerance, method="RK45")
    end = torch.as_tensor(solved.y[:, -1])
    return -(log_prior(model, end[:count].reshape(x.shape)) + end[count:])
