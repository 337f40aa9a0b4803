"""The two problems on which the recipe is tried: in four dimensions, a ring and a funnel.

No loss of a higher order was run on them before the recipe was written down.

Both densities are mixtures over one variable, and so are they diffused: sums over a grid of it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks.worth_problems import Cell, Line, Sizes


class Mixture(ABC):
    """x in four dimensions, of a density that depends on one variable z."""

    elements = 4
    std: Tensor
    log_z = 0.0

    def __init__(self, line: Line) -> None:
        self.line = line
        self.mean = torch.zeros(4)

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Draws of the data (N, 4) from uniform numbers (N, 4)."""

    @abstractmethod
    def given(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log q_t(x | z), (N, nodes), for z (nodes,), α and σ (N, 1)."""

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log q_t (N,) and its gradient (N, 4) at x (N, 4), for α and σ (N,)."""

        def log_density(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            joint = self.line.logits + self.given(x, self.line.nodes, alpha, sigma)
            value = joint.logsumexp(1)
            return value.sum(), value

        slope = torch.func.grad(log_density, has_aux=True)
        given = (each.split(512) for each in (x, alpha[:, None], sigma[:, None]))
        parts = zip(*given, strict=True)
        found = [slope(*each) for each in parts]
        score, log_q = (torch.cat(each) for each in zip(*found, strict=True))
        return log_q, score


class Ring(Mixture):
    """Radius of density r³ exp(−(r − 1)²/(2 · 0.1²)), and any direction.

    Over all directions w the mean of exp(κ·w) is 2 I₁(κ)/κ, κ = α r ‖x‖/σ².
    """

    def __init__(self) -> None:
        super().__init__(Line(lambda r: 3 * r.log() - 50 * (r - 1) ** 2, 0.2, 1.8, 1601))
        self.std = torch.full((4,), math.hypot(self.line.mean, self.line.std) / 2)

    def quantile(self, u: Tensor) -> Tensor:
        radius = self.line.quantile(u[:, 0])
        parts = torch.stack([(1 - u[:, 1]).sqrt(), u[:, 1].sqrt()], 1)
        angles = 2 * math.pi * u[:, 2:]
        direction = torch.stack([parts * angles.cos(), parts * angles.sin()], 2).flatten(1)
        return radius[:, None] * direction

    def given(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        kappa = alpha * z * size / sigma**2
        squares = ((size - alpha * z) / sigma) ** 2
        over_directions = torch.log(2 * torch.special.i1e(kappa) / kappa)
        return over_directions - squares / 2 - 2 * torch.log(2 * math.pi * sigma**2)


class Funnel(Mixture):
    """v of N(0, 1.5²), and three coordinates of N(0, eᵛ)."""

    spread = 1.5

    def __init__(self) -> None:
        super().__init__(Line(lambda v: -(v**2) / (2 * self.spread**2), -12, 12, 4801))
        of_three = math.exp(self.spread**2 / 4)  # the root of E eᵛ
        self.std = torch.tensor([self.spread, *[of_three] * 3])

    def quantile(self, u: Tensor) -> Tensor:
        v = self.line.quantile(u[:, :1])
        return torch.cat([v, torch.exp(v / 2) * torch.special.ndtri(u[:, 1:])], 1)

    def given(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        of_v = ((x[:, :1] - alpha * z) / sigma) ** 2 + torch.log(2 * math.pi * sigma**2)
        variance = alpha**2 * z.exp() + sigma**2
        rest = x[:, 1:].square().sum(1, keepdim=True)
        return -(of_v + rest / variance + 3 * torch.log(2 * math.pi * variance)) / 2


def _cell(density: Callable[[], Mixture], sigma_max: float) -> Cell:
    schedule = hosm.VESchedule(sigma_max=sigma_max)
    return Cell(density(), schedule, Sizes(128), 3_000, 96)


RESERVED = {
    "ring, d = 4": partial(_cell, Ring, 20.0),
    "funnel, d = 4": partial(_cell, Funnel, 60.0),
}
