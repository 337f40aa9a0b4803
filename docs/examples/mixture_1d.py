"""A 1-D mixture learned by score matching of orders one to three, judged by exact likelihood.

What it shows:
    A diffusion model defines a density of the data through its probability-flow ODE. A small
    score-matching loss does not guarantee that this density is right. Here, a small network is
    trained with each of the three orders on the mixture of three Gaussians of Lu et al. (ICML
    2022, arXiv 2206.08265). In one dimension, KL(q || p_ODE) is integrated over a grid, without
    sampling error. q is the mixture at t_min, which is very close to the data. The error of the
    ODE's score is the root mean square of d/dx log p_ODE - d/dx log q under q, divided by the root
    mean square of d/dx log q.

    "averaged" means targets=AveragedTargets(), which averages the targets over the batch to reduce
    their noise. docs/worth.md compares the losses on more problems.

How the orders are compared:
    The orders are compared at equal cost: each uses as many evaluations of the network as order
    three uses in N steps. A sample costs 3 evaluations at order one, 6 at order two and 12 at
    order three; a backward pass counts as two. So order one takes 4 N steps and order two takes
    2 N steps, each with a cosine decay of that length. The table shows the processor time, to
    which Python contributes noticeably because the network is small.

How to run, which takes two to five minutes on two cores (pip install "hosm-losses[examples]"):
    python docs/examples/mixture_1d.py [--schedule vp] [--steps 1500] [--seed 0] [--out DIR]
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
BATCH, WIDTH = 512, 128
# The paper's weights. In one dimension, "exact" costs as much as one random probe. "exact" draws
# no random numbers, so every order sees the same noise.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "1": hosm.first_order_dsm,
    "2": partial(hosm.second_order_dsm, weights=(1, 0.5, 0), probes="exact"),
    "3": partial(hosm.third_order_dsm, weights=(1, 0.5, 0, 0.1), probes="exact"),
}
AVERAGED = hosm.AveragedTargets()
LOSSES |= {f"{order} averaged": partial(LOSSES[order], targets=AVERAGED) for order in "123"}
EVALUATIONS = {"1": 3, "1 averaged": 3, "2 averaged": 6, "3 averaged": 12}  # per sample, step


def waves(value: Tensor, count: int) -> Tensor:
    """Return `value` (B, 1) with its sines and cosines at frequencies 1 to `count`."""
    angles = value * torch.arange(1, count + 1)
    return torch.cat([value, angles.sin(), angles.cos()], dim=1)


class Network(nn.Module):
    """An MLP for ε̂(x, t) with hidden layers scaled and shifted by features of log σ̂.

    The details of a mixture matter at low noise levels, which are a tiny part of the range of t
    but a large part of the range of log σ̂.
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
        # The first term is exact for Gaussian data; the network adds a correction.
        return sigma / std * standard + self.output(hidden)


class Job(NamedTuple):
    """One training run."""

    schedule: str
    loss: str
    steps: int
    seed: int


class Outcome(NamedTuple):
    """KL(q || p_ODE) in nats, the score error, seconds, and log p_ODE and its score on GRID."""

    kl: float
    score_error: float
    seconds: float
    log_density: np.ndarray
    score: np.ndarray


def draw_data(generator: torch.Generator) -> Tensor:
    """Draw a batch from the mixture, (BATCH, 1)."""
    component = torch.multinomial(FRACTIONS, BATCH, True, generator=generator)
    normal = torch.randn(BATCH, dtype=torch.float64, generator=generator)
    return (MEANS[component] + VARIANCES[component].sqrt() * normal).float()[:, None]


def true_density(schedule: hosm.Schedule) -> tuple[Tensor, Tensor]:
    """Return the log-density of the mixture at t_min and its derivative, on GRID."""
    alpha, sigma = schedule(torch.tensor(schedule.t_min, dtype=torch.float64))
    variances = alpha.square() * VARIANCES + sigma.square()
    offsets = GRID[:, None] - alpha * MEANS
    squares = offsets.square() / variances + torch.log(2 * math.pi * variances)
    joint = FRACTIONS.log() - 0.5 * squares
    return joint.logsumexp(1), -(joint.softmax(1) * offsets / variances).sum(1)


def new_model(job: Job) -> hosm.ScoreModel:
    """Return the initial network for the job's seed, which is the same for every loss."""
    torch.manual_seed(job.seed)
    schedule = SCHEDULES[job.schedule]
    return hosm.ScoreModel(Network(schedule), schedule)


def training(model: hosm.ScoreModel, job: Job, rate: float = 3e-3) -> Iterator[None]:
    """Take one optimizer step per iteration of the generator."""
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
    """Prepare a process; `counter` is shared by all processes."""
    global progress
    progress = counter
    torch.set_num_threads(1)


def exact_kl(model: hosm.ScoreModel) -> tuple[float, Tensor]:
    """Return KL(q || p_ODE) in nats, or NaN if the ODE could not be solved, and log p_ODE."""
    # Tighter than the default, so that the KL is right to about 1e-5 nats.
    solver = hosm.Adaptive(1e-4, data_mean=DATA_MEAN, data_std=DATA_STD)
    result = hosm.ode_nll(model, GRID.float()[:, None], solver=solver, divergence="exact")
    log_density, _ = true_density(model.schedule)
    kl = torch.trapezoid(log_density.exp() * (log_density + result.nll), GRID)
    return math.nan if result.failed.any() else float(kl), -result.nll


def score_of(model: hosm.ScoreModel) -> Tensor:
    """Return the score of the ODE's density on GRID."""
    x = GRID.float()[:, None].requires_grad_()
    solver = hosm.FixedGrid(128, data_mean=DATA_MEAN, data_std=DATA_STD)
    nll = hosm.ode_nll(model, x, solver=solver, divergence="exact", enable_grad=True).nll
    return -torch.autograd.grad(nll.sum(), x)[0][:, 0].double()


def train(job: Job) -> Outcome:
    """Train a network, then compute the density and score of its ODE at every point of GRID."""
    model, start = new_model(job), time.process_time()
    for _ in training(model, job):
        with progress.get_lock():
            progress.value += EVALUATIONS[job.loss]
    seconds = time.process_time() - start
    kl, log_density = exact_kl(model)
    if math.isnan(kl):
        raise RuntimeError(f"{job}: the ODE could not be solved from every point.")
    score = score_of(model)
    log_q, truth = true_density(model.schedule)
    error, size = (torch.trapezoid(log_q.exp() * part**2, GRID) for part in (score - truth, truth))
    return Outcome(kl, float((error / size).sqrt()), seconds, log_density.numpy(), score.numpy())


def train_all(jobs: Sequence[Job]) -> list[Outcome]:
    """Run all jobs in two processes."""
    context = get_context("spawn")
    counter = context.Value("d", 0.0)
    total = sum(job.steps * EVALUATIONS[job.loss] for job in jobs)
    form = "training {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with (
        ProcessPoolExecutor(2, context, start_process, (counter,)) as pool,
        tqdm(total=total, bar_format=form) as bar,
    ):
        running = pending = [pool.submit(train, job) for job in jobs]
        while pending:
            pending = wait(pending, timeout=1).not_done
            bar.update(counter.value - bar.n)
    return [future.result() for future in running]


def picture(report: Mapping[str, Any]) -> Figure:
    """Plot each ODE's density and score, at equal cost, over the mixture's curves in grey."""
    curves = report["curves"]
    figure = Figure((9.3, 4.8), layout="constrained")
    rows = figure.subplots(2, len(report["equal_cost"]), sharex=True, sharey="row")
    for (loss, kl), panels in zip(report["equal_cost"].items(), rows.T, strict=True):
        for axes, quantity in zip(panels, ("density", "score"), strict=True):
            axes.plot(curves["x"], curves["truth"][quantity], "C5", alpha=0.5, linewidth=5)
            axes.plot(curves["x"], curves[loss][quantity], "C1")
        errors = f"KL {kl:.5f} nats\nscore error {report['score_percent'][loss]:.1f}%"
        panels[0].set_title(f"order {loss.replace(' ', ', ')}\n{errors}")
        panels[1].set(xlabel="x", xlim=(-1.1, 1.1), ylim=(-90, 90))
    rows[0, 0].set(ylabel="density p(x)")
    rows[1, 0].set(ylabel="score d log p/dx")
    for height, name, color in ((2.6, "mixture", "C5"), (2.1, "ODE", "C1")):
        rows[0, 0].text(1, height, name, color=color, ha="right")
    return figure


def main() -> None:
    """Read the options, train, print the table and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="N, the steps of order three")
    parser.add_argument("--schedule", choices=SCHEDULES, default="ve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mixture_1d_out"))
    options = parser.parse_args()
    start, most = time.perf_counter(), max(EVALUATIONS.values())
    jobs = {
        loss: Job(options.schedule, loss, options.steps * most // each, options.seed)
        for loss, each in EVALUATIONS.items()
    }
    outcomes = dict(zip(jobs, train_all([*jobs.values()]), strict=True))
    log_q, score = true_density(SCHEDULES[options.schedule])
    entropy = -float(torch.trapezoid(log_q.exp() * log_q, GRID))
    print(f"\nEntropy of q: {entropy:.4f} nats; NLL = KL + entropy\n")
    print("order        steps  seconds   KL [nats]  score error  NLL [nats]  NLL [bits/dim]")
    for loss, outcome in outcomes.items():
        nll = outcome.kl + entropy
        print(f"{loss:10}{jobs[loss].steps:8}{outcome.seconds:9.1f}{outcome.kl:12.5f}", end="")
        print(f"{outcome.score_error:13.1%}{nll:12.5f}{nll / math.log(2):16.5f}")
    shown = slice(None, None, 3)
    curves: dict[str, Any] = {"x": GRID[shown].tolist()}
    truth = log_q.exp().numpy(), score.numpy()
    pairs = {loss: (np.exp(each.log_density), each.score) for loss, each in outcomes.items()}
    for name, (density, slope) in {"truth": truth, **pairs}.items():
        curves[name] = {"density": density[shown].tolist(), "score": slope[shown].tolist()}
    report = {
        "schedule": options.schedule,
        "seed": options.seed,
        "steps": {loss: job.steps for loss, job in jobs.items()},
        "seconds": {loss: outcome.seconds for loss, outcome in outcomes.items()},
        "equal_cost": {loss: outcome.kl for loss, outcome in outcomes.items()},
        "score_percent": {loss: 100 * outcome.score_error for loss, outcome in outcomes.items()},
        "curves": curves,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(report) + "\n")
    with style.context([*Path(__file__).parent.glob("style.mplstyle")]):  # as on the pages
        picture(report).savefig(options.out / f"mixture_1d_{options.schedule}.svg")
    print(f"\nFigure and results.json are in {options.out}; {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
