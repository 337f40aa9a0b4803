"""The problems of `densities`: energies with a known log Z, and posteriors of sbibm.

log Z is exact for the φ⁴ lattice, by its transfer matrix, and for the wells, by sums over a grid.
For the four particles it comes from annealing, with an error. Data of the lattice and of the
particles are the particles of the annealing.
"""

import bz2
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.worth_problems import many_well

NODES = (10, 12)  # of a site; the second is used, and the first shows how little it matters
MOVES = 10  # after the annealing
FILES = "sbibm/tasks/{task}/files/num_observation_{number}/"
LogTarget = Callable[[Tensor], Tensor]
Project = Callable[[Tensor], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    return x


def rank(project: Project, elements: int) -> int:
    """The dimensions of the subspace."""
    return round(float(project(torch.eye(elements, dtype=torch.float64)).trace()))


@dataclass(frozen=True)
class Energy:
    """A density known up to Z, with data.

    Attributes:
        log_target: x (N, d) → log π (N,), in float64.
        data: draws (N, d).
        log_z: log ∫ π, over the subspace if there is one.
        log_z_error: its standard error; 0 where it is exact.
        project: to the subspace; the identity without one.
        harmonics: sines and cosines of each input of the network.
        checks: other estimates of log Z, for the report.
    """

    log_target: LogTarget
    data: Tensor
    log_z: float
    log_z_error: float = 0.0
    project: Project = as_it_is
    harmonics: int = 4
    checks: dict[str, float] | None = None

    def score(self, x: Tensor) -> Tensor:
        """∇ log π, in the type of x."""
        return slope(self.log_target, x.double()).to(x.dtype)


class Annealing(NamedTuple):
    """How much is spent on it: independent runs, particles of each, temperatures and leaps."""

    runs: int
    particles: int
    temperatures: int
    leaps: int


def slope(log_density: LogTarget, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: log_density(x).sum())(x)


def anneal(
    log_target: LogTarget,
    elements: int,
    std: float,
    spent: Annealing,
    project: Project = as_it_is,
) -> tuple[Tensor, Tensor]:
    """log Z of independent runs (runs,) and their particles (runs · particles, d).

    Sequential Monte Carlo from N(0, std²) on the subspace along log q + β (log π − log q). After
    each rise of β the particles of a run are resampled, and move by Hamiltonian steps with
    Metropolis. It draws from the global generator.
    """
    count, rows = spent.runs * spent.particles, torch.arange(spent.runs)[:, None] * spent.particles
    dimensions = rank(project, elements)

    def normal() -> Tensor:
        return project(torch.randn(count, elements, dtype=torch.float64))

    def log_ratio(x: Tensor) -> Tensor:
        log_q = -x.square().sum(1) / (2 * std**2) - dimensions * math.log(std * math.tau**0.5)
        return log_target(x) - log_q

    def move(x: Tensor, beta: float, step: float) -> tuple[Tensor, float]:
        def log_density(x: Tensor) -> Tensor:
            return (beta - 1) * log_ratio(x) + log_target(x)

        end, start = x, normal()
        momentum = start + step / 2 * slope(log_density, end)
        for leap in range(spent.leaps):
            end = end + step * momentum
            last = leap == spent.leaps - 1
            momentum = momentum + (step / 2 if last else step) * slope(log_density, end)
        kinetic = (momentum.square() - start.square()).sum(1) / 2
        gain = log_density(end) - log_density(x) - kinetic
        moves = torch.rand(count, dtype=x.dtype).log() < gain
        return torch.where(moves[:, None], end, x), float(moves.double().mean())

    betas = [(k / spent.temperatures) ** 2 for k in range(spent.temperatures + 1)]
    x, step, log_z = std * normal(), 0.2 * std, torch.zeros(spent.runs, dtype=torch.float64)
    for before, beta in pairwise(betas + [1.0] * MOVES):
        if beta > before:
            gains = (beta - before) * log_ratio(x).reshape(spent.runs, -1)
            log_z += gains.logsumexp(1) - math.log(spent.particles)
            sums = gains.softmax(1).cumsum(1)
            start = torch.rand(spent.runs, 1, dtype=x.dtype)
            points = (torch.arange(spent.particles) + start) / spent.particles
            chosen = torch.searchsorted(sums, points).clamp_max(spent.particles - 1)
            x = x[(chosen + rows).flatten()]
        x, accepted = move(x, beta, step)
        step *= 1.1 if accepted > 0.8 else 0.9
    return log_z, x


def mean_of(log_z: Tensor) -> tuple[float, float]:
    """log Z of all runs, and its standard error."""
    mean = float(log_z.logsumexp(0)) - math.log(len(log_z))
    return mean, float(log_z.std()) / len(log_z) ** 0.5


def lattice(x: Tensor) -> Tensor:
    """log π (N,) of φ⁴ on a periodic square lattice, fields (N, side²).

    −log π = Σ over bonds of (φ_i − φ_j)²/2 + Σ over sites of (φ_i² − 1)². A site has a bond with
    the next in its row and in its column.
    """
    x = x.double()
    side = math.isqrt(x.shape[1])
    sites = x.reshape(-1, side, side)
    bonds = sum((sites - sites.roll(1, axis)).square() / 2 for axis in (1, 2))
    return -(bonds + (sites.square() - 1).square()).flatten(1).sum(1)


def site_rule(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes of a site and the logarithms of their weights, for integrals over φ.

    The Gauss rule of the density e^(−φ⁴), from its Jacobi matrix. The squares of all bonds and
    of the wells make up φ⁴, and exp(φ_i φ_j) of the bonds is left, which polynomials follow well.
    """
    grid = torch.linspace(-3.2, 3.2, 4001, dtype=torch.float64)
    mass = torch.exp(-grid.pow(4)) * (grid[1] - grid[0])
    before, polynomial, norms = torch.zeros_like(grid), mass.sum().rsqrt().expand_as(grid), []
    for _ in range(nodes - 1):
        following = grid * polynomial - (norms[-1] if norms else 0.0) * before
        norms.append((mass @ following.square()).sqrt())
        before, polynomial = polynomial, following / norms[-1]
    beside = torch.stack(norms).diag(1)
    axis, vectors = torch.linalg.eigh(beside + beside.T)
    return axis, vectors[0].square().log() + mass.sum().log() + axis.pow(4)


def lattice_log_z(side: int, nodes: int) -> float:
    """log Z of the lattice by the rule of its sites: log tr T^side of the matrix between rows.

    T(r, s) = e^(−V(r)/2) ∏_j e^(−(r_j − s_j)²/2) e^(−V(s)/2), with the energy V of a row less the
    logarithms of its weights. The trace is Σ_r (T^a r)·(T^b r) over the unit vectors of all rows,
    a + b = side; the bonds act site by site. Rows that differ by a turn, a reflection or a sign
    have equal terms, and one of them is taken.
    """
    axis, log_weights = site_rule(nodes)
    index = torch.cartesian_prod(*[torch.arange(nodes)] * side)
    rows = axis[index]
    within = (rows - rows.roll(1, 1)).square() / 2 + (rows.square() - 1).square()
    half = torch.exp((log_weights[index] - within).sum(1) / 2)
    kernel = torch.exp(-(axis[:, None] - axis).square() / 2)
    places = nodes ** torch.arange(side - 1, -1, -1)
    mirrored = [index, index.flip(1), nodes - 1 - index, nodes - 1 - index.flip(1)]
    images = [image.roll(turn, 1) @ places for image in mirrored for turn in range(side)]
    classes, counts = torch.stack(images).amin(0).unique(return_counts=True)

    def times_matrix(vectors: Tensor) -> Tensor:  # (B, nodes^side)
        vectors = half * vectors
        for _ in range(side):  # on the last site, which then becomes the first
            vectors = (vectors.reshape(-1, nodes) @ kernel).reshape(len(vectors), -1, nodes)
            vectors = vectors.transpose(1, 2).reshape(len(vectors), -1)
        return half * vectors

    total = 0.0
    for chosen, count in zip(classes.split(64), counts.split(64), strict=True):
        left = torch.zeros(len(chosen), len(half), dtype=torch.float64)
        left[torch.arange(len(chosen)), chosen] = 1
        for _ in range(side // 2):
            left = times_matrix(left)
        right = times_matrix(left) if side % 2 else left
        total += float(count.double() @ (left * right).sum(1))
    return math.log(total)


def phi4(spent: Annealing, nodes: tuple[int, int] = NODES) -> Energy:
    """φ⁴ on 4×4 sites. The sign of each draw is random, which mixes both phases."""
    runs, x = anneal(lattice, 16, 1.0, spent)
    signs = 2.0 * torch.randint(2, (len(x), 1)) - 1
    coarse, fine = (lattice_log_z(4, count) for count in nodes)
    annealed, error = mean_of(runs)
    checks = {"annealed": annealed, "annealed_error": error, f"{nodes[0]} nodes": coarse - fine}
    return Energy(lattice, signs * x, fine, harmonics=0, checks=checks)


def without_centre(x: Tensor, shape: tuple[int, int] = (4, 2)) -> Tensor:
    """Positions (N, n · D), four particles in the plane by default, less their mean."""
    particles = x.reshape(-1, *shape)
    return (particles - particles.mean(1, keepdim=True)).reshape(x.shape)


def four_particles(x: Tensor) -> Tensor:
    """log π (N,) of DW4, a double well between each pair, at positions (N, 8)."""
    particles = x.double().reshape(-1, 4, 2)
    first, second = torch.triu_indices(4, 4, 1)
    distance = (particles[:, first] - particles[:, second]).norm(dim=-1) - 4
    return (4 * distance**2 - 0.9 * distance**4).sum(1)


def lennard_jones(x: Tensor) -> Tensor:
    """log π (N,) of LJ13: −Σ (r⁻¹² − 2 r⁻⁶) over pairs, less ½ Σ‖x_i‖², at positions (N, 39)."""
    particles = x.double().reshape(-1, 13, 3)
    first, second = torch.triu_indices(13, 13, 1)
    squares = (particles[:, first] - particles[:, second]).square().sum(-1)
    pairs = 2 * squares**-3 - squares**-6
    return pairs.sum(1) - particles.square().sum((1, 2)) / 2


def dw4(spent: Annealing) -> Energy:
    runs, x = anneal(four_particles, 8, 2.0, spent, without_centre)
    return Energy(four_particles, x, *mean_of(runs), without_centre)


def wells(spent: Annealing) -> Energy:
    """Sixteen pairs of a double well and a normal, and as many exact draws as of the others."""
    product = many_well(32)
    well, normal = product.lines[:2]

    def log_target(x: Tensor) -> Tensor:
        pairs = x.double().unflatten(1, (-1, 2))
        return (well.log_density(pairs[..., 0]) + normal.log_density(pairs[..., 1])).sum(1)

    u = torch.rand(spent.runs * spent.particles, 32, dtype=torch.float64)
    return Energy(log_target, product.quantile(u), sum(line.log_z for line in product.lines))


ENERGIES: dict[str, Callable[[Annealing], Energy]] = {
    "φ⁴, 4×4": phi4,
    "DW4": dw4,
    "many-well, d = 32": wells,
}


def two_moons(count: int) -> tuple[Tensor, Tensor]:
    """θ uniform on [−1, 1]², and x on a crescent that θ moves (Lueckmann et al. 2021, T.8)."""
    theta = 2 * torch.rand(count, 2) - 1
    angle, radius = math.pi * (torch.rand(count) - 0.5), 0.1 + 0.01 * torch.randn(count)
    along, across = theta.sum(1).abs() / 2**0.5, (theta[:, 1] - theta[:, 0]) / 2**0.5
    place = radius * angle.cos() + 0.25 - along, radius * angle.sin() + across
    return theta, torch.stack(place, 1)


def gaussian_linear(count: int) -> tuple[Tensor, Tensor]:
    """θ of N(0, 0.1 I) in ten dimensions, and x of N(θ, 0.1 I) (Lueckmann et al. 2021, T.1)."""
    theta, noise = (0.1**0.5 * torch.randn(count, 10) for _ in range(2))
    return theta, theta + noise


SIMULATORS = {"two_moons": two_moons, "gaussian_linear": gaussian_linear}


class Posed(NamedTuple):
    """An observation (k,) with the true parameters (d,) and draws of its posterior (N, d)."""

    observation: Tensor
    parameters: Tensor
    reference: Tensor


def posed(wheel: Path, task: str, number: int) -> Posed:
    """An observation of a task of sbibm, from the files of its wheel."""
    names = ("observation.csv", "true_parameters.csv", "reference_posterior_samples.csv.bz2")
    tables = []
    with zipfile.ZipFile(wheel) as files:
        for name in names:
            content = files.read(FILES.format(task=task, number=number) + name)
            text = bz2.decompress(content) if name.endswith("bz2") else content
            table = np.loadtxt(io.BytesIO(text), delimiter=",", skiprows=1, ndmin=2)
            tables.append(torch.as_tensor(table, dtype=torch.float32))
    observation, parameters, reference = tables
    return Posed(observation[0], parameters[0], reference)
