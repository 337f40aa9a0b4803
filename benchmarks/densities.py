"""Is log Z within what it claims, of energies with a known one, and are posteriors right?

    python -m benchmarks.densities [--cells REGEX] [--sbibm WHEEL] [--dirty | --smoke]

Networks learn an energy from its samples, with averaged targets alone and with the score of the
energy beside them. Then log Z is estimated twenty times, from 500 samples each: `ratio` is the
mean of the claimed standard errors over the root mean square of the true errors. torchdiffeq
follows the same networks as continuous normalising flows do, with its default tolerance, in
float64, which that needs. Its divergence is exact in up to EXACT dimensions; in more, it has one
Rademacher probe for each sample.

Posteriors are those of sbibm: a network for 10,000 simulations, and how well a classifier tells
its samples from the reference (C2ST, 0.5 is best). The files are in the wheel of sbibm (pip
download --no-deps sbibm), which is read and not installed; without it they are left out. It takes
half an hour of a core.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from docs.examples.mixture_1d import waves
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks import results
from benchmarks.density_problems import ENERGIES, SIMULATORS, Annealing, Energy, posed
from benchmarks.experiment import begin, calls_of, clocked, keep, parser, train
from benchmarks.peers.likelihoods import flow, follow, log_prior, signs, units

FILE = results.DIRECTORY / "densities.json"
RATE = 2e-3
EXACT = 8


class Size(NamedTuple):
    """How much is spent."""

    steps: int = 5000  # of training, one evaluation of the network for each of 256 samples
    batch: int = 256
    width: int = 128
    repetitions: int = 20
    samples: int = 500  # of a repetition
    solver: int = 40
    annealing: Annealing = Annealing(16, 2048, 80, 4)
    simulations: int = 10_000
    observations: int = 3
    compared: int = 10_000  # of the reference, at most


SMOKE = Size(5, 16, 8, 3, 20, 8, Annealing(2, 100, 5, 2), 100, 1, 50)


class Network(nn.Module):
    """ε̂(x, t): the exact predictor for Gaussian data, plus an MLP of three hidden layers.

    They are scaled and shifted by features of log σ̂. The conditions y (B, k) are inputs beside x,
    and so are sines and cosines of all inputs.
    """

    def __init__(
        self,
        schedule: hosm.Schedule,
        mean: Tensor,
        std: Tensor,
        width: int,
        inputs: int,
        harmonics: int = 4,
    ) -> None:
        super().__init__()
        self.schedule, self.harmonics = schedule, harmonics
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        sizes = [inputs * (1 + 2 * harmonics), *[width] * 3]
        self.layers = nn.ModuleList(nn.Linear(*shape) for shape in pairwise(sizes))
        self.levels = nn.ModuleList(nn.Linear(17, 2 * width) for _ in self.layers)
        self.last = nn.Linear(width, self.outputs(mean))

    def outputs(self, mean: Tensor) -> int:
        return len(mean)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        alpha, sigma = (part[:, None] for part in self.schedule(t))
        size = torch.sqrt((alpha * self.std).square() + sigma.square())
        standard = (x - alpha * self.mean) / size
        return sigma / size * standard + self.beside(standard, t, y)

    def beside(self, standard: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The part that is learned."""
        return self.mlp(standard if y is None else torch.cat([standard, y], 1), t)

    def mlp(self, inputs: Tensor, t: Tensor) -> Tensor:
        angles = [k * inputs for k in range(1, self.harmonics + 1)]
        hidden = torch.cat([inputs, *map(torch.sin, angles), *map(torch.cos, angles)], 1)
        features = waves(self.schedule.log_sigma_hat(t)[:, None] / 4, 8)
        for layer, level in zip(self.layers, self.levels, strict=True):
            scale, shift = level(features).chunk(2, 1)
            hidden = nn.functional.silu(layer(hidden) * (1 + scale) + shift)
        return self.last(hidden)


class PairNetwork(Network):
    """For particles in the plane: an MLP of their distances pulls at each pair along its line."""

    def outputs(self, mean: Tensor) -> int:
        particles = len(mean) // 2
        return particles * (particles - 1) // 2

    def beside(self, standard: Tensor, t: Tensor, _y: Tensor | None) -> Tensor:
        particles = standard.unflatten(1, (-1, 2))
        first, second = torch.triu_indices(particles.shape[1], particles.shape[1], 1)
        apart = particles[:, first] - particles[:, second]
        distance = apart.norm(dim=2)
        pulls = (self.mlp(distance, t) / (1 + distance))[..., None] * apart
        total = torch.zeros_like(particles).index_add(1, first, pulls)
        return total.index_add(1, second, -pulls).flatten(1)


def rows_of(data: Tensor, count: int) -> Tensor:
    return data[torch.randint(len(data), (count,))]


def estimates(samples: Sequence[hosm.Weights]) -> dict[str, Any]:
    """log Z of each repetition, its claimed error, and the mean share of effective samples."""
    return {
        "log_z": [weights.log_z for weights in samples],
        "claims": [weights.log_z_error for weights in samples],
        "effective": sum(w.effective_sample_size / len(w.x) for w in samples) / len(samples),
    }


def summary(
    log_z: Sequence[float], claims: Sequence[float], truth: float, truth_error: float
) -> dict[str, float]:
    """The claims beside the true errors; an error of the truth is added to the claims."""
    errors = torch.tensor(log_z, dtype=torch.float64) - truth
    claimed = torch.tensor(claims, dtype=torch.float64).square() + truth_error**2
    claim, error = float(claimed.sqrt().mean()), float(errors.square().mean().sqrt())
    bias_error = float(errors.std()) / math.sqrt(len(errors))
    bias = {"bias": float(errors.mean()), "bias_error": bias_error}
    return {"claim": claim, "error": error, "ratio": claim / error, **bias}


def model_of(network: nn.Module, schedule: hosm.Schedule, energy: Energy) -> hosm.ScoreModel:
    """A model in coordinates of the energy's subspace, which are x itself without one."""
    space = hosm.OnSubspace(network, energy.project, energy.data.shape[1:])
    return hosm.ScoreModel(space, schedule)


def ours(model: hosm.ScoreModel, energy: Energy, size: Size, moments: Any) -> dict[str, Any]:
    """One solve for the samples of all repetitions, with the exact divergence."""
    space: Any = model.network
    shape = (size.repetitions * size.samples, space.dimensions)
    solver = hosm.FixedGrid(size.solver, **moments)
    drawn = hosm.ode_sample(model, shape, solver=solver, divergence="exact", batch_size=1000)
    parts = range(0, shape[0], size.samples)
    weights = [
        hosm.importance_weights(
            drawn[start : start + size.samples], lambda y: energy.log_target(space.expand(y))
        )
        for start in parts
    ]
    return estimates(weights) | {"evaluations": float(drawn.nfe.double().mean())}


def by_torchdiffeq(model: hosm.ScoreModel, energy: Energy, size: Size) -> dict[str, Any]:
    """A solve for each repetition from t_max to t_min, and the plain estimate of log Z."""
    elements, schedule = energy.data.shape[1], model.schedule
    space: Any = model.network
    span = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    zero, weights = torch.zeros(size.samples, dtype=torch.float64), []
    with calls_of(space) as calls:
        for repetition in range(size.repetitions):
            x = torch.randn(size.samples, elements, dtype=torch.float64)
            latent = schedule.prior_std * space.reduce(space.project(x))
            if space.dimensions <= EXACT:
                probes = units(latent)
            else:
                probes = space.reduce(space.project(signs(x, repetition)))[None]
            end, gain = follow(partial(flow, model), latent, span, probes)
            x, log_q = space.expand(end), log_prior(model, latent) - gain
            log_weights = energy.log_target(x) - log_q
            weights.append(hosm.Weights(x, log_weights, zero, zero, energy.log_target))
    return estimates(weights) | {"evaluations": len(calls) / size.repetitions}


def of_energy(name: str, size: Size) -> dict[str, Any]:
    """log Z by each solver on a network of each kind of targets."""
    torch.manual_seed(0)
    energy = ENERGIES[name](size.annealing)
    schedule = hosm.VESchedule()
    space: Any = model_of(nn.Identity(), schedule, energy).network
    x = energy.data.float()
    data, mean, std = space.reduce(x), x.mean(0), x.std(0)
    particles = space.dimensions < len(mean)
    if particles:  # one number, as they are alike
        mean, std = 0 * mean, data.square().mean().sqrt().repeat(len(std))

    def score(y: Tensor) -> Tensor:
        return space.reduce(space.project(energy.score(space.expand(y))))

    information = hosm.TargetScores.information_of(data, score(data), matrix=True)
    moments = {"data_mean": data.mean(0), "data_std": data.std(0)}
    averaged = hosm.AveragedTargets()
    scores = hosm.TargetScores(score, information, averaged)
    truth = {"log_z": energy.log_z, "log_z_error": energy.log_z_error}
    found: dict[str, Any] = truth | {"checks": energy.checks or {}, "rows": {}}
    for variant, targets in {"averaged": averaged, "averaged, scores": scores}.items():
        torch.manual_seed(1)
        kind, inputs = (PairNetwork, 6) if particles else (Network, len(mean))
        network = kind(schedule, mean, std, size.width, inputs, energy.harmonics)
        model = model_of(network, schedule, energy)
        objective = hosm.FirstOrderDSM(model, targets=targets)

        def loss(objective=objective) -> Tensor:
            return objective(rows_of(data, size.batch))

        train(network, loss, size.steps, f"{name}, {variant}", rate=RATE)
        solvers: dict[str, Callable[[], dict[str, Any]]] = {
            "ours": partial(ours, model, energy, size, moments)
        }
        if results.installed("torchdiffeq"):
            solvers["torchdiffeq"] = lambda model=model: by_torchdiffeq(
                model.double(), energy, size
            )
        rows = found["rows"][variant] = {}
        for solver, solve in solvers.items():
            row, time = clocked(solve)
            rows[solver] = row | summary(row["log_z"], row["claims"], *truth.values())
            rows[solver]["sampling"] = time  # seconds of a core
    return found


def c2st(reference: Tensor, samples: Tensor) -> float:
    """How often a classifier is right about which sample is which, in five-fold cross-validation.

    As in sbibm: an MLP of two hidden layers of 10 d units, on data that are standardized by the
    mean and standard deviation of the reference.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    both = (torch.cat([reference, samples]) - reference.mean(0)) / reference.std(0)
    label = torch.cat([torch.zeros(len(reference)), torch.ones(len(samples))])
    units = 10 * reference.shape[1]
    classifier = MLPClassifier((units, units), max_iter=10_000, random_state=1)
    folds = KFold(5, shuffle=True, random_state=1)
    return float(cross_val_score(classifier, both.numpy(), label.numpy(), cv=folds).mean())


def of_posterior(task: str, size: Size, wheel: Path) -> dict[str, Any]:
    """C2ST for the first observations, and log q of their true parameters in nats."""
    torch.manual_seed(0)
    theta, y = SIMULATORS[task](size.simulations)
    low, spread = y.mean(0), y.std(0)
    schedule = hosm.VESchedule(sigma_min=0.003, sigma_max=10.0)
    inputs = theta.shape[1] + y.shape[1]
    network = Network(schedule, theta.mean(0), theta.std(0), size.width, inputs)
    model = hosm.ScoreModel(network, schedule)
    objective = hosm.FirstOrderDSM(model)

    def loss() -> Tensor:
        rows = torch.randint(len(theta), (size.batch,))
        return objective(theta[rows], model_kwargs={"y": (y[rows] - low) / spread})

    train(network, loss, size.steps, task, rate=RATE)
    solver = hosm.FixedGrid(size.solver, data_mean=theta.mean(0), data_std=theta.std(0))
    found: dict[str, Any] = {"observations": {}}
    for number in range(1, size.observations + 1):
        observation, parameters, reference = posed(wheel, task, number)
        condition = {"y": (observation - low) / spread}
        q = hosm.ODEDistribution(model, theta.shape[1:], solver=solver, model_kwargs=condition)
        reference = reference[: size.compared]
        with torch.no_grad():
            samples, log_q = q.sample((len(reference),)), float(q.log_prob(parameters))
        row = {"c2st": c2st(reference, samples), "log_q": log_q, "samples": len(samples)}
        found["observations"][f"{number}"] = row
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cells", default="", metavar="REGEX", help="problems; default: all")
    arguments.add_argument("--sbibm", type=Path, metavar="WHEEL", help="for the posteriors")
    options, where = begin(arguments)
    size = SMOKE if options.smoke else Size()
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(of_energy, name, size) for name in ENERGIES
    }
    if options.sbibm:
        for task in SIMULATORS:
            cells[task] = partial(of_posterior, task, size, options.sbibm)
    for name, measure in cells.items():
        if re.search(options.cells, name):
            found = measure()
            results.show(name, found.get("rows") or found["observations"])
            keep(options, FILE, {name: {"environment": where, "found": found}})


if __name__ == "__main__":
    main()
