"""What are forces worth in training on a molecule and on clusters of particles?

    python -m benchmarks.molecule [--problems REGEX] [--out DIR] [--dirty | --smoke]
    python -m benchmarks.molecule --checks [--out DIR] [--dirty]
    python -m benchmarks.molecule --tutorial [--dirty]

Order one trains an equivariant network with the drawn noise, with averaged targets, and with known
scores, whose information is a matrix. Quiet batches are pairs of opposite noises at learnt times;
`times` are learnt times alone. Rows take equal processor time, counted in steps by the ratio of
their times, which is measured first. All rows of a problem have one rate and three seeds. With
--checks: what the checks of scores say of alanine dipeptide at 300 K and 800 K.

J is ½ ∫ E‖e − ε̂‖² du over u = log σ̂, for the targets e of the matrix at held-out data and noises
that never change. That is the error of the score plus a number that all rows share, so only its
differences count. The NLL is that of held-out data by the ODE, whose divergence is exact. Both
leave out log 2, by which an O(3)-equivariant network is worse on a molecule with a mirror image.

The molecule is alanine dipeptide at 800 K, by OpenMM. DW4 and LJ13 are four particles in the plane
and thirteen in space; their data and log Z are of annealing. Each row is kept for each seed in
results/molecule at once, and a second run goes on where the first one stopped. Four hours of a
core; data are kept in --out.
"""

import contextlib
import io
import math
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from docs import pictures
from docs.examples.equivariant import PairNetwork
from matplotlib import pyplot, style
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import results
from benchmarks.density_problems import (
    Annealing,
    LogTarget,
    anneal,
    four_particles,
    lennard_jones,
    mean_of,
    slope,
    without_centre,
)
from benchmarks.experiment import Row, begin, clocked, parser, seeded, times, training
from benchmarks.intervals import over_seeds

DIRECTORY = results.DIRECTORY / "molecule"
RUNS = 32  # of consecutive frames, for a standard error
FRAMES = 20_000
BATCH, EVERY, SEEDS, LEVELS = 64, 50, 3, 16


class Size(NamedTuple):
    """How much is spent."""

    steps: int  # of plain order one
    width: int = 48
    depth: int = 2
    rate: float = 5e-3
    nll: int = 96  # held-out data
    samples: int = 256
    solver: int = 32
    smoke: bool = False


@dataclass(frozen=True)
class Problem:
    """Data (N, n, D) without their centre of mass, in random orientations, and their scores.

    The forces on all particles sum to zero, so the scores lie on the subspace.
    """

    size: Size
    schedule: hosm.VESchedule
    types: Tensor
    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    log_target: Callable[[Tensor], Tensor] | None = None
    log_z: tuple[float, float] | None = None

    @cached_property
    def space(self) -> hosm.OnSubspace:
        return self.on_subspace(torch.nn.Identity())

    def on_subspace(self, network: torch.nn.Module) -> hosm.OnSubspace:
        def without_centre(x: Tensor) -> Tensor:
            return x - x.mean(1, keepdim=True)

        return hosm.OnSubspace(network, without_centre, self.train[0].shape[1:])

    def reduced(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, scores = map(self.space.reduce, pair)
        return x.float(), scores.float()

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.reduced(self.train)

    @cached_property
    def information(self) -> Tensor:
        return hosm.TargetScores.information_of(*self.data, matrix=True)


class Trainer:
    """A network of one seed, and the steps of a row that train it."""

    def __init__(self, problem: Problem, row: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        size, self.problem, self.row = problem.size, problem, row
        data = problem.train[0]
        network = PairNetwork(problem.schedule, data, problem.types, size.width, size.depth)
        self.model = hosm.ScoreModel(problem.on_subspace(network), problem.schedule)
        self.pairs = "quiet" in row
        self.sampler = hosm.AdaptiveTimes() if self.pairs or "times" in row else None
        options = {"antithetic": self.pairs, "time_sampler": self.sampler}
        self.objective = hosm.FirstOrderDSM(self.model, **options)

    def loss(self) -> Tensor:
        """That of one batch; it has as many rows in every row."""
        y, _ = self.problem.data
        rows = torch.randint(len(y), (BATCH // 2 if self.pairs else BATCH,))
        return self.objective(y[rows], targets=self.targets(rows))

    def learn(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the times, where they are learnt."""
        if self.sampler is None:
            return
        y, _ = self.problem.data
        rows = torch.randint(len(y), (BATCH,))
        self.sampler.learn(self.objective, y[rows], optimizer, targets=self.targets(rows))

    def targets(self, rows: Tensor) -> hosm.AveragedTargets | hosm.TargetScores | None:
        _, scores = self.problem.data
        if "averaged" in self.row:
            return hosm.AveragedTargets()
        if "matrix" in self.row:
            return hosm.TargetScores(scores[rows], self.problem.information)
        return None

    def train(self, steps: int, bar: str) -> None:
        every = training(self.model, self.loss, steps, self.problem.size.rate)
        for step, optimizer in enumerate(tqdm(every, bar, steps, leave=False, mininterval=30), 1):
            if step % EVERY == 0 and step < steps:
                self.learn(optimizer)


def costs(problem: Problem, rows: Sequence[str], rounds: int) -> Row:
    """Milliseconds of a step of plain order one, and each row's steps in units of it, in turns.

    The learning of times is spread over its steps.
    """
    routes: dict[str, Callable[[], object]] = {}
    for row in rows:
        trainer = Trainer(problem, row)
        optimizer = torch.optim.Adam(trainer.model.parameters())

        def step(trainer=trainer, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            trainer.loss().backward()
            optimizer.step()

        routes[row] = step
        if trainer.pairs:
            routes["learn"] = partial(trainer.learn, optimizer)
    times(routes, 2)
    medians = {row: float(np.median(spent)) for row, spent in times(routes, rounds).items()}
    learn, plain = medians.pop("learn"), medians["plain"]
    for row in medians:
        if "times" in row or "quiet" in row:
            medians[row] += learn / EVERY
    found = {row: spent / plain for row, spent in medians.items()}
    return {"ms": 1e3 * plain, "steps": found, "learn": learn / plain}


@torch.no_grad()
def integrated_error(problem: Problem, model: hosm.ScoreModel) -> float:
    """J in nats, up to a number that depends on the problem alone."""
    generator = seeded(5)
    y, scores = problem.reduced(problem.held)
    targets = hosm.TargetScores(scores, problem.information)
    low, high = problem.schedule.log_sigma_hat_range
    total = 0.0
    for level in range(LEVELS):
        u = (level + torch.rand(len(y), generator=generator)) / LEVELS
        t = problem.schedule.time(low + (high - low) * u)
        sigma, noise = problem.schedule.sigma(t), torch.randn(y.shape, generator=generator)
        e = noise + targets.posterior(y, noise, torch.ones_like(sigma), sigma, {}).mean
        x = y + sigma[:, None] * noise
        pairs = zip(x.split(256), t.split(256), strict=True)
        off = e.float() - torch.cat([model.network(*pair) for pair in pairs])
        total += float(off.square().sum(1).double().mean())
    return total * (high - low) / (2 * LEVELS)


def judge(problem: Problem, model: hosm.ScoreModel) -> Row:
    """J, the NLL of held-out data, and how far samples are worth draws of the energy."""
    size, (y, _) = problem.size, problem.reduced(problem.held)
    solver = hosm.FixedGrid(size.solver, data_std=float(y.std()))
    options: Row = {"solver": solver, "divergence": "exact", "batch_size": 64}
    found: Row = {"J": integrated_error(problem, model)}
    if size.nll:
        found["nll"] = float(hosm.ode_nll(model, y[: size.nll], **options).nll.mean())
    target = problem.log_target
    if size.samples and target is not None:
        drawn = hosm.ode_sample(model, (size.samples, y.shape[1]), **options)
        weights = hosm.importance_weights(drawn, lambda y: target(problem.space.expand(y)))
        found["effective"] = weights.effective_sample_size / size.samples
        found |= {"log_z": weights.log_z, "interval": [*weights.log_z_interval]}
    return found


def measure(problem: Problem, row: str, seed: int, steps: int) -> Row:
    """A network of one seed after so many steps."""
    trainer = Trainer(problem, row, seed)
    trainer.train(steps, f"{row}, seed {seed}")
    return {"steps": steps} | judge(problem, trainer.model.requires_grad_(False))


def turned(pair: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Positions and scores (N, n, D), each sample in a random orientation."""
    x, scores = pair
    shape = (len(x), x.shape[2], x.shape[2])
    normal = torch.randn(shape, generator=seeded(seed), dtype=x.dtype)
    square, triangle = torch.linalg.qr(normal)
    square = square * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]
    square[:, :, 0] *= torch.linalg.det(square).sign()[:, None]
    return x @ square, scores @ square


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; what is made, once, where there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file)
    return torch.load(file, weights_only=True)


def frames(out: Path, kelvin: float, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions and scores of alanine dipeptide, kept in `out`."""
    from docs.examples.alanine import Alanine

    file = out / f"alanine_{kelvin:g}_K_{count}_{seed}.pt"
    return kept(file, lambda: Alanine(kelvin, seed).simulate(count))


def alanine(size: Size, out: Path) -> Problem:
    counts = (300, 64) if size.smoke else (FRAMES, 4_000)
    parts = [frames(out, 800.0, count, seed) for seed, count in enumerate(counts)]
    train, held = (turned(part, seed) for seed, part in enumerate(parts))
    schedule = hosm.VESchedule(sigma_min=0.01, sigma_max=30.0)
    return Problem(size, schedule, torch.arange(22), train, held)


def cluster(
    log_target: LogTarget, shape: tuple[int, int], count: int, std: float, size: Size, out: Path
) -> Problem:
    """Particles that are all alike, 16 · count draws of annealing from N(0, std²)."""
    spent = Annealing(2, 200, 8, 2) if size.smoke else Annealing(16, count, 80, 4)
    project = partial(without_centre, shape=shape)

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return anneal(log_target, math.prod(shape), std, spent, project)

    runs, x = kept(out / f"{log_target.__name__}_{spent.particles}.pt", run)
    order = torch.randperm(len(x), generator=seeded(0))
    scores = slope(log_target, x)
    both = turned(tuple(part[order].reshape(-1, *shape) for part in (x, scores)), 0)
    held = len(x) // 8
    parts = [tuple(part[rows] for part in both) for rows in (slice(held, None), slice(held))]
    return Problem(
        size,
        hosm.VESchedule(sigma_min=0.01, sigma_max=30.0),
        torch.zeros(shape[0], dtype=torch.long),
        *parts,
        lambda x: log_target(x.flatten(1)),
        mean_of(runs),
    )


LARGE = ("plain", "matrix", "matrix, quiet")
CLUSTERS = (*LARGE, "averaged")
ROWS = (*CLUSTERS, "matrix, times")
Make = Callable[[Path, bool], Problem]
PROBLEMS: dict[str, tuple[Make, Sequence[str]]] = {
    "alanine, 800 K": (
        lambda out, smoke: alanine(Size(1500, nll=48, samples=0, smoke=smoke), out),
        ROWS,
    ),
    "alanine, 800 K, large network": (
        lambda out, smoke: alanine(Size(1500, 112, 3, 2e-3, nll=48, samples=0, smoke=smoke), out),
        LARGE,
    ),
    "DW4": (
        lambda out, smoke: cluster(
            four_particles, (4, 2), 2048, 2.0, Size(4000, nll=512, samples=1024, smoke=smoke), out
        ),
        CLUSTERS,
    ),
    "LJ13": (
        lambda out, smoke: cluster(
            lennard_jones, (13, 3), 512, 1.0, Size(2000, nll=96, samples=256, smoke=smoke), out
        ),
        CLUSTERS,
    ),
}


def over_plain(report: Row) -> Row:
    """J and NLL of each row less those of plain order one, over seeds, and what samples gave."""
    cost = report["cost"]
    measured = {row: each for row, each in report.items() if row != "cost"}
    seeds = {
        row: {seed: each for seed, each in found.items() if seed.isdigit()}
        for row, found in measured.items()
    }
    found: Row = {"ms": cost["ms"], "rows": {}}
    for row, every in seeds.items():
        entry: Row = {"time": cost["steps"][row]}
        entry["steps"] = max(each["steps"] for each in every.values())
        for key in ("J", "nll"):
            less = [
                each.get(key, math.nan) - seeds["plain"][seed].get(key, math.nan)
                for seed, each in every.items()
            ]
            if row != "plain" and len(less) > 1 and all(map(math.isfinite, less)):
                entry[key] = [*over_seeds([[each] for each in less])]
        if "log_z" in next(iter(every.values())):
            truth = cost["log_z"][0]
            held = [low <= truth <= high for low, high in (e["interval"] for e in every.values())]
            entry["held"] = f"{sum(held)} of {len(held)}"
            for key in ("effective", "log_z"):
                values = [each[key] for each in every.values()]
                entry[key] = [float(np.mean(values)), min(values), max(values)]
        found["rows"][row] = entry
    return found


def checks(x: Tensor, g: Tensor) -> Row:
    """Means, with their standard errors, that tell whether scores are those of the data.

    Of −(x − x̄)·g, and over stiff pairs for a temperature that is 6% too high.
    """
    runs = torch.stack(
        [
            -((own - x.mean(0)) * scores).sum((1, 2)).mean()
            for own, scores in zip(x.tensor_split(RUNS), g.tensor_split(RUNS), strict=True)
        ]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hosm.TargetScores.information_of(x, g / 1.06, matrix=True, particles=x.shape[1])
    (found,) = re.findall(r"got (\S+) ± ([^;\s]+)\. Check", str(caught[-1].message))
    dimension = [float(runs.mean()), float(runs.std()) / math.sqrt(RUNS)]
    return {"dimension": dimension, "pairs": [*map(float, found)]}


def found_in(directory: Path) -> Row:
    """Every problem that has been measured."""
    reports = {name: results.read(directory / f"{results.slug(name)}.json") for name in PROBLEMS}
    found = {name: over_plain(report) for name, report in reports.items() if report}
    return found | {"checks": results.read(directory / "checks.json")}


def run_tutorial(where: Row) -> None:
    """Keep what the tutorial prints in a full run, its pictures, and its time."""
    script, images = results.ROOT / "docs/tutorials/molecule.py", results.ROOT / "docs/images"
    printed = io.StringIO()
    with (
        TemporaryDirectory() as directory,
        contextlib.chdir(directory),
        contextlib.redirect_stdout(printed),
        patch.object(sys, "argv", [str(script)]),
        style.context(pictures.STYLE),
    ):
        _, seconds = clocked(partial(runpy.run_path, str(script), run_name="__main__"))
        for number, name in zip(pyplot.get_fignums(), ("samples", "noise"), strict=True):
            pictures.save(pyplot.figure(number), images / f"molecule_{name}.svg")
    script.with_suffix(".txt").write_text(printed.getvalue(), encoding="utf-8")
    found = {"environment": where, "minutes": seconds / 60}
    results.write(DIRECTORY / "tutorial.json", {"tutorial": found})


class Study(NamedTuple):
    """The rows of a problem, in a file, each with the environment in which it was made."""

    name: str
    file: Path
    where: Row

    def question(self, row: str) -> Row:
        return results.read(self.file).get(row, {})

    def keep(self, row: str, found: Row) -> None:
        print(self.name, row, results.rounded(found), flush=True)
        results.keep(self.file, {row: {"environment": self.where} | self.question(row) | found})

    def run(self, problem: Problem, rows: Sequence[str], seeds: int, rounds: int) -> None:
        if not self.question("cost"):
            facts = {"log_z": problem.log_z, "data": len(problem.train[0])}
            self.keep("cost", costs(problem, rows, rounds) | facts)
        cost = self.question("cost")["steps"]
        for seed in map(str, range(seeds)):
            for row in rows:
                if seed not in self.question(row):
                    steps = round(problem.size.steps / cost[row])
                    self.keep(row, {seed: measure(problem, row, int(seed), steps)})


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--problems", default="", metavar="REGEX", help="default: all")
    arguments.add_argument("--out", type=Path, default=Path("molecule_out"), help="for data")
    arguments.add_argument("--checks", action="store_true", help="of scores alone")
    arguments.add_argument("--tutorial", action="store_true", help="run that alone, in full")
    options, where = begin(arguments)
    if options.tutorial:
        run_tutorial(where)
        return
    if options.checks:
        for kelvin in (300.0, 800.0):
            found = checks(*frames(options.out, kelvin, FRAMES))
            results.keep(
                DIRECTORY / "checks.json", {f"{kelvin:g} K": {"environment": where} | found}
            )
        return
    directory = options.out if options.smoke else DIRECTORY
    for name, (make, rows) in PROBLEMS.items():
        if not re.search(options.problems, name):
            continue
        problem = make(options.out, options.smoke)
        if options.smoke:
            size = problem.size
            few = {"nll": min(size.nll, 4), "samples": min(size.samples, 8)}
            problem = replace(problem, size=size._replace(steps=3, width=8, solver=4, **few))
        study = Study(name, directory / f"{results.slug(name)}.json", where)
        study.run(problem, rows, 1 if options.smoke else SEEDS, 2 if options.smoke else 30)


if __name__ == "__main__":
    main()
