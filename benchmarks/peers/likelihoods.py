"""The likelihood as others compute it, called as their users call them: −log p(x) in nats, (B,).

Each draws one Rademacher probe for each sample and keeps it along the path. `exact` is for flat
data alone. What a function imports is what it needs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.experiment import seeded
from benchmarks.trained import Problem

VARIABLES = ("t", "log σ̂", "σ̂/(σ̂ + c)")


def signs(x: Tensor, seed: int) -> Tensor:
    """A Rademacher probe for each sample, the same in every precision."""
    drawn = torch.randint(0, 2, x.shape, generator=seeded(seed))
    return drawn.to(x.dtype) * 2 - 1


def flow(model: hosm.ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt = f x − ½ g² s of the probability-flow ODE, at a time or at times (B,).

    A velocity is dx/dt itself. Solvers step over the end before they interpolate, and times are
    clipped for that.
    """
    schedule, each = model.schedule, (-1, *(1,) * (x.ndim - 1))
    t = schedule.clip(t).expand(len(x))
    if model.prediction == "velocity":
        return model.network(x, t)
    f, g2 = schedule.drift(t).reshape(each), schedule.squared_diffusion(t).reshape(each)
    return f * x - 0.5 * g2 * model.score(x, t)


def follow(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    span: Tensor,
    probes: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The end of a field's path by torchdiffeq, (B, *), and the integral of its divergence, (B,).

    As continuous normalising flows use it (FFJORD, arXiv 1810.01367): state and log-density go
    through one call of `odeint` for the whole batch, value and divergence share a forward pass,
    and each of the probes (K, B, *) has a pass back. Along the unit vectors that is exact.
    """
    from torchdiffeq import odeint

    def right_side(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(state[1])
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            moved = field(point, t)
            for probe in probes:
                (pulled,) = torch.autograd.grad((moved * probe).sum(), point, retain_graph=True)
                total += (pulled * probe).flatten(1).sum(1)
        return moved.detach(), total

    with torch.no_grad():
        states, gains = odeint(right_side, (x, x.new_zeros(len(x))), span, **options)
    return states[-1], gains[-1]


def dopri5(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    span: Tensor,
    probes: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """`follow` by torchdiffeq's default; without step_t it steps over the end and interpolates."""
    options = {"step_t": span[-1:]}
    given = {"method": "dopri5", "rtol": tolerance, "atol": tolerance, "options": options}
    return follow(field, x, span, probes, **given)


def units(x: Tensor) -> Tensor:
    """The unit vectors, as probes (d, 1, d) of flat data."""
    return torch.eye(x.shape[1], dtype=x.dtype)[:, None]


def log_prior(model: hosm.ScoreModel, latent: Tensor) -> Tensor:
    """log N(0, prior_std² I) of a batch, (B,)."""
    normal = torch.distributions.Normal(latent.new_zeros(()), model.schedule.prior_std)
    return normal.log_prob(latent).flatten(1).sum(1)


class Field(nn.Module):
    """The slope of x in t, or of z = (x/α − mean)/c in log σ̂ or σ̂/(σ̂ + c), c² = var + σ̂²."""

    def __init__(self, model: hosm.ScoreModel, variable: str, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.model, self.variable = model, variable
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)
        self.size = 0.5 * float(var.mean().log())

    def sizes(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, σ and c at u = log σ̂, (B,), as (B, 1, …)."""
        u = u.reshape(-1, *(1,) * self.mean.ndim)
        alpha, sigma = self.model.schedule(self.model.schedule.time(u))
        return alpha, sigma, torch.sqrt(self.var + (sigma / alpha) ** 2)

    def forward(self, y: Tensor, s: Tensor) -> Tensor:
        """The slope at states y (B, *), all at one s, a number or (B,)."""
        s, schedule = s.expand(len(y)), self.model.schedule
        if self.variable == "t":
            return flow(self.model, y, s)
        u = s if self.variable == "log σ̂" else torch.log(s / (1 - s)) + self.size
        alpha, sigma, scale = self.sizes(u)
        ratio = sigma / alpha / scale
        score = self.model.score(alpha * (scale * y + self.mean), schedule.time(u))
        slope = -ratio * (sigma * score + ratio * y)
        if self.variable == "log σ̂":
            return slope
        return slope / (s * (1 - s)).reshape(-1, *(1,) * self.mean.ndim)

    def nll(self, follower: Callable[..., Any], given: Tensor, *options: Any, back: bool):
        """−log p of points (B, *), or of the samples that latents become, where `back`."""
        schedule = self.model.schedule
        if self.variable == "t":
            span = given.new_tensor([schedule.t_min, schedule.t_max])
            factors, shifts = given.new_ones(2, *self.mean.shape), 0 * given[:2]
        else:
            ends = given.new_tensor(schedule.log_sigma_hat_range)
            span = ends if self.variable == "log σ̂" else torch.sigmoid(ends - self.size)
            alpha, _, scale = self.sizes(ends)
            factors, shifts = alpha * scale, alpha * self.mean
        start, end = (1, 0) if back else (0, 1)
        y = (given - shifts[start]) / factors[start]
        y, gain = follower(y, span[[start, end]], *options)
        latent = given if back else factors[end] * y + shifts[end]
        low, high = factors.flatten(1).log().sum(1)
        return low - high - log_prior(self.model, latent) + (gain if back else -gain)


def by_scipy(problem: Problem, x: Tensor, tolerance: float, seed: int) -> Tensor:
    """As most public code has it, written for comparison from arXiv 2011.13456, appendix D.2.

    One solve for the whole batch by scipy's RK45 in t, and two passes through the network at each
    call, one for the drift and one for the vector-Jacobian product.
    """
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


def by_torchdiffeq(
    problem: Problem, x: Tensor, tolerance: float, seed: int, *, exact: bool = False
) -> Tensor:
    """By `follow`, with dopri5 in t."""
    model = problem.model
    span = x.new_tensor([model.schedule.t_min, model.schedule.t_max])
    probes = units(x) if exact else signs(x, seed)[None]
    given = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
    latent, gain = follow(partial(flow, model), x, span, probes, **given)
    return -(log_prior(model, latent) + gain)
