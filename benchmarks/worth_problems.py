"""What the losses are compared on: data, ensembles of networks, and the distance of an ODE.

The density of the data at t_min is known but for the digits. KL(q || p_ODE) is then the mean of
r + e^{−r} − 1 over draws of q, r = log q − log p_ODE: at least 0 at each of them, and of less
variance than the mean of r. In one dimension it is an integral over a grid. Of the digits, it is
the mean −log p_ODE of what was held out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from docs.examples import mixture_1d as example
from tests.oracles import GaussianMixture, anisotropic, paper_mixture
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.trained import digits

POOL, NOISED, HELD_OUT = 2**17, 4096, 360


class Sizes(NamedTuple):
    """Of a network: its hidden layers and how many there are, and harmonics of its input."""

    width: int
    depth: int
    waves: int


VE, FLAT = hosm.VESchedule(sigma_max=20.0), Sizes(64, 3, 4)


class Checkerboard:
    """Uniform on 8 of the 16 squares of [−1, 1]², as GaussianMixture."""

    edges = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        row = torch.randint(4, (count,), generator=generator)
        column = 2 * torch.randint(2, (count,), generator=generator) + row % 2
        within = torch.rand((count, 2), generator=generator, dtype=torch.float64)
        return -1 + (torch.stack([row, column], 1) + within) / 2

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log q_t (B,): a sum over squares of products of differences of Φ."""
        edges = alpha[:, None, None] * self.edges
        below = torch.special.ndtr((x[..., None] - edges) / sigma[:, None, None])
        inside = below[..., :-1] - below[..., 1:]
        # The two even and the two odd strips, along both axes.
        even, odd = (inside[..., i::2].sum(-1).prod(1) for i in (0, 1))
        return torch.log((even + odd) / 2) - 2 * alpha.log()

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.func.grad(lambda x: self.log_density(x, alpha, sigma).sum())(x)


Density = GaussianMixture | Checkerboard


class Ensemble(nn.Module):
    """One MLP for ε̂(x, t) per seed; row i of a batch belongs to member i modulo their number.

    Every hidden layer is scaled and shifted by features of log σ̂, and the network adds to what is
    exact for Gaussian data, as in docs/examples/mixture_1d.py. The mean of a loss over the rows
    trains the members independently: Adam does not mind that each has 1/S of the gradient.
    """

    def __init__(self, schedule: hosm.Schedule, data: Tensor, seeds: int, sizes: Sizes) -> None:
        super().__init__()
        elements, (width, depth, waves) = data.shape[1], sizes
        self.schedule, self.seeds, self.waves = schedule, seeds, waves
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", data.mean(0))
        self.register_buffer("std", data.std(0))
        widths = [elements * (1 + 2 * waves), *[width] * depth, elements]
        shapes = [(17, 2 * depth * width), *pairwise(widths)]
        members = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            members.append([nn.Linear(*shape) for shape in shapes])
        layers = list(zip(*members, strict=True))
        self.weights, self.biases = (
            nn.ParameterList([torch.stack([part(each) for each in layer]) for layer in layers])
            for part in (lambda linear: linear.weight.detach().T, lambda linear: linear.bias[None])
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule(t[:, None])
        size = torch.sqrt((alpha * self.std).square() + sigma.square())
        standard = (x - alpha * self.mean) / size
        level = self.schedule.log_sigma_hat(t)[:, None] / 4
        time, *layers = zip(self.weights, self.biases, strict=True)
        scales, shifts = self._linear(self._apart(example.waves(level, 8)), *time).chunk(2, dim=2)
        inputs = [standard]
        for k in range(1, self.waves + 1):
            inputs += [torch.sin(k * standard), torch.cos(k * standard)]
        hidden = self._apart(torch.cat(inputs, 1))
        depth = len(layers) - 1
        modulations = zip(scales.chunk(depth, 2), shifts.chunk(depth, 2), strict=True)
        for layer, (scale, shift) in zip(layers, modulations, strict=False):
            hidden = self._linear(hidden, *layer) * (1 + scale) + shift
            hidden = nn.functional.silu(hidden)
        output = self._linear(hidden, *layers[-1]).transpose(0, 1).reshape(x.shape)
        return sigma / size * standard + output

    def _apart(self, rows: Tensor) -> Tensor:
        """(N·S, k) to (S, N, k)."""
        return rows.reshape(-1, self.seeds, rows.shape[1]).transpose(0, 1)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.bmm(x, weight) + bias


@dataclass
class Problem:
    """What to train on, and what to judge by.

    Attributes:
        train: draws of the data (n, d) that training chooses from.
        test: draws at t_min (P, d), the same for every network.
        log_q: the true log-density there, (P,); None for the digits.
        factor: of log q − log p_ODE where the mean of that is an integral over a grid, (P,).
        noised: x (N, d), t and the true −σ ∇ log q_t there; None for the digits.
    """

    schedule: hosm.Schedule
    sizes: Sizes
    steps: int
    train: Tensor
    test: Tensor
    log_q: Tensor | None = None
    factor: Tensor | None = None
    noised: tuple[Tensor, Tensor, Tensor] | None = None

    def model(self, seeds: int) -> hosm.ScoreModel:
        network = Ensemble(self.schedule, self.train, seeds, self.sizes)
        return hosm.ScoreModel(network, self.schedule)

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        return self.train[torch.randint(len(self.train), (count,), generator=generator)]

    def cut(self, points: int) -> "Problem":
        """The same with few points, for a try."""
        cut = [None if each is None else each[:points] for each in (self.log_q, self.factor)]
        noised = None if self.noised is None else tuple(each[:points] for each in self.noised)
        return replace(
            self, test=self.test[:points], log_q=cut[0], factor=cut[1], noised=noised, steps=8
        )

    def judged(self, model: hosm.ScoreModel, seeds: int) -> tuple[Tensor, list[float] | None]:
        """What each point adds to the KL divergence, (S, P), and J_SM in nats of each member."""
        nll = hosm.ode_nll(
            model,
            self.test.float().repeat_interleave(seeds, 0),
            steps=self.steps,
            divergence="exact",
            data_mean=self.train.mean(0),
            data_std=self.train.std(0),
            # Larger ones cost more than they save.
            batch_size=4096 // self.test.shape[1] * seeds,
        ).nll.reshape(-1, seeds)
        if self.log_q is None:
            return nll.T, None
        ratio = (self.log_q[:, None] + nll).T
        value = torch.expm1(-ratio) + ratio if self.factor is None else self.factor * ratio
        return value, None if self.noised is None else self._j_sm(model, seeds)

    def _j_sm(self, model: hosm.ScoreModel, seeds: int) -> list[float]:
        """∫ E‖δf‖² du, which is ½ ∫ g² E‖δs‖² dt."""
        assert self.noised is not None
        x, t, noise = (each.repeat_interleave(seeds, 0) for each in self.noised)
        with torch.no_grad():
            error = model.noise(x.float(), t.float()).double() - noise
        low, high = self.schedule.log_sigma_hat_range
        return (error.square().sum(1).reshape(-1, seeds).mean(0) * (high - low)).tolist()


def of_density(
    density: Density, schedule: hosm.Schedule, sizes: Sizes = FLAT, steps=256, points=4000
) -> Problem:
    """Draws of a density that is known, and of what the schedule makes of it."""
    generator = torch.Generator().manual_seed(0)
    train = density.sample(POOL, generator).float()
    clean = density.sample(NOISED, generator)

    def diffused(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of q_t, α and σ."""
        alpha, sigma = schedule(t)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        return alpha[:, None] * clean + sigma[:, None] * noise, alpha, sigma

    start = diffused(torch.full((NOISED,), schedule.t_min, dtype=torch.float64))
    if clean.shape[1] == 1:
        start, points = (example.GRID[:, None], *start[1:]), len(example.GRID)
    start = tuple(each[:points] for each in start)
    log_q, factor = density.log_density(*start), None
    if clean.shape[1] == 1:
        factor = log_q.exp() * float(example.GRID[1] - example.GRID[0]) * points
    low, high = schedule.log_sigma_hat_range
    level = low + (high - low) * (torch.arange(NOISED, dtype=torch.float64) + 0.5) / NOISED
    t = schedule.time(level)
    end = diffused(t)
    parts = zip(*(each.split(256) for each in end), strict=True)
    noise = -end[2][:, None] * torch.cat([density.score(*part) for part in parts])
    return Problem(schedule, sizes, steps, train, start[0], log_q, factor, (end[0], t, noise))


def of_digits() -> Problem:
    """The digits, of which 360 are held out."""
    everything = digits(1797, torch.Generator().manual_seed(0))
    held_out, train = everything[:HELD_OUT], everything[HELD_OUT:]
    return Problem(VE, Sizes(128, 2, 0), 64, train, held_out)


def of_mixture(elements: int, width: int) -> Problem:
    """Four Gaussians of random axes."""
    points = 4000 if elements * width < 2000 else 1500
    return of_density(anisotropic(elements, 4), VE, Sizes(width, 2, 0), 64, points)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mixture, d = 8, width 24": lambda: of_mixture(8, 24),
    "mixture, d = 8, width 128": lambda: of_mixture(8, 128),
    "mixture, d = 1, VE": lambda: of_density(paper_mixture(), hosm.VESchedule()),
    "mixture, d = 1, VP": lambda: of_density(paper_mixture(), hosm.VPSchedule()),
    "checkerboard, d = 2": lambda: of_density(Checkerboard(), VE),
    "mixture, d = 16, width 24": lambda: of_mixture(16, 24),
    "mixture, d = 16, width 128": lambda: of_mixture(16, 128),
    "mixture, d = 32, width 24": lambda: of_mixture(32, 24),
    "mixture, d = 32, width 128": lambda: of_mixture(32, 128),
    "digits, d = 64": of_digits,
}
