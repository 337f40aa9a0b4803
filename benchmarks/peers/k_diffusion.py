"""The likelihood by k-diffusion's `log_likelihood`, on the denoiser x − σ ε̂ of a VE model.

It solves in σ, by torchdiffeq's dopri5 for the whole batch, with one Rademacher probe kept. Needs
k-diffusion, whose packages ask for numpy 1.
"""

import warnings

import torch
from torch import Tensor

from benchmarks.trained import Problem


def nll(problem: Problem, x: Tensor, tolerance: float, seed: int) -> Tensor:
    """−log p(x) in nats, (B,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from k_diffusion.sampling import log_likelihood

    model, schedule = problem.model, problem.model.schedule
    low, high = (torch.tensor(u).exp().item() for u in schedule.log_sigma_hat_range)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        t = schedule.time(sigma.log()).clamp(schedule.t_min, schedule.t_max)
        return model.denoise(x, t)

    with torch.random.fork_rng():  # it draws its probe from the global generator
        torch.manual_seed(seed)
        found, _ = log_likelihood(denoiser, x, low, high, atol=tolerance, rtol=tolerance)
    return -found
