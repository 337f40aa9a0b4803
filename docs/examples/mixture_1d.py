"""A 1-D mixture learned by score matching of orders one to three, judged by exact likelihood.

What it shows:
    The density that a diffusion model gives data is that of its probability-flow ODE. A small
    score-matching loss does not suffice to make that density a good one. Here a small network is
    trained with each of the three orders, on the mixture of three Gaussians of Lu et al. (ICML
    2022, arXiv 2206.08265). In one dimension KL(q || p_ODE) is an integral over a grid, without
    sampling error. q is the mixture at t_min, very nearly the data.

    "averaged" is targets=AveragedTargets(): the batch takes the noise of the data out of the
    targets. docs/worth.md compares the losses on more problems and by the score as well, and
    recommends order three. Here, at equal cost, order two has the smaller KL divergence.

How the orders are compared:
    equal steps   N steps each, from the same initial network, with the same data, times and noise.
    equal cost    the processor time that order three needs for its N steps. The others take more
                  steps, as their steps are cheaper, under a cosine decay of that length. Order
                  three's run is the one above. The cost of a step is measured in the same run, so
                  these numbers of steps differ a little every time.

How to run, on two cores for two to five minutes (pip install "hosm-losses[examples]"):
    python docs/examples/mixture_1d.py [--schedule vp] [--steps 1500] [--seed 0] [--out DIR]
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import hosm_losses as hosm

SCHEDULES: dict[str, hosm.Schedule] = {"vp": hosm.VPSchedule(), "ve": hosm.VESchedule()}
MEANS = torch.tensor([-2 / 7, -6 / 7, 4 / 7], dtype=torch.float64)
VARIANCES = torch.tensor([0.1 / 49, 0.1 / 49, 1 / 49], dtype=torch.float64)
FRACTIONS = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
DATA_MEAN = float(FRACTIONS @ MEANS)
DATA_STD = math.sqrt(float(FRACTIONS @ (VARIANCES + MEANS.square())) - DATA_MEAN**2)
GRID = torch.linspace(-1.25, 1.55, 801, dtype=torch.float64)
BATCH, WIDTH, TIMED_STEPS = 512, 128, 40
# The paper's weights. In one dimension "exact" costs what one random probe costs. It draws no
# number, so that every order sees the same noise.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "1": hosm.first_order_dsm,
    "2": partial(hosm.second_order_dsm, weights=(1, 0.5, 0), probes="exact"),
    "3": partial(hosm.third_order_dsm, weights=(1, 0.5, 0, 0.1), probes="exact"),
}
AVERAGED = hosm.AveragedTargets()
LOSSES |= {f"{order} averaged": partial(LOSSES[order], targets=AVERAGED) for order in "123"}
SHOWN = ("1", "1 averaged", "2 averaged", "3 averaged")


def waves(value: Tensor, count: int) -> Tensor:
    """Features of value (B, 1): itself, and sine and cosine at frequencies 1 to `count`."""
    angles = value * torch.arange(1, count + 1)
    return torch.cat([value, angles.sin(), angles.cos()], dim=1)


class Network(nn.Module):
    """An MLP for ε̂(x, t) whose every hidden layer is scaled and shifted by features of log σ̂.

    A mixture's detail lies at small noise: a tiny part of the range of t, a wide one of log σ̂.
    """

    def __init__(self, schedule: hosm.Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.layers = nn.ModuleList(nn.Linear(inputs, WIDTH) for inputs in (9, WIDTH, WIDTH))
        self.times = nn.ModuleList(nn.Linear(17, 2 * WIDTH) for _ in self.layers)
        self.output = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x (B, 1) at t (B,)."""
        alpha, sigma = self.schedule(t[:, None])
        std = torch.sqrt((alpha * DATA_STD).square() + sigma.square())
        standard = (x - alpha * DATA_MEAN) / std
        time_features = waves(self.schedule.log_sigma_hat(t)[:, None] / 4, 8)
        hidden = waves(standard, 4)
        for layer, time_layer in zip(self.layers, self.times, strict=True):
            scale, shift = time_layer(time_features).chunk(2, dim=1)
            hidden = nn.functional.silu(layer(hidden) * (1 + scale) + shift)
        # The first part is exact for Gaussian data. The network adds the rest.
        return sigma / std * standard + self.output(hidden)


class Job(NamedTuple):
    """A training; `cost` is how far one of its steps moves the progress bar."""

    schedule: str
    loss: str
    steps: int
    seed: int
    cost: float = 1.0


class Outcome(NamedTuple):
    """KL(q || p_ODE) in nats, processor seconds of training, and log p_ODE on GRID."""

    kl: float
    seconds: float
    log_density: np.ndarray


def draw_data(generator: torch.Generator) -> Tensor:
    """Draw a batch of the mixture, (BATCH, 1)."""
    component = torch.multinomial(FRACTIONS, BATCH, True, generator=generator)
    normal = torch.randn(BATCH, dtype=torch.float64, generator=generator)
    return (MEANS[component] + VARIANCES[component].sqrt() * normal).float()[:, None]


def true_density(schedule: hosm.Schedule) -> tuple[Tensor, Tensor]:
    """Log-density of the mixture at t_min, and its derivative, on GRID."""
    alpha, sigma = schedule(torch.tensor(schedule.t_min, dtype=torch.float64))
    variances = alpha.square() * VARIANCES + sigma.square()
    offsets = GRID[:, None] - alpha * MEANS
    squares = offsets.square() / variances + torch.log(2 * math.pi * variances)
    joint = FRACTIONS.log() - 0.5 * squares
    return joint.logsumexp(1), -(joint.softmax(1) * offsets / variances).sum(1)


def new_model(job: Job) -> hosm.ScoreModel:
    """Return the network of the job's seed, the same for every loss."""
    torch.manual_seed(job.seed)
    schedule = SCHEDULES[job.schedule]
    return hosm.ScoreModel(Network(schedule), schedule)


def training(model: hosm.ScoreModel, job: Job, rate: float = 3e-3) -> Iterator[None]:
    """Take an optimizer step each time it is advanced."""
    generator = torch.Generator().manual_seed(job.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    for _ in range(job.steps):
        x = draw_data(generator)
        loss = LOSSES[job.loss](model, x, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        yield


def start_process(counter: Any) -> None:
    """Prepare a process; `counter` is shared between all of them."""
    global progress
    progress = counter
    torch.set_num_threads(1)


def measure(schedule: str) -> list[float]:
    """Median processor seconds of a step of each loss that is shown; they take turns."""
    jobs = [Job(schedule, loss, TIMED_STEPS, seed=0) for loss in SHOWN]
    trainings = [training(new_model(job), job) for job in jobs]
    rounds = []
    for _ in range(TIMED_STEPS):
        ticks = [time.process_time()]
        for steps in trainings:
            next(steps)
            ticks.append(time.process_time())
        rounds.append(np.diff(ticks))
    return np.median(rounds, axis=0).tolist()


def exact_kl(model: hosm.ScoreModel) -> tuple[float, Tensor]:
    """Return KL(q || p_ODE) in nats, NaN where the ODE could not be solved, and log p_ODE."""
    # Tighter than the default: the KL is then right to about 1e-5 nats.
    solver = hosm.Adaptive(1e-4, data_mean=DATA_MEAN, data_std=DATA_STD)
    result = hosm.ode_nll(model, GRID.float()[:, None], solver=solver, divergence="exact")
    log_density, _ = true_density(model.schedule)
    kl = torch.trapezoid(log_density.exp() * (log_density + result.nll), GRID)
    return math.nan if result.failed.any() else float(kl), -result.nll


def train(job: Job) -> Outcome:
    """Train a network, then find the density that its ODE gives every point of GRID."""
    model, start = new_model(job), time.process_time()
    for _ in training(model, job):
        with progress.get_lock():
            progress.value += job.cost
    seconds = time.process_time() - start
    kl, log_density = exact_kl(model)
    if math.isnan(kl):
        raise RuntimeError(f"{job}: the ODE could not be solved from every point.")
    return Outcome(kl, seconds, log_density.numpy())


def run_all(
    schedule: str, steps: int, seed: int
) -> tuple[list[float], dict[str, list[Job]], dict[Job, Outcome]]:
    """Time the steps, then train in two processes; return step times, jobs and outcomes."""
    context = get_context("spawn")
    counter = context.Value("d", 0.0)
    with ProcessPoolExecutor(2, context, start_process, (counter,)) as pool:
        # Two at a time, because the trainings will share the machine in this way.
        costs = np.mean(list(pool.map(measure, [schedule] * 2)), axis=0).tolist()
        jobs = {"equal_steps": [], "equal_cost": []}
        for loss, cost in zip(SHOWN, costs, strict=True):
            jobs["equal_steps"].append(Job(schedule, loss, steps, seed, cost))
            more = round(steps * costs[-1] / cost)
            jobs["equal_cost"].append(Job(schedule, loss, more, seed, cost))
        # The longest first, so that both processes end at about the same time.
        distinct = {*jobs["equal_steps"], *jobs["equal_cost"]}
        queue = sorted(distinct, key=lambda job: (-job.steps * job.cost, job.loss))
        running = {job: pool.submit(train, job) for job in queue}
        pending = set(running.values())
        form = "training {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=sum(job.steps * job.cost for job in distinct), bar_format=form) as bar:
            while pending:
                _, pending = wait(pending, timeout=1)
                # The sum of all parts may be more than the total, by rounding.
                bar.update(min(counter.value, bar.total) - bar.n)
    return costs, jobs, {job: future.result() for job, future in running.items()}


def panels(*shape: int, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    """A figure as wide as a page, and its panels, in the style of the pages if it is at hand."""
    style.use([*Path(__file__).parent.glob("style.mplstyle")])
    figure = Figure((9.3, height), layout="constrained")
    return figure, figure.subplots(*shape, **shared)


def save(figure: Figure, verdict: str, path: Path) -> None:
    """Write a figure under its verdict."""
    figure.suptitle(verdict)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw(jobs: list[Job], outcomes: dict[Job, Outcome], path: Path) -> None:
    """Draw densities and scores: in grey the true ones, in colour those of the ODEs."""
    first, last = jobs[0], jobs[-1]
    log_density, score = true_density(SCHEDULES[first.schedule])
    figure, all_axes = panels(2, len(jobs), height=4.6, sharex=True, sharey="row")
    truth: dict[str, Any] = {"color": "C5", "alpha": 0.5, "linewidth": 5}
    for job, (upper, lower) in zip(jobs, all_axes.T, strict=True):
        kl, _, ode = outcomes[job]
        upper.plot(GRID, log_density.exp(), **truth)
        upper.plot(GRID, np.exp(ode), "C1")
        upper.set(title=f"order {job.loss}\nKL {kl:.5f} nats")
        lower.plot(GRID, score, **truth)
        lower.plot(GRID, np.gradient(ode, GRID.numpy()), "C1")
        lower.set(xlabel="x", xlim=(-1.1, 1.1), ylim=(-90, 90))
    all_axes[0, 0].set(ylabel="density p(x)")
    all_axes[1, 0].set(ylabel="score d log p/dx")
    all_axes[0, 0].text(1, 2.6, "mixture", color="C5", ha="right")
    all_axes[0, 0].text(1, 2.1, "ODE", color="C1", ha="right")
    left = outcomes[last].kl / outcomes[first].kl
    verdict = (
        f"After {first.steps} steps each, order {last.loss} has {left:.0%} of order "
        f"{first.loss}'s KL divergence ({first.schedule.upper()})"
    )
    save(figure, verdict, path)


def main() -> None:
    """Read the options, train, print the tables and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="N, the steps at equal steps")
    parser.add_argument("--schedule", choices=SCHEDULES, default="ve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mixture_1d_out"))
    options = parser.parse_args()
    start = time.perf_counter()
    costs, jobs, outcomes = run_all(options.schedule, options.steps, options.seed)
    log_density, _ = true_density(SCHEDULES[options.schedule])
    entropy = -float(torch.trapezoid(log_density.exp() * log_density, GRID))
    report: dict[str, Any] = {"entropy": entropy, "seconds": {}, "steps": {}}
    print(f"\nStep time, order 1: {1000 * costs[0]:.1f} ms", end="")
    for loss, cost in zip(SHOWN[1:], costs[1:], strict=True):
        print(f"; of order {loss}: {cost / costs[0]:.2f} times", end="")
    print(f"\nEntropy of q: {entropy:.4f} nats; NLL = KL + entropy")
    for kind, of_kind in jobs.items():
        print(f"\n{kind.replace('_', ' ')}")
        print("order        steps  seconds   KL [nats]  NLL [nats]  NLL [bits/dim]")
        for job in of_kind:
            kl, nll = outcomes[job].kl, outcomes[job].kl + entropy
            print(f"{job.loss:10}{job.steps:8}{outcomes[job].seconds:9.1f}", end="")
            print(f"{kl:12.5f}{nll:12.5f}{nll / math.log(2):16.5f}")
        report[kind] = {job.loss: outcomes[job].kl for job in of_kind}
        report["seconds"][kind] = {job.loss: outcomes[job].seconds for job in of_kind}
        report["steps"][kind] = {job.loss: job.steps for job in of_kind}
    report["seconds"]["total"] = time.perf_counter() - start
    report |= {"schedule": options.schedule, "seed": options.seed, "step_seconds": costs}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(jobs["equal_steps"], outcomes, options.out / f"mixture_1d_{options.schedule}.svg")
    print(f"\nFigure and results.json are in {options.out}; {report['seconds']['total']:.0f} s.")


if __name__ == "__main__":
    main()
