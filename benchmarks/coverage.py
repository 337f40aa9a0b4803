"""Does twice the claimed solver_error of the fixed grid cover the true error?

    python -m benchmarks.coverage [--data REGEX] [--smoke]

For five schedules, and networks that were trained not at all, briefly and for longer. The truth is
a grid of 1024 steps with the exact divergence (512 for digits, 256 and 128 for images). With
random probes the claim is that of the path alone, and has to cover the same error. All of it
without and with a companion of half the steps. The exact score is that of a mixture of Gaussians,
of images around eight of them. It takes an hour and a half, an hour of it for
images of 16×16.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from tests.oracles import mixture_noise, ring
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import parser, show
from benchmarks.trained import Convolutional, Dense, digits, images

SCHEDULES = {
    "VP": hosm.VPSchedule(),
    "VE": hosm.VESchedule(),
    "EDM": hosm.EDMSchedule(),
    "flow": hosm.LinearFlowSchedule(),
    "cosine": hosm.CosineSchedule(),
}
# By data: samples judged, steps of the truth, batch, steps of training (None: the exact score).
DATA = {
    "ring, d = 2": (100, 1024, 128, (None, 0, 200, 3000)),
    "digits, d = 64": (8, 512, 128, (0, 200, 2000)),
    "images, d = 192": (8, 256, 32, (0, 150, 1000)),
    "images, d = 768": (2, 128, 32, (None, 0, 150)),
}
EXACT_STD, STEPS = 0.1, 64
FILE = results.DIRECTORY / "coverage.json"
HEADER = ("Data", "Training", "Schedule", "Error", "Ratio", "Covered", "by the path's")
HEADER += ("Companion: ratio", "covered", "by the path's")


def draw(name: str, count: int, generator: torch.Generator) -> Tensor:
    """Data (count, *) in float32."""
    if "ring" in name:
        return ring().sample(count, generator).float()
    if "digits" in name:
        return digits(count, generator)
    return images(16 if "768" in name else 8, count, generator)


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
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in tqdm(range(steps), "training", leave=False):
        chosen = torch.randint(len(data), (batch,), generator=generator)
        loss = hosm.first_order_dsm(model, data[chosen], generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
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


def measure(name: str, schedule: hosm.Schedule, training: int | None) -> dict[str, float]:
    """What was claimed and what was true of one network."""
    count, finest, batch, _ = DATA[name]
    generator = torch.Generator().manual_seed(1)
    data = draw(name, 1500 + count, generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if training is None and "ring" in name:
            model = hosm.ScoreModel(mixture_noise(ring(), schedule), schedule)
        elif training is None:
            model = hosm.ScoreModel(mixture(data[:8], EXACT_STD, schedule), schedule)
            held = data[torch.arange(count) % 8]
            noise = EXACT_STD * torch.randn(held.shape, generator=generator)
            data = torch.cat([data[:1500], held + noise])
        else:
            model = trained(data[:1500], schedule, training, batch, generator)
    held_out = data[1500:].double()
    alpha, sigma = schedule(torch.tensor([schedule.t_min], dtype=torch.float64))
    x = alpha * held_out + sigma * torch.randn(
        held_out.shape, generator=generator, dtype=held_out.dtype
    )
    options: dict[str, Any] = {"data_std": float(data.std()), "data_mean": float(data.mean())}
    truth = hosm.ode_nll(model, x, divergence="exact", steps=finest, **options)
    found: dict[str, float] = {}
    for companion in (False, True):
        options["companion"] = companion
        exact = hosm.ode_nll(model, x, divergence="exact", steps=STEPS, **options)
        random = hosm.ode_nll(model, x, steps=STEPS, generator=generator, **options)
        error = (exact.nll - truth.nll).abs()
        median, which = float(error.median()), ", companion" if companion else ""
        found["error"] = median
        found[f"ratio{which}"] = float(exact.solver_error.median()) / median
        for key, result in (("covered", exact), ("covered by the path", random)):
            covered = (error <= 2 * result.solver_error).double().mean()
            found[f"{key}{which}"] = float(covered)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", default="", metavar="REGEX", help="that it is found in")
    options = arguments.parse_args()
    kept, rows = results.read(FILE), []
    names = [name for name in DATA if re.search(options.data, name)]
    for name in names[:1] if options.smoke else names:
        for training in DATA[name][3][:2] if options.smoke else DATA[name][3]:
            told = "exact score" if training is None else f"{training} steps"
            for schedule in list(SCHEDULES)[:1] if options.smoke else SCHEDULES:
                found = measure(name, SCHEDULES[schedule], training)
                rows.append([name, told, schedule, *found.values()])
                kept.setdefault(name, {}).setdefault(told, {})[schedule] = found
                if not options.smoke:
                    results.write(FILE, kept)
    show(f"Medians in nats, and the part of samples covered, {STEPS} steps", HEADER, rows)


if __name__ == "__main__":
    main()
