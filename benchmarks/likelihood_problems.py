"""What the likelihood is measured on: an exact score in the plane, and the trained networks.

A mixture of round Gaussians with means m_k and variance s² has at noise σ the score
Σ_k p_k(x) (m_k − x)/(s² + σ²), with p_k the softmax of −|x − m_k|²/(2 (s² + σ²)).
"""

import copy
import dataclasses

import torch
from tests.oracles import ring as ring_mixture
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.trained import HELD_OUT, Problem, trained

SIGMA_MAX, STD = 20.0, 0.1


class RoundMixture(nn.Module):
    """ε̂ = −σ ∇ log q_t of equal round Gaussians under the VE schedule."""

    def __init__(self, schedule: hosm.VESchedule, means: Tensor, std: float):
        super().__init__()
        self.schedule = schedule
        self.register_buffer("means", means)
        self.register_buffer("variance", torch.tensor(std**2, dtype=means.dtype))

    def forward(self, x, t):
        sigma = self.schedule.sigma(t)[:, None]
        variance = self.variance + sigma**2
        away = (x[:, None] - self.means).square().sum(2)
        mean = (-away / (2 * variance)).softmax(1) @ self.means
        return sigma * (x - mean) / variance


class Counted(nn.Module):
    """A network that counts the samples it is called with."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, x, t):
        self.samples += len(x)
        return self.network(x, t)


def ring() -> Problem:
    """Eight Gaussians on a circle, d = 2, the exact score in float64."""
    mixture = ring_mixture()
    return _exact(mixture.means, mixture.sample(HELD_OUT, torch.Generator().manual_seed(0)))


def line() -> Problem:
    """Three Gaussians, d = 1, where one probe of signs is exact."""
    means = torch.tensor([[-0.8], [0.1], [0.7]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(HELD_OUT, 1, generator=generator, dtype=torch.float64)
    return _exact(means, means[torch.arange(HELD_OUT) % 3] + STD * noise)


def problem(name: str, steps: int | None = None) -> Problem:
    """The ring, or one of `benchmarks.trained`, trained for so many steps."""
    return ring() if name == "ring" else trained(name, steps)


def counted(problem: Problem) -> Problem:
    """The problem with a counter around its network."""
    model = hosm.ScoreModel(Counted(problem.model.network), problem.model.schedule)
    return dataclasses.replace(problem, model=model)


def in_double(problem: Problem) -> Problem:
    """The problem in float64."""
    model = copy.deepcopy(problem.model).double()
    return dataclasses.replace(problem, model=model, data=problem.data.double())


def _exact(means: Tensor, data: Tensor) -> Problem:
    schedule = hosm.VESchedule(sigma_max=SIGMA_MAX)
    model = hosm.ScoreModel(RoundMixture(schedule, means, STD), schedule)
    return Problem(model, data, float(data.std()))
