"""The cells of the study: data of known density, networks of several seeds, points to judge at.

Every density is known exactly at every noise level. One-dimensional factors are sums over a grid:
diffused, such a factor is a mixture of Gaussians at the nodes, to 5e-9 where σ is at least the
spacing. Points are scrambled Sobol points, mapped by inverse distribution functions; independent
scramblings are the blocks from which errors are computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from docs.examples import mixture_1d as example
from tests.oracles import paper_mixture
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

import hosm_losses as hosm

BLOCKS = 8
PLAIN, FILM = KINDS = ("plain", "FiLM")


class Line:
    """A density on the line, from the logarithm of any multiple of it on a grid."""

    def __init__(
        self, log_density: Callable[[Tensor], Tensor], low: float, high: float, nodes: int
    ) -> None:
        self.nodes = torch.linspace(low, high, nodes, dtype=torch.float64)
        values, spacing = log_density(self.nodes), (high - low) / (nodes - 1)
        self.logits = values.log_softmax(0)
        self.log_z = float(values.logsumexp(0)) + math.log(spacing)
        mass = self.logits.exp()
        self.mean = float(mass @ self.nodes)
        self.std = math.sqrt(float(mass @ (self.nodes - self.mean).square()))
        areas = torch.cumulative_trapezoid(mass)
        self.distribution = torch.cat([areas.new_zeros(1), areas / areas[-1]])

    def quantile(self, u: Tensor) -> Tensor:
        """Points with the distribution function u in (0, 1)."""
        above = torch.searchsorted(self.distribution, u.contiguous()).clamp(1, len(self.nodes) - 1)
        start, end = self.distribution[above - 1], self.distribution[above]
        return torch.lerp(self.nodes[above - 1], self.nodes[above], (u - start) / (end - start))

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log q_t and its derivative at x = α z + σ ε, all of shape (N,)."""
        found = []
        for x_, alpha_, sigma_ in zip(
            *(each[:, None].split(512) for each in (x, alpha, sigma)), strict=True
        ):
            noise = (x_ - alpha_ * self.nodes) / sigma_
            joint = self.logits - noise.square() / 2
            log_q = joint.logsumexp(1) - torch.log(sigma_[:, 0] * math.sqrt(2 * math.pi))
            found.append((log_q, -(joint.softmax(1) * noise).sum(1) / sigma_[:, 0]))
        log_q, slope = zip(*found, strict=True)
        return torch.cat(log_q), torch.cat(slope)


class Product:
    """Independent coordinates, one line for each."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines, self.elements = lines, len(lines)
        self.log_z = sum(line.log_z for line in lines)
        self.mean, self.std = (
            torch.tensor([getattr(line, name) for line in lines]) for name in ("mean", "std")
        )

    def quantile(self, u: Tensor) -> Tensor:
        """Draws of the data (N, d) from uniform numbers (N, d)."""
        pairs = zip(self.lines, u.unbind(1), strict=True)
        return torch.stack([line.quantile(each) for line, each in pairs], 1)

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log q_t (N,) and its gradient (N, d) at x (N, d), for α and σ (N,)."""
        pairs = zip(self.lines, x.unbind(1), strict=True)
        found = [line.diffuse(each, alpha, sigma) for line, each in pairs]
        log_q, score = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
        return log_q.sum(1), score


class Checkerboard:
    """Uniform on 8 of the 16 squares of [−1, 1]²."""

    edges = torch.linspace(-1, 1, 5, dtype=torch.float64)
    elements, log_z = 2, 0.0
    mean, std = torch.zeros(2), torch.full((2,), 3**-0.5)

    def quantile(self, u: Tensor) -> Tensor:
        """Draws of the data (N, 2) from uniform numbers (N, 2)."""
        row, column = (4 * u[:, 0]).floor(), (2 * u[:, 1]).floor()
        within = 2 * u[:, 1] - column
        return torch.stack([2 * u[:, 0], (2 * column + row % 2 + within) / 2], 1) - 1

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log q_t (N,) and its gradient (N, 2), as in `Product`."""

        def log_density(x: Tensor) -> tuple[Tensor, Tensor]:
            scaled = (x[..., None] - alpha[:, None, None] * self.edges) / sigma[:, None, None]
            above, below = scaled[..., :-1], scaled[..., 1:]
            # Φ(above) − Φ(below) in the tail where the difference loses no digits.
            sign = torch.where(above + below > 0, -1.0, 1.0)
            tails = (torch.special.erfc(-(0.5**0.5) * (sign * end)) for end in (above, below))
            inside = sign * (next(tails) - next(tails)) / 2
            # The two even and the two odd strips, along both axes.
            even, odd = (inside[..., i::2].sum(-1).prod(1) for i in (0, 1))
            value = torch.log(((even + odd) / 2).clamp_min(1e-300)) - 2 * alpha.log()
            return value.sum(), value

        score, log_q = torch.func.grad(log_density, has_aux=True)(x)
        return log_q, score


Density = Product | Checkerboard


def together(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The rows of all members of an ensemble, taking turns along `dim`."""
    return torch.stack(list(parts), dim + 1).flatten(dim, dim + 1)


class Ensemble(nn.Module):
    """One MLP for ε̂(x, t) per seed; row i of a batch belongs to member i modulo their number.

    The network adds to the exact predictor for Gaussian data, as in docs/examples/mixture_1d.py.
    FiLM scales and shifts every hidden layer by 17 features of log σ̂; the plain network has five
    of them among its inputs. The mean of a loss over the rows trains the members independently:
    each gets 1/S of its gradient, to which Adam is blind.
    """

    def __init__(self, cell: "Cell", seeds: Sequence[int], kind: str) -> None:
        super().__init__()
        density, (width, depth, waves) = cell.density, cell.sizes
        self.schedule, self.seeds, self.waves = cell.schedule, len(seeds), waves
        self.film, elements = kind == FILM, density.elements
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", density.mean)
        self.register_buffer("std", density.std)
        inputs = elements * (1 + 2 * waves) + (0 if self.film else 5)
        shapes = [*pairwise([inputs, *[width] * depth, elements])]
        if self.film:
            shapes.append((17, 2 * depth * width))
        members = []
        for seed in seeds:
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
        inputs = [standard]
        for k in range(1, self.waves + 1):
            inputs += [torch.sin(k * standard), torch.cos(k * standard)]
        level = self.schedule.log_sigma_hat(t)[:, None] / 4
        layers = [*zip(self.weights, self.biases, strict=True)]
        if self.film:
            features = self._linear(self._by_member(example.waves(level, 8)), *layers.pop())
            modulations = [each.chunk(2, 2) for each in features.chunk(len(layers) - 1, 2)]
        else:
            inputs.append(example.waves(level, 2))
            modulations = []
        hidden = self._by_member(torch.cat(inputs, 1))
        for i, layer in enumerate(layers[:-1]):
            hidden = self._linear(hidden, *layer)
            if modulations:
                scale, shift = modulations[i]
                hidden = hidden * (1 + scale) + shift
            hidden = nn.functional.silu(hidden)
        output = self._linear(hidden, *layers[-1]).transpose(0, 1).reshape(x.shape)
        return sigma / size * standard + output

    def _by_member(self, rows: Tensor) -> Tensor:
        """(N·S, k) to (S, N, k)."""
        return rows.reshape(-1, self.seeds, rows.shape[1]).transpose(0, 1)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias, x, weight)


class Posteriors:
    """The posteriors of all members, used by the losses as one `NoiseMoments`."""

    def __init__(self, members: Sequence[object]) -> None:
        self.members = members
        self.mean = together([each.mean for each in members])
        self.weights = members[0].weights[:1]  # one row: the rows are not split any further

    def along(self, v: Tensor, ell: Tensor, *, third: bool) -> tuple[Tensor, Tensor | None]:
        count = len(self.members)
        found = [
            each.along(v[:, i::count], ell[:, i::count], third=third)
            for i, each in enumerate(self.members)
        ]
        second, skew = zip(*found, strict=True)
        return together(second, 1), together(skew, 1) if third else None


@dataclass(frozen=True, eq=False, repr=False)
class MemberTargets(hosm.AveragedTargets):
    """Averaged targets whose reference is the part of the batch that belongs to the member."""

    members: int = 1

    def posterior(self, *tensors: object) -> object:
        """As of `AveragedTargets`, with the rows of each member apart."""
        *batch, kwargs = tensors
        parts = (
            super(MemberTargets, self).posterior(
                *(each[i :: self.members] for each in batch), kwargs
            )
            for i in range(self.members)
        )
        return Posteriors(list(parts))


class Sizes(NamedTuple):
    """Of a network: its hidden layers, how many there are, and the harmonics of its input."""

    width: int
    depth: int = 3
    waves: int = 0


class Points(NamedTuple):
    """Draws of q at t_min (N, d), block by block, with log q (N,) and ∇log q (N, d)."""

    x: Tensor
    log_q: Tensor
    score: Tensor


@dataclass(frozen=True)
class Cell:
    """A problem with a size of network, and how much to spend on it.

    Attributes:
        budget: training steps of order one in the shortest baseline; each loss then has the cost
            of as many.
        solver: steps of the ODE when a network is judged. With the exact score its error of the
            KL divergence is then 1e-5 nats or less, and 1e-4 for each pair where d is 8 or more.
        batch: rows of each member.
        points: in a block, where the KL divergence is measured, and of samples.
        scored: in a block, where the score of the ODE is measured.
        seeds: that are reported.
        spares: seeds by which networks, targets and rates are chosen.
    """

    density: Density
    schedule: hosm.Schedule
    sizes: Sizes
    budget: int
    solver: int = 64
    batch: int = 256
    points: int = 512
    scored: int = 128
    seeds: int = 5
    spares: int = 1

    def model(self, seeds: Sequence[int], kind: str) -> hosm.ScoreModel:
        return hosm.ScoreModel(Ensemble(self, seeds, kind), self.schedule)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Fresh data (count, d) for training."""
        shape = (count, self.density.elements)
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        return self.density.quantile(u.clamp_min(2**-53)).float()

    def noisy(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of q_t (N, d), with α and σ (N,), from uniform numbers (N, 2d)."""
        alpha, sigma = self.schedule(t)
        clean, noise = u.chunk(2, 1)
        noise = sigma[:, None] * torch.special.ndtri(noise)
        return alpha[:, None] * self.density.quantile(clean) + noise, alpha, sigma

    def sobol(self, dimensions: int, first: int) -> Tensor:
        """Uniform numbers (BLOCKS · points, dimensions), with seeds from the first one on."""
        engines = (SobolEngine(dimensions, True, first + i) for i in range(BLOCKS))
        drawn = torch.cat([each.draw(self.points, dtype=torch.float64) for each in engines])
        return drawn.clamp(2**-32, 1 - 2**-32)  # of 30 bits, 0 among them

    @cached_property
    def at_t_min(self) -> Points:
        u = self.sobol(2 * self.density.elements, 0)
        start = self.noisy(torch.full((len(u),), self.schedule.t_min, dtype=u.dtype), u)
        return Points(start[0], *self.density.diffuse(*start))

    @cached_property
    def at_all_levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, d) at times t uniform in log σ̂, with −σ ∇log q_t."""
        u = self.sobol(1 + 2 * self.density.elements, BLOCKS)
        low, high = self.schedule.log_sigma_hat_range
        t = self.schedule.time(low + (high - low) * u[:, 0])
        x, alpha, sigma = self.noisy(t, u[:, 1:])
        return x, t, -sigma[:, None] * self.density.diffuse(x, alpha, sigma)[1]

    @property
    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q at t_max, elementwise (d,)."""
        t = torch.tensor([self.schedule.t_max], dtype=torch.float64)
        alpha, sigma = self.schedule(t)
        mean, std = self.density.mean.double(), self.density.std.double()
        return alpha * mean, torch.sqrt((alpha * std).square() + sigma.square())

    def log_prior(self, latent: Tensor) -> Tensor:
        """The Gaussian of q's own mean and variance, from which the ODE starts.

        The mean of the data is felt in N(0, prior_std² I), by as much as some networks err.
        """
        mean, std = self.prior
        standard = (latent.double() - mean) / std
        value = standard.square() / 2 + std.log() + math.log(2 * math.pi) / 2
        return -value.sum(1)

    def ode(self, steps: int | None = None) -> dict[str, object]:
        """Options of `ode_nll` and `ode_sample`."""
        moments = {"data_mean": self.density.mean, "data_std": self.density.std}
        solver = hosm.FixedGrid(steps or self.solver, **moments)
        return {"solver": solver, "divergence": "exact", "log_prior": self.log_prior}

    def small(self) -> "Cell":
        """The same with next to no work, for a try."""
        sizes = self.sizes._replace(width=8, depth=2)
        return replace(self, sizes=sizes, budget=4, solver=8, batch=4, points=4, scored=2)


def mixture() -> Product:
    """The three Gaussians of arXiv 2206.08265, section 5.1."""

    def log_density(z: Tensor) -> Tensor:
        return paper_mixture().log_density(z[:, None], torch.ones_like(z), torch.zeros_like(z))

    return Product([Line(log_density, -2.5, 2.5, 7001)])


def many_well(elements: int) -> Product:
    """Pairs (a, b) of energy a⁴ − 6a² − a/2 + b²/2."""
    well = Line(lambda a: 6 * a**2 + a / 2 - a**4, -4, 4, 2001)
    normal = Line(lambda b: -(b**2) / 2, -12, 12, 3001)
    return Product([well, normal] * (elements // 2))


def _cells() -> dict[str, Callable[[], Cell]]:
    ve = hosm.VESchedule(sigma_max=20.0)
    low = Sizes(64, waves=4)

    def wells(elements: int, width: int) -> Cell:
        given = {"solver": 96} if elements < 8 else {"solver": 64, "points": 256, "spares": 3}
        return Cell(many_well(elements), ve, Sizes(width), 3_000, **given)

    found: dict[str, Callable[[], Cell]] = {
        "mixture, d = 1, VE": lambda: Cell(mixture(), hosm.VESchedule(), low, 3_000, 128, 512),
        "mixture, d = 1, VP": lambda: Cell(mixture(), hosm.VPSchedule(), low, 3_000, 192, 512),
        "checkerboard, d = 2": lambda: Cell(Checkerboard(), ve, low, 3_000, 128),
    }
    for elements, width in [(d, w) for d in (2, 4, 8) for w in (32, 128)] + [(16, 128)]:
        name = f"many-well, d = {elements}, width {width}"
        found[name] = partial(wells, elements, width)
    return found


CELLS = _cells()
