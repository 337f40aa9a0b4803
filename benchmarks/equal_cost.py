"""At equal cost, is the third order worth it? Judged by KL(q || p_ODE), q the data at t_min.

    python -m benchmarks.equal_cost [--schedule vp] [--steps N] [--settings REGEX] [--out DIR]
        [--smoke]

A setting is a loss throughout, or order three after order one ("order 1, then ..."): half of the
cost goes to each; optimizer and decay run through. "1/4 of rows" have their higher orders on a
random quarter of the batch. "laplacian" is in one dimension the same number as "exact".

The cost is the processor time of --steps steps of order one, timed first: medians over rounds in
which all losses take turns in one process. "cost" is what the trainings then took, over order one
with the same seed. Data, network and batches are those of docs/examples/mixture_1d.py, whose KL is
right to about 1e-5 nats.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from docs.examples import mixture_1d as example
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import experiment, results

BASE, THEN = "order 1", ", then "
ROUNDS, SEEDS = 40, 3
# A unit probe is exact in one dimension and, given, draws no number.
UNIT = {"probe": torch.ones(example.BATCH, 1)}
THIRD = partial(hosm.third_order_dsm, weights=(1, 0.5, 0, 0.1), **UNIT)
LOSSES = {
    BASE: hosm.first_order_dsm,
    "order 2": partial(hosm.second_order_dsm, weights=(1, 0.5, 0), **UNIT),
    "order 3": THIRD,
    "order 3 laplacian": partial(THIRD, third="laplacian"),
    "order 3 laplacian, 1/4 of rows": partial(THIRD, third="laplacian", fraction=1 / 4),
}
SETTINGS = [*LOSSES, *(BASE + THEN + name for name in LOSSES if "order 3" in name)]


class Job(NamedTuple):
    """A training: names of losses, each with its number of steps."""

    schedule: str
    phases: tuple[tuple[str, int], ...]
    seed: int = 0


def start(job: Job) -> tuple[hosm.ScoreModel, Iterator[None]]:
    """The model of the job's seed, the same for every setting, and its training."""
    model = example.new_model(example.Job(job.schedule, "1", 0, job.seed))
    generator = torch.Generator().manual_seed(job.seed)
    turns = iter([name for name, steps in job.phases for _ in range(steps)])

    def loss() -> Tensor:
        return LOSSES[next(turns)](model, example.draw_data(generator), generator=generator)

    return model, experiment.training(model, loss, sum(steps for _, steps in job.phases))


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
    _, seconds = experiment.clocked(lambda: list(steps))
    return example.exact_kl(model)[0], seconds


def main() -> None:
    parser = experiment.parser(__doc__)
    parser.add_argument("--schedule", choices=example.SCHEDULES, default="ve")
    parser.add_argument("--steps", type=int, default=10_000, help="of order one")
    parser.add_argument("--settings", default="", metavar="REGEX", help="those it is found in")
    parser.add_argument("--out", type=Path, default=Path("equal_cost_out"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule, seeds, steps = options.schedule, SEEDS, options.steps
    chosen = [s for s in SETTINGS if s == BASE or re.search(options.settings, s)]
    names = list(dict.fromkeys(name for setting in chosen for name in setting.split(THEN)))
    seconds = experiment.step_times(
        lambda name, steps: start(Job(schedule, ((name, steps),)))[1],
        names,
        2 if options.smoke else ROUNDS,
    )
    times = {name: each / seconds[BASE] for name, each in seconds.items()}
    if options.smoke:
        chosen, steps, seeds = [BASE, *chosen[1:][-2:]], 10, 1
    plans = {setting: phases(setting, steps, times) for setting in chosen}
    jobs = [Job(schedule, plans[setting], seed) for seed in range(seeds) for setting in chosen]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        outcomes = list(tqdm(pool.map(train, jobs), "trainings", len(jobs)))
    kl, seconds = np.array(outcomes).reshape(seeds, len(chosen), 2).transpose(2, 1, 0)
    rows = {
        setting: {
            "steps": [count for _, count in plans[setting]],
            "kl": kl[i].tolist(),
            "ratio": (kl[i] / kl[0]).tolist(),
            "seconds": seconds[i].tolist(),
            "cost": float(np.median(seconds[i] / seconds[0])),
        }
        for i, setting in enumerate(chosen)
    }
    results.show(f"{schedule.upper()}, at the cost of {steps} steps of order one", rows)
    report = {"schedule": schedule, "steps": steps, "step_time_ratios": times, "settings": rows}
    results.write(options.out / f"equal_cost_mixture_{schedule}.json", report)


if __name__ == "__main__":
    main()
