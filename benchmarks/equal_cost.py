"""At equal cost, is the third order worth it? Judged by KL(q || p_ODE), q the data at t_min.

    python -m benchmarks.equal_cost [--data checkerboard] [--schedule vp] [--seeds N] [--steps N]
        [--settings REGEX] [--processes N] [--out DIR] [--smoke]

Settings:
    Each loss throughout, and order three also after order one ("order 1, then ..."): half of the
    cost goes to each; optimizer and decay run through. "Meng et al." is benchmarks.peers.meng.
    "1/4 of rows" have their higher orders on a random quarter of the batch. "laplacian" is
    third="laplacian", in one dimension the same number. All are exact but "one probe".

Equal cost:
    The processor time of --steps steps of order one, timed first: medians over rounds in which
    all losses take turns in one process. The column "cost" is what the trainings then took, over
    order one with the same seed. Each has Adam at 1e-3 with a cosine decay over its own steps,
    batches of 512, and the initial network of its seed.

Data:
    mixture       the 1-D mixture and network of docs/examples/mixture_1d.py, whose KL is right to
                  about 1e-5 nats. Weights (1, 0.5, 0, 0.1).
    checkerboard  uniform on the dark squares of a 4×4 board on [−2, 2]². q is a closed form, the
                  KL a sum over Gauss-Legendre nodes, close together at the edges of the squares.
                  Weights (1, 0.5, 0, 0.1 d²).
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from docs.examples import mixture_1d as example
from torch import Tensor, nn
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment
from benchmarks.peers import meng
from benchmarks.timing import clocked, ratios

Losses = dict[str, Callable[..., Tensor]]
BASE, THEN = "order 1", ", then "
WARM_UP, ROUNDS = 5, 40
DARK = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]] * 2, dtype=torch.float64)
BOARD_STD = 2 / math.sqrt(3)
NODES = 6  # a panel; 8 move the KL of a trained network by less than 0.001 nats


class PlaneNetwork(example.Network):
    """The example's network, for points of the plane."""

    def __init__(self, schedule: hosm.Schedule) -> None:
        super().__init__(schedule)
        self.layers[0] = nn.Linear(2 * 17, example.WIDTH)
        self.output = nn.Linear(example.WIDTH, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x (B, 2) at t (B,)."""
        alpha, sigma = self.schedule(t[:, None])
        std = torch.sqrt((alpha * BOARD_STD).square() + sigma.square())
        time_features = example.waves(self.schedule.log_sigma_hat(t)[:, None] / 4, 8)
        hidden = torch.cat([example.waves(column, 8) for column in (x / std).split(1, 1)], 1)
        for layer, time_layer in zip(self.layers, self.times, strict=True):
            scale, shift = time_layer(time_features).chunk(2, dim=1)
            hidden = nn.functional.silu(layer(hidden) * (1 + scale) + shift)
        return sigma / std.square() * x + self.output(hidden)


def draw_board(generator: torch.Generator) -> Tensor:
    """Draw a batch of the checkerboard, (BATCH, 2)."""
    row = torch.randint(4, (example.BATCH,), generator=generator)
    column = 2 * torch.randint(2, (example.BATCH,), generator=generator) + row % 2
    corner = torch.stack([row, column], 1) - 2
    return corner + torch.rand(corner.shape, generator=generator)


def board_quadrature(schedule: hosm.Schedule, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points of the plane (N, 2), their weights in an integral, and the density at t_min there."""
    alpha, sigma = schedule(torch.tensor(schedule.t_min, dtype=torch.float64))
    edges = alpha * torch.arange(-2, 3)
    # Panels for the noise at an edge, for what a network blurs beside it, and for what is between.
    near = torch.stack([-0.15 * alpha, -3.5 * sigma, 3.5 * sigma, 0.15 * alpha])
    breaks = (edges[:, None] + near).flatten()[1:-1]
    unit, unit_weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(nodes))
    halves = breaks.diff()[:, None] / 2
    axis = (breaks[:-1, None] + halves * (1 + unit)).flatten()
    weights = (halves * unit_weights).flatten()
    above = torch.special.ndtr((axis - edges[:, None]) / sigma)
    inside = (above[:-1] - above[1:]) / alpha
    density = torch.einsum("ij,ix,jy->xy", DARK, inside, inside) / DARK.sum()
    return torch.cartesian_prod(axis, axis), weights.outer(weights).flatten(), density.flatten()


def board_kl(model: hosm.ScoreModel, nodes: int) -> float:
    """KL(q || p_ODE) in nats, NaN where the ODE could not be solved."""
    points, weights, density = board_quadrature(model.schedule, nodes)
    kept = density > 1e-6
    exact = {"method": "adaptive", "divergence": "exact", "data_std": BOARD_STD}
    result = hosm.ode_nll(model, points[kept].float(), batch_size=2048, **exact)
    kl = (weights * density)[kept] @ (density[kept].log() + result.nll)
    return math.nan if result.failed.any() else float(kl)


def losses(third_weight: float, divisors: tuple[int, ...], **options: Any) -> Losses:
    """The losses by name; order three also on the batch over each divisor."""
    third = partial(hosm.third_order_dsm, weights=(1, 0.5, 0, third_weight), **options)
    kinds = {"order 3": third, "order 3 laplacian": partial(third, third="laplacian")}
    found = {
        BASE: hosm.first_order_dsm,
        "order 2": partial(hosm.second_order_dsm, weights=(1, 0.5, 0), **options),
        "order 2, Meng et al.": partial(meng.second_order_loss, weights=(1, 0.5), **options),
        **kinds,
    }
    for name, loss in kinds.items():
        for divisor in divisors:
            found[f"{name}, 1/{divisor} of rows"] = partial(loss, fraction=1 / divisor)
    return found


class Problem(NamedTuple):
    """Data with its network, its KL for a number of nodes, and its losses."""

    steps: int
    draw: Callable[[torch.Generator], Tensor]
    network: Callable[[hosm.Schedule], nn.Module]
    kl: Callable[[hosm.ScoreModel, int], float]
    losses: Losses


# A unit probe is exact in one dimension and, given, draws no number.
LINE = losses(0.1, (2, 4), probe=torch.ones(example.BATCH, 1))
PLANE = losses(0.1 * 2**2, (4,), probes="exact")
PLANE["order 3, one probe"] = partial(PLANE["order 3"], probes=1)
PROBLEMS = {
    "mixture": Problem(
        10000, example.draw_data, example.Network, lambda m, _: example.exact_kl(m)[0], LINE
    ),
    "checkerboard": Problem(4000, draw_board, PlaneNetwork, board_kl, PLANE),
}


class Job(NamedTuple):
    """A training: names of losses, each with its number of steps."""

    data: str
    schedule: str
    phases: tuple[tuple[str, int], ...]
    seed: int = 0
    nodes: int = NODES


def start(job: Job) -> tuple[hosm.ScoreModel, Iterator[None]]:
    """The model of the job's seed, the same for every setting, and its training."""
    problem, schedule = PROBLEMS[job.data], example.SCHEDULES[job.schedule]
    torch.manual_seed(job.seed)
    model = hosm.ScoreModel(problem.network(schedule), schedule)
    generator = torch.Generator().manual_seed(job.seed)
    names = [name for name, steps in job.phases for _ in range(steps)]
    turns = iter(names)

    def loss() -> Tensor:
        return problem.losses[next(turns)](model, problem.draw(generator), generator=generator)

    return model, experiment.training(model, loss, len(names))


def step_times(data: str, schedule: str, names: list[str], rounds: int) -> dict[str, float]:
    """Median processor time of a step with each loss, over that of order one."""
    jobs = {name: Job(data, schedule, ((name, WARM_UP + rounds),)) for name in names}
    routes = {name: partial(next, start(job)[1]) for name, job in jobs.items()}
    ratios(routes, BASE, WARM_UP)
    return {name: ratio.value for name, ratio in ratios(routes, BASE, rounds).items()}


def phases(setting: str, steps: int, times: dict[str, float]) -> tuple[tuple[str, int], ...]:
    """Share the cost of `steps` steps of order one evenly between the losses of a setting."""
    names = setting.split(THEN)
    return tuple((name, max(1, round(steps / len(names) / times[name]))) for name in names)


def train(job: Job) -> tuple[float, float]:
    """KL in nats of a network that is trained now, and the processor seconds of training."""
    torch.set_num_threads(1)
    # A process imports more at its first steps, which would count as the cost of one training.
    list(start(job._replace(phases=tuple((name, 1) for name, _ in job.phases)))[1])
    model, steps = start(job)
    _, seconds = clocked(lambda: list(steps))
    return PROBLEMS[job.data].kl(model, job.nodes), seconds


def printed(report: dict[str, Any]) -> None:
    """Print a row for each setting."""
    lines, base = [], report["settings"][BASE]["seconds"]
    for name, row in report["settings"].items():
        ratio, seconds, steps = row["ratio"], row["seconds"], sum(row["steps"])
        cells = [report["step_time_ratios"][name.split(THEN)[-1]], steps]
        cells += [float(np.median(np.divide(seconds, base))), float(np.median(ratio))]
        lines.append([name, *cells, min(ratio), max(ratio), *row["kl"]])
    header = ["", "step time", "steps", "cost", "KL over order 1's: median", "least", "most"]
    header += ["KL [nats]", *[""] * (len(base) - 1)]
    name = f"{report['data']}, {report['schedule'].upper()}"
    experiment.show(f"{name}, at the cost of {report['steps']} steps of order one", header, lines)


def main() -> None:
    """Time the steps, train, print the table and write the numbers."""
    parser = experiment.parser(__doc__)
    parser.add_argument("--data", choices=PROBLEMS, default="mixture")
    parser.add_argument("--schedule", choices=example.SCHEDULES, default="ve")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    defaults = ", ".join(f"{problem.steps} for {name}" for name, problem in PROBLEMS.items())
    parser.add_argument("--steps", type=int, help=f"of order one; by default {defaults}")
    parser.add_argument("--settings", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--out", type=Path, default=Path("equal_cost_out"))
    parser.add_argument("--processes", type=int, default=2, help="that train at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, schedule, seeds, nodes = options.data, options.schedule, options.seeds, NODES
    problem = PROBLEMS[data]
    later = [BASE + THEN + name for name in problem.losses if "order 3" in name]
    chosen = [s for s in [*problem.losses, *later] if s == BASE or re.search(options.settings, s)]
    names = list(dict.fromkeys(name for setting in chosen for name in setting.split(THEN)))
    times = step_times(data, schedule, names, 2 if options.smoke else ROUNDS)
    steps = options.steps or problem.steps
    if options.smoke:
        chosen, steps, nodes, seeds = [BASE, *chosen[1:][-2:]], 10, 2, 1
    plans = {setting: phases(setting, steps, times) for setting in chosen}
    jobs = [Job(data, schedule, plans[s], n, nodes) for n in range(seeds) for s in chosen]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        outcomes = list(tqdm(pool.map(train, jobs), "trainings", len(jobs)))
    kl, seconds = np.array(outcomes).reshape(seeds, len(chosen), 2).transpose(2, 1, 0)
    report: dict[str, Any] = {"data": data, "schedule": schedule, "steps": steps}
    report |= {"step_time_ratios": times, "settings": {}}
    for i, setting in enumerate(chosen):
        report["settings"][setting] = {
            "steps": [count for _, count in plans[setting]],
            "kl": kl[i].tolist(),
            "ratio": (kl[i] / kl[0]).tolist(),
            "seconds": seconds[i].tolist(),
        }
    printed(report)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"equal_cost_{data}_{schedule}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nThe numbers are in {path}.")


if __name__ == "__main__":
    main()
