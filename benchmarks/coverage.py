"""Does twice the claimed solver_error of the fixed grid cover the true error?

    python -m benchmarks.coverage [--data REGEX] [--smoke]

The truth is a finer grid with the exact divergence. With random probes the claim is that of the
path alone, and has to cover the same error. All of it without and with a companion of half the
steps. The exact score is that of eight round Gaussians, on a ring or around images. It takes an
hour and a half, an hour of it for images of 16×16.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tests.oracles import ring
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import parser, training
from benchmarks.trained import Convolutional, Dense, digits, images

SCHEDULES = {
    "VP": hosm.VPSchedule(),
    "VE": hosm.VESchedule(),
    "EDM": hosm.EDMSchedule(),
    "flow": hosm.LinearFlowSchedule(),
    "cosine": hosm.CosineSchedule(),
}
# How data is drawn, samples judged, steps of the truth, batch, steps of training (None: exact).
DATA = {
    "ring, d = 2": (lambda *of: ring().sample(*of).float(), 100, 1024, 128, (None, 0, 200, 3000)),
    "digits, d = 64": (digits, 8, 512, 128, (0, 200, 2000)),
    "images, d = 192": (partial(images, 8), 8, 256, 32, (0, 150, 1000)),
    "images, d = 768": (partial(images, 16), 2, 128, 32, (None, 0, 150)),
}
EXACT_STD, STEPS = 0.1, 64
FILE = results.DIRECTORY / "coverage.json"


def trained(
    data: Tensor, schedule: hosm.Schedule, steps: int, batch: int, generator: torch.Generator
) -> hosm.ScoreModel:
    """A network after so many steps of order one, in float64."""
    std = float(data.std())
    if data.ndim == 2:
        network = Dense(schedule, std, data.shape[1], 128 if data.shape[1] < 64 else 256)
    else:
        network = Convolutional(schedule, std, width=16, blocks=2)
    model = hosm.ScoreModel(network, schedule)

    def loss() -> Tensor:
        chosen = torch.randint(len(data), (batch,), generator=generator)
        return hosm.first_order_dsm(model, data[chosen], generator=generator)

    list(tqdm(training(model, loss, steps, decays=False), "training", steps, leave=False))
    return model.eval().double()


def mixture(means: Tensor, std: float, schedule: hosm.Schedule) -> Callable[..., Tensor]:
    """The noise that equal round Gaussians around the means have in x at t."""
    flat = means.flatten(1).double()

    def noise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (each[:, None] for each in schedule(t))
        variance = alpha**2 * std**2 + sigma**2
        logits = (alpha * x.flatten(1) @ flat.T - alpha**2 * flat.square().sum(1) / 2) / variance
        mean = alpha * logits.softmax(1) @ flat
        return (sigma / variance * (x.flatten(1) - mean)).reshape(x.shape)

    return noise


def measure(name: str, schedule: hosm.Schedule, steps: int | None) -> dict[str, float]:
    """What was claimed and what was true of one network."""
    draw, count, finest, batch, _ = DATA[name]
    generator = torch.Generator().manual_seed(1)
    data, held_out = draw(1500 + count, generator).split([1500, count])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if steps is not None:
            model = trained(data, schedule, steps, batch, generator)
        else:
            means = ring().means if "ring" in name else data[:8]
            model = hosm.ScoreModel(mixture(means, EXACT_STD, schedule), schedule)
            if "ring" not in name:
                held_out = data[torch.arange(count) % 8]
                held_out += EXACT_STD * torch.randn(held_out.shape, generator=generator)
    every = torch.cat([data, held_out])
    moments: dict[str, Any] = {"data_std": float(every.std()), "data_mean": float(every.mean())}
    alpha, sigma = schedule(torch.tensor([schedule.t_min], dtype=torch.float64))
    noise = torch.randn(held_out.shape, generator=generator, dtype=torch.float64)
    x = alpha * held_out.double() + sigma * noise
    fine = hosm.FixedGrid(finest, **moments)
    truth = hosm.ode_nll(model, x, solver=fine, divergence="exact")
    found: dict[str, float] = {}
    for which, companion in (("", False), (", companion", True)):
        solver = hosm.FixedGrid(STEPS, companion=companion, **moments)
        exact = hosm.ode_nll(model, x, solver=solver, divergence="exact")
        random = hosm.ode_nll(model, x, solver=solver, generator=generator)
        error = (exact.nll - truth.nll).abs()
        found["error"] = median = float(error.median())
        found[f"ratio{which}"] = float(exact.solver_error.median()) / median
        for key, result in (("covered", exact), ("covered by the path", random)):
            covered = (error <= 2 * result.solver_error).double().mean()
            found[f"{key}{which}"] = float(covered)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", default="", metavar="REGEX", help="that it is found in")
    options = arguments.parse_args()
    kept = results.read(FILE)
    one, two = (1, 2) if options.smoke else (None, None)
    for name in [name for name in DATA if re.search(options.data, name)][:one]:
        for steps in DATA[name][-1][:two]:
            told = "exact score" if steps is None else f"{steps} steps"
            chosen = list(SCHEDULES.items())[:one]
            rows = {key: measure(name, schedule, steps) for key, schedule in chosen}
            kept.setdefault(name, {})[told] = rows
            results.show(f"{name}, {told}", rows)
            if not options.smoke:
                results.write(FILE, kept)


if __name__ == "__main__":
    main()
