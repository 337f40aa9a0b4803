"""The likelihood by flow_matching's `ODESolver`, on a VE model in that library's coordinates.

It follows x_s = s x₀ + (1 − s) ε from s = 1, data, to s = 0, noise, with velocity x₀ − ε. In a VE
model y = x₀ + σ̂ ε, so that x_s = s y with s = 1/(1 + σ̂), and the velocity is y − ε̂/s. The model
reaches from σ̂_min to σ̂_max and the solver's time τ from 1 to 0, so s is affine in τ. y = x_s/s
changes a density by d log s. Needs flow_matching, whose licence forbids commercial use, so that no
extra of this project asks for it.
"""

import math

import torch
from torch import Tensor

from benchmarks.peers.score_sde import log_prior
from benchmarks.trained import Problem


def nll(
    problem: Problem, x: Tensor, tolerance: float, seed: int, *, exact: bool = False
) -> Tensor:
    """−log p(x) in nats, (B,); `exact` is for flat data alone."""
    from flow_matching.solver import ODESolver

    model, elements = problem.model, x[0].numel()
    schedule = model.schedule
    data, noise = (1 / (1 + math.exp(u)) for u in schedule.log_sigma_hat_range)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        # The solver steps past its end before it interpolates, to where s would not be positive.
        s = noise + (data - noise) * t.clamp(0, 1)
        time = schedule.time(((1 - s) / s).log()).clamp(schedule.t_min, schedule.t_max)
        y = x / s
        return (data - noise) * (y - model.noise(y, time.expand(len(x))) / s)

    def log_source(x: Tensor) -> Tensor:
        return log_prior(model, x / noise) - elements * math.log(noise)

    given = {"step_size": None, "method": "dopri5", "atol": tolerance, "rtol": tolerance}
    given |= {"time_grid": x.new_tensor([1.0, 0.0]), "exact_divergence": exact}
    # It draws its probe from the global generator, in the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(x.dtype)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            solver = ODESolver(velocity)
            _, found = solver.compute_likelihood(x_1=data * x, log_p0=log_source, **given)
    finally:
        torch.set_default_dtype(before)
    return -(found + elements * math.log(data)).detach()
