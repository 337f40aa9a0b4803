"""The cells of the study: data of known density, networks of several seeds, points to judge at.

Densities are known exactly, most of them at every noise level. One-dimensional factors are sums
over a grid: diffused, such a factor is a mixture of Gaussians at the nodes, to 5e-9 where σ is at
least the spacing. Points are scrambled Sobol points, mapped by inverse distribution functions;
independent scramblings are the blocks from which errors are computed.

Each density has
    quantile(u)                     draws of the data (N, d) from uniform numbers (N, d)
    diffuse(x, alpha, sigma)        log q_t (N,) and its gradient (N, d), for α and σ (N,)
    data_score(x)                   ∇log p₀ of the data (N, d); AttributeError where there is none
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from docs.examples import mixture_1d as example
from tests.oracles import paper_mixture
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

import hosm_losses as hosm
from benchmarks.experiment import seeded

BLOCKS = 8


class Line:
    """A density on the line, from the logarithm of any multiple of it on a grid."""

    def __init__(
        self, log_density: Callable[[Tensor], Tensor], low: float, high: float, nodes: int
    ) -> None:
        self.log_density = log_density
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

    def data_score(self, z: Tensor) -> Tensor:
        """The derivative (N,) of the log-density at z (N,)."""
        return torch.func.grad(lambda z: self.log_density(z).sum())(z)

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log q_t and its derivative at x = α z + σ ε, all of shape (N,).

        A sum over the grid is exact to e^(−2π² σ²/h²), h the spacing of α z, and wrong beyond.
        """
        spacing, least = float(self.nodes[1] - self.nodes[0]), float((sigma / alpha).min())
        if spacing > 1.01 * least:
            raise ValueError(
                f"sigma / alpha: expected {spacing:.2g}, the grid's spacing, or more; got "
                f"{least:.2g}. Start at a larger t_min."
            )
        parts = []
        for x_, alpha_, sigma_ in zip(
            *(column[:, None].split(512) for column in (x, alpha, sigma)), strict=True
        ):
            noise = (x_ - alpha_ * self.nodes) / sigma_
            joint = self.logits - noise.square() / 2
            log_q = joint.logsumexp(1) - torch.log(sigma_[:, 0] * math.sqrt(2 * math.pi))
            parts.append((log_q, -(joint.softmax(1) * noise).sum(1) / sigma_[:, 0]))
        log_q, slope = zip(*parts, strict=True)
        return torch.cat(log_q), torch.cat(slope)


class Product:
    """Independent coordinates, one line for each."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines, self.elements = lines, len(lines)
        self.mean, self.std = (
            torch.tensor([getattr(line, name) for line in lines]) for name in ("mean", "std")
        )

    def quantile(self, u: Tensor) -> Tensor:
        pairs = zip(self.lines, u.unbind(1), strict=True)
        return torch.stack([line.quantile(column) for line, column in pairs], 1)

    def data_score(self, x: Tensor) -> Tensor:
        score = torch.empty_like(x)
        for line in dict.fromkeys(self.lines):  # the columns of equal lines at once
            columns = [i for i, of_column in enumerate(self.lines) if of_column is line]
            values = x[:, columns]
            score[:, columns] = line.data_score(values.flatten()).reshape(values.shape)
        return score

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.lines, x.unbind(1), strict=True)
        parts = [line.diffuse(column, alpha, sigma) for line, column in pairs]
        log_q, score = (torch.stack(columns, 1) for columns in zip(*parts, strict=True))
        return log_q.sum(1), score


class Rotated:
    """A product after a rotation that is drawn once."""

    def __init__(self, product: Product) -> None:
        self.product, self.elements = product, product.elements
        square = torch.randn((self.elements,) * 2, generator=seeded(0), dtype=torch.float64)
        self.rotation = torch.linalg.qr(square).Q
        self.mean = (self.rotation @ product.mean.double()).float()
        self.std = (self.rotation.square() @ product.std.double().square()).sqrt().float()

    def quantile(self, u: Tensor) -> Tensor:
        return self.product.quantile(u) @ self.rotation.T

    def data_score(self, x: Tensor) -> Tensor:
        rotation = self.rotation.to(x.dtype)
        return self.product.data_score(x @ rotation) @ rotation.T

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        log_q, score = self.product.diffuse(x @ self.rotation, alpha, sigma)
        return log_q, score @ self.rotation.T


class Checkerboard:
    """Uniform on 8 of the 16 squares of [−1, 1]²."""

    edges = torch.linspace(-1, 1, 5, dtype=torch.float64)
    elements = 2
    mean, std = torch.zeros(2), torch.full((2,), 3**-0.5)

    def quantile(self, u: Tensor) -> Tensor:
        row, column = (4 * u[:, 0]).floor(), (2 * u[:, 1]).floor()
        within = 2 * u[:, 1] - column
        return torch.stack([2 * u[:, 0], (2 * column + row % 2 + within) / 2], 1) - 1

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
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


class Mixture(ABC):
    """x in four dimensions, of a density that depends on one variable z, summed over a grid."""

    elements = 4
    std: Tensor

    def __init__(self, line: Line) -> None:
        self.line = line
        self.mean = torch.zeros(4)

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def log_density_given(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log q_t(x | z), (N, nodes), for z (nodes,), α and σ (N, 1)."""

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        def log_density(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            conditional = self.log_density_given(x, self.line.nodes, alpha, sigma)
            value = (self.line.logits + conditional).logsumexp(1)
            return value.sum(), value

        slope = torch.func.grad(log_density, has_aux=True)
        rows = (column.split(512) for column in (x, alpha[:, None], sigma[:, None]))
        parts = [slope(*part) for part in zip(*rows, strict=True)]
        score, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
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

    def data_score(self, x: Tensor) -> Tensor:
        radius = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return -100 * (radius - 1) * x / radius

    def log_density_given(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
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

    def data_score(self, x: Tensor) -> Tensor:
        v, others = x[:, :1], x[:, 1:]
        scaled = others * torch.exp(-v)
        of_v = (others * scaled).sum(1, keepdim=True) / 2 - 1.5 - v / self.spread**2
        return torch.cat([of_v, -scaled], 1)

    def log_density_given(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        of_v = ((x[:, :1] - alpha * z) / sigma) ** 2 + torch.log(2 * math.pi * sigma**2)
        variance = alpha**2 * z.exp() + sigma**2
        squares = x[:, 1:].square().sum(1, keepdim=True)
        return -(of_v + squares / variance + 3 * torch.log(2 * math.pi * variance)) / 2


class Lattice:
    """φ⁴ on a ring of sites: −log p₀ = Σ_i (φ_i − φ_{i+1})²/2 + (φ_i² − 1)², and log Z.

    Draws and Z come from powers of the transfer matrix on a grid. Its spacing is σ(t_min), whose
    noise makes the draws continuous. q is known at t_min alone, by the heat equation:
    log q = log p₀ + σ²/2 (∆ log p₀ + ‖∇log p₀‖²) + O(σ⁴).
    """

    def __init__(self, elements: int = 16) -> None:
        self.elements = elements
        self.nodes = torch.linspace(-2.6, 2.6, 521, dtype=torch.float64)
        well = (self.nodes.square() - 1).square() / 2
        differences = self.nodes[:, None] - self.nodes
        matrix = torch.exp(-differences.square() / 2 - well[:, None] - well) * 0.01
        self.powers = [torch.eye(521, dtype=torch.float64)]
        for _ in range(elements):
            self.powers.append(self.powers[-1] @ matrix)
        marginal = self.powers[-1].diagonal()
        self.log_z = float(marginal.sum().log())
        std = float((marginal @ self.nodes.square() / marginal.sum()).sqrt())
        self.mean, self.std = torch.zeros(elements), torch.full((elements,), std)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.cat([self._quantile(part) for part in u.split(2048)])

    def _quantile(self, u: Tensor) -> Tensor:
        first = before = None
        sites = []
        for k, column in enumerate(u.unbind(1)):
            if first is None:
                mass = self.powers[-1].diagonal().expand(len(u), -1)
            else:
                mass = self.powers[1][before] * self.powers[self.elements - k][first]
            sums = mass.cumsum(1)
            before = torch.searchsorted(sums, column[:, None] * sums[:, -1:])[:, 0]
            before = before.clamp_max(len(self.nodes) - 1)
            first = before if first is None else first
            sites.append(self.nodes[before])
        return torch.stack(sites, 1)

    @cached_property
    def pool(self) -> Tensor:
        generator = seeded(0)
        return self.quantile(
            torch.rand((2**16, self.elements), generator=generator, dtype=torch.float64)
        )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count, d) from a pool, turned by a random number of sites, of random sign."""
        rows = torch.randint(len(self.pool), (count,), generator=generator)
        turn = torch.randint(self.elements, (count, 1), generator=generator)
        sign = 2 * torch.randint(2, (count, 1), generator=generator) - 1
        sites = (torch.arange(self.elements) + turn) % self.elements
        return sign * self.pool[rows].gather(1, sites)

    def data_score(self, x: Tensor) -> Tensor:
        neighbours = x.roll(1, 1) + x.roll(-1, 1)
        return neighbours - 2 * x - 4 * x * (x.square() - 1)

    def diffuse(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if not (alpha == 1).all() or float(sigma.max()) > 0.0101:
            raise ValueError("alpha, sigma: expected those of t_min; got others.")

        def log_density(x: Tensor) -> tuple[Tensor, Tensor]:
            bonds = (x - x.roll(1, 1)).square() / 2
            value = -(bonds + (x.square() - 1).square()).sum(1) - self.log_z
            laplacian = (2 - 12 * x.square()).sum(1)  # 4 of them, less 2 of the bonds
            value = value + sigma.square() / 2 * (laplacian + self.data_score(x).square().sum(1))
            return value.sum(), value

        score, log_q = torch.func.grad(log_density, has_aux=True)(x)
        return log_q, score


class Digits:
    """The 8×8 digits of scikit-learn, 0 to 16, dequantized uniformly to [−1, 1]; three splits."""

    elements = 64

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        rows = torch.as_tensor(load_digits().data).float()
        order = torch.randperm(len(rows), generator=seeded(0))
        self.train, self.validation, self.test = rows[order[:1797]].split((1197, 296, 304))
        uniform = self.dequantize(self.train, seeded(0))
        self.mean, self.std = uniform.mean(0), uniform.std(0)

    def dequantize(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return -1 + 2 * (rows + torch.rand(rows.shape, generator=generator)) / 17

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Data for training (count, d), with replacement and dequantized anew."""
        rows = torch.randint(len(self.train), (count,), generator=generator)
        return self.dequantize(self.train[rows], generator)


def together(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The rows of all members of an ensemble, taking turns along `dim`."""
    return torch.stack(list(parts), dim + 1).flatten(dim, dim + 1)


class Ensemble(nn.Module):
    """One MLP for ε̂(x, t) per seed; row i of a batch belongs to member i modulo their number.

    Every hidden layer is scaled and shifted by 17 features of log σ̂. The network adds to the exact
    predictor for Gaussian data, unless the cell has `predictor=False`. The mean of a loss over the
    rows trains the members independently: each gets 1/S of its gradient, to which Adam is blind.
    """

    def __init__(self, cell: "Cell", seeds: Sequence[int]) -> None:
        super().__init__()
        density, (width, depth, waves) = cell.density, cell.sizes
        self.schedule, self.members, self.waves = cell.schedule, len(seeds), waves
        self.predictor, elements = cell.predictor, density.elements
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", density.mean)
        self.register_buffer("std", density.std)
        shapes = [*pairwise([elements * (1 + 2 * waves), *[width] * depth, elements])]
        shapes.append((17, 2 * depth * width))
        networks = []
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append([nn.Linear(*shape) for shape in shapes])
        layers = list(zip(*networks, strict=True))
        self.weights, self.biases = (
            nn.ParameterList([torch.stack([part(linear) for linear in layer]) for layer in layers])
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
        *layers, last, modulation = zip(self.weights, self.biases, strict=True)
        features = self._linear(self._by_member(example.waves(level, 8)), *modulation)
        hidden = self._by_member(torch.cat(inputs, 1))
        for layer, part in zip(layers, features.chunk(len(layers), 2), strict=True):
            scale, shift = part.chunk(2, 2)
            hidden = nn.functional.silu(self._linear(hidden, *layer) * (1 + scale) + shift)
        output = self._linear(hidden, *last).transpose(0, 1).reshape(x.shape)
        return sigma / size * standard + output if self.predictor else output

    def _by_member(self, rows: Tensor) -> Tensor:
        """(N·S, k) to (S, N, k)."""
        return rows.reshape(-1, self.members, rows.shape[1]).transpose(0, 1)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias, x, weight)


class Sizes(NamedTuple):
    """Of a network: its hidden layers, how many there are, and the harmonics of its input."""

    width: int
    depth: int = 3
    waves: int = 0


@dataclass(frozen=True)
class Cell:
    """A problem with a network, and how much to spend on it.

    Attributes:
        predictor: whether the network adds to the exact predictor for Gaussian data.
        budget: training steps of order one from scratch; every loss has as many evaluations of
            the network, and a second stage as well.
        long: steps of order one before a second stage; None for no second stage.
        solver: steps of the ODE when a network is judged.
        batch: rows of each member.
        points: in a block, where the KL divergence is measured, and of samples.
        scored: in a block, where the score of the ODE is measured.
        seeds: that are reported.
        spares: further seeds, by which rates are chosen.
        searched: whether every family chooses its rate here; else it has that of other cells.
        uniform_in_t: whether times are uniform in t, with the default weighting, and not in log σ̂.
    """

    density: Any
    schedule: hosm.Schedule
    sizes: Sizes
    predictor: bool = True
    budget: int = 3_000
    long: int | None = None
    solver: int = 64
    batch: int = 256
    points: int = 256
    scored: int = 64
    seeds: int = 5
    spares: int = 2
    searched: bool = False
    uniform_in_t: bool = False

    def model(self, seeds: Sequence[int]) -> hosm.ScoreModel:
        return hosm.ScoreModel(Ensemble(self, seeds), self.schedule)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Fresh data (count, d) for training."""
        if hasattr(self.density, "draw"):
            return self.density.draw(count, generator).float()
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
        blocks = torch.cat([engine.draw(self.points, dtype=torch.float64) for engine in engines])
        return blocks.clamp(2**-32, 1 - 2**-32)  # of 30 bits, 0 among them

    @cached_property
    def at_t_min(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of q at t_min (N, d), block by block, with log q (N,) and ∇log q (N, d)."""
        u = self.sobol(2 * self.density.elements, 0)
        start = self.noisy(torch.full((len(u),), self.schedule.t_min, dtype=u.dtype), u)
        return (start[0], *self.density.diffuse(*start))

    @cached_property
    def at_all_levels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, d) at times t uniform in log σ̂, with −σ ∇log q_t and the ε that was drawn."""
        u = self.sobol(1 + 2 * self.density.elements, BLOCKS)
        low, high = self.schedule.log_sigma_hat_range
        t = self.schedule.time(low + (high - low) * u[:, 0])
        x, alpha, sigma = self.noisy(t, u[:, 1:])
        noise = torch.special.ndtri(u[:, 1 + self.density.elements :])
        return x, t, -sigma[:, None] * self.density.diffuse(x, alpha, sigma)[1], noise

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

    def ode(self) -> dict[str, Any]:
        """Options of `ode_nll` and `ode_sample`."""
        moments = {"data_mean": self.density.mean, "data_std": self.density.std}
        solver = hosm.FixedGrid(self.solver, **moments)
        return {"solver": solver, "divergence": "exact", "log_prior": self.log_prior}

    def small(self) -> "Cell":
        """The same with next to no work, for a try."""
        sizes = self.sizes._replace(width=8, depth=2)
        few = {"budget": 8, "long": self.long and 8, "solver": 8, "batch": 8, "scored": 2}
        return replace(self, sizes=sizes, points=4, spares=1, searched=True, **few)


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
    low, wide = Sizes(64, waves=4), Sizes(128)
    transferred = {"solver": 48, "points": 128, "scored": 32}
    searched = {"long": 81_000, "searched": True}

    def wells(elements: int, **changes: Any) -> Cell:
        changes = {"solver": 96} | changes if elements < 8 else transferred | changes
        return Cell(many_well(elements), ve, wide, **changes)

    def rotated(elements: int) -> Cell:
        return Cell(Rotated(many_well(elements)), ve, wide, **transferred)

    return {
        "mixture, d = 1, VE": lambda: Cell(
            mixture(), hosm.VESchedule(), low, solver=128, batch=512, **searched
        ),
        "mixture, d = 1, VP": lambda: Cell(
            mixture(), hosm.VPSchedule(), low, solver=192, batch=512
        ),
        "checkerboard, d = 2": lambda: Cell(Checkerboard(), ve, low, solver=128, **searched),
        "many-well, d = 2": partial(wells, 2),
        "many-well, d = 4": partial(wells, 4, **searched),
        "many-well, d = 4, no predictor": partial(wells, 4, predictor=False),
        "ring, d = 4": lambda: Cell(Ring(), ve, wide, solver=96),
        "funnel, d = 4": lambda: Cell(Funnel(), hosm.VESchedule(sigma_max=60.0), wide, solver=96),
        "many-well, d = 8": partial(wells, 8),
        "many-well, d = 8, rotated": partial(rotated, 8),
        "many-well, d = 16": partial(wells, 16),
        "many-well, d = 16, rotated": partial(rotated, 16),
        "φ⁴ ring, d = 16": lambda: Cell(Lattice(), ve, wide, **transferred),
        "digits, d = 64": lambda: Cell(
            Digits(), hosm.VPSchedule(), Sizes(256), budget=2_000, **transferred | {"seeds": 3}
        ),
    }


CELLS = _cells()
