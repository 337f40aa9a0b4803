"""What are quiet batches worth on natural images at equal evaluations of the network?

    python -m benchmarks.patches [--row ROW | --second-stage] [--dirty | --smoke]

The protocol, fixed before anything was run:
    1. Photographs that scikit-image and scikit-learn contain become grey, the mean of the colours:
       256 levels on [−1, 1], uniform within each. They are cut into tiles of 64×64. Two whole
       photographs and every tenth tile of the others are for validation, as many for the test. A
       patch of 8×8 lies anywhere within one tile.
    2. A U-Net of 136,000 parameters trains with order one, Adam and a cosine decay to zero, for
       6,000 steps of 64 rows.
    3. "times" are learnt: `learn` takes 64 rows every 25 steps, which are taken off the steps.
       Pairs of noises and averaged targets were planned, and never run.
    4. Every row trains two seeds at each of RATES. The validation loss chooses one for each seed,
       whose final weights are judged by the NLL of 256 patches, the same for all.
    5. The difference to "plain" is paired by patch, and its standard error is over patches; one
       for each seed.

Each row is written to results/patches.json at once, and a second run goes on where the first one
stopped. To measure a row anew, remove it from the file.

With --second-stage: what are orders two and three worth after a long training with order one? Its
protocol was fixed in the same way.
    1. Order one trains for LONG, at the rate that 2 to 4 chose for "plain".
    2. From its weights, each of STAGES trains with a fresh Adam and decay at each of AFTER: orders
       two and three for `second` steps, order one for as many and for as many evaluations, which
       are 3, 6 and 12 a sample. The NLL of patches for validation chooses the rate: it is what
       the higher orders are for.
    3. The NLL of clean patches is the ODE's, with two probes a node, the same for all models.
       Differences are paired by patch, with 95 % intervals over patches; one for each seed.
    4. The gap is the SDE's bound, by `variational_nll`, less the ODE's NLL, after the first stage.
       Orders two and three are to close it from below zero.
Each seed is written to results/second_stage.json at once.
"""

from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks import experiment, results
from benchmarks.experiment import Row, seeded
from benchmarks.networks import UNet
from benchmarks.steps import LOSSES

FILE = results.DIRECTORY / "patches.json"
ROWS = ("plain", "times")
RATES = (1e-3, 3e-3, 1e-2)
SEEDS, EVERY = 2, 25  # EVERY: steps between calls of `learn`
SIDE, TILE, LEVELS = 8, 64, 256
STD = 0.4  # of a pixel
# Below half a level there is only the dequantization's noise. The largest principal standard
# deviation of patches, nearly along their mean, is seven to ten times that of a pixel.
SCHEDULE = hosm.VESchedule(sigma_min=0.01 * STD, sigma_max=50 * STD)
# With scikit-image, which would download others.
SHIPPED = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "moon")
VALIDATION, TEST = 0, 1  # of every ten tiles in turn, and those of whole photographs
WHOLE = {"chelsea": VALIDATION, "flower": VALIDATION, "coffee": TEST, "china": TEST}


SECOND_FILE = results.DIRECTORY / "second_stage.json"
# The order of a second stage, and how many times the steps of orders two and three it takes.
STAGES = {
    "one": (1, 1),
    "one, twice the steps": (1, 2),
    "one, four times the steps": (1, 4),
    "two": (2, 1),
    "three": (3, 1),
}
EQUAL = {"two": "one, twice the steps", "three": "one, four times the steps"}  # in evaluations
AFTER = (1e-4, 1e-3)


class Sizes(NamedTuple):
    steps: int = 6_000
    batch: int = 64
    validation: int = 4_096
    test: int = 256
    second: int = 800


LONG = Sizes(24_000, 32, validation=256, test=1_024)


def photographs() -> dict[str, Tensor]:
    """Grey levels (H, W), by name."""
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError as error:
        raise SystemExit(f"expected the extra benchmarks; got no {error.name}") from None
    found = {name: getattr(data, name)() for name in SHIPPED}
    found |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    grey = {name: np.atleast_3d(picture).mean(2) for name, picture in found.items()}
    return {name: torch.tensor(each).round().float() for name, each in grey.items()}


def split(pictures: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles (N, 64, 64) for training, validation and test."""
    tiles, tenths = [], []
    for name, picture in pictures.items():
        tiles.append(picture.unfold(0, TILE, TILE).unfold(1, TILE, TILE).flatten(0, 1))
        tenth = torch.arange(len(tiles[-1])) % 10
        tenths.append(torch.full_like(tenth, WHOLE[name]) if name in WHOLE else tenth)
    every, tenth = torch.cat(tiles), torch.cat(tenths)
    return every[tenth > TEST], every[tenth == VALIDATION], every[tenth == TEST]


def draw(tiles: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Patches (count, 1, 8, 8) from anywhere within tiles, dequantized."""
    windows = tiles.unfold(1, SIDE, 1).unfold(2, SIDE, 1)
    index = [torch.randint(size, (count,), generator=generator) for size in windows.shape[:3]]
    levels = windows[tuple(index)][:, None]
    return 2 * (levels + torch.rand(levels.shape, generator=generator)) / LEVELS - 1


class Network(nn.Module):
    """Adds a U-Net to the noise's exact predictor for Gaussian pixels, scaled as in EDM."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(32, (1, 1), blocks=1, channels=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = SCHEDULE.sigma(t)[:, None, None, None]
        scale = (sigma**2 + STD**2).sqrt()
        return (sigma * x / scale + STD * self.unet(x / scale, t)) / scale


def steps_of(row: str, budget: int) -> int:
    """How many steps cost no more than `budget` plain ones; a call of `learn` costs one."""
    return budget - budget // (EVERY + 1) if row == "times" else budget


def trained(row: str, tiles: Tensor, sizes: Sizes, rate: float, seed: int) -> hosm.ScoreModel:
    """The model at the end of a training."""
    torch.manual_seed(seed)
    model = hosm.ScoreModel(Network(), SCHEDULE)
    sampler = hosm.AdaptiveTimes() if row == "times" else None
    every = experiment.training_by_module(
        hosm.FirstOrderDSM(model, time_sampler=sampler),
        lambda generator: draw(tiles, sizes.batch, generator),
        steps_of(row, sizes.steps),
        rate,
        seeded(seed),
        averaged=False,
        every=EVERY,
        rows=sizes.batch,
    )
    for _ in every:
        pass
    return model.requires_grad_(False)


def measure(row: str, splits: tuple[Tensor, Tensor, Tensor], sizes: Sizes, seed: int) -> Row:
    """The validation loss at each rate, and the test's NLL in nats, by patch."""
    tiles, *held_out = splits
    validation = draw(held_out[VALIDATION], sizes.validation, seeded(0))
    test, solver = draw(held_out[TEST], sizes.test, seeded(0)), hosm.FixedGrid()
    models = [trained(row, tiles, sizes, rate, seed) for rate in RATES]
    losses = [float(hosm.first_order_dsm(m, validation, generator=seeded(0))) for m in models]
    best = models[losses.index(min(losses))]
    judged = hosm.ode_nll(best, test, solver=solver, divergence="exact", batch_size=64)
    numbers = {"nll": judged.nll.tolist(), "solver_error": float(judged.solver_error.mean())}
    return {"validation": losses} | numbers


def paired(above: list[float], below: list[float]) -> tuple[float, float]:
    """The mean difference over patches, and its standard error."""
    difference = np.subtract(above, below)
    return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)


def compared(rows: Row) -> Row:
    """The rows with their differences to "plain", once this is there."""
    for row in rows.values() if "plain" in rows else ():
        seeds = zip(row["seeds"], rows["plain"]["seeds"], strict=True)
        row["over plain"] = [paired(each["nll"], plain["nll"]) for each, plain in seeds]
    return rows


def continued(
    first: hosm.ScoreModel, stage: str, tiles: Tensor, sizes: Sizes, rate: float, seed: int
) -> hosm.ScoreModel:
    """The model at the end of a second stage, which leaves the first one as it is."""
    order, times = STAGES[stage]
    model, generator = deepcopy(first).requires_grad_(True), seeded(SEEDS + seed)
    loss = LOSSES[order](model)

    def value() -> Tensor:
        return loss(draw(tiles, sizes.batch, generator), generator=generator)

    experiment.train(model, value, times * sizes.second, rate=rate)
    return model.requires_grad_(False)


def ode_nll(model: hosm.ScoreModel, x: Tensor) -> hosm.NLLResult:
    how = {"divergence": hosm.Hutchinson(2), "batch_size": 64, "generator": seeded(0)}
    return hosm.ode_nll(model, x, clean=True, **how)


def interval(above: Tensor, below: Tensor) -> tuple[float, float, float]:
    """The mean difference over patches, and its 95 % interval."""
    mean, error = paired(above.tolist(), below.tolist())
    return mean, mean - 1.96 * error, mean + 1.96 * error


def second_stages(splits: tuple[Tensor, Tensor, Tensor], sizes: Sizes, seed: int) -> Row:
    """The gap after the first stage, and every second stage beside order one's."""
    tiles, *held_out = splits
    validation = draw(held_out[VALIDATION], sizes.validation, seeded(0))
    test = draw(held_out[TEST], sizes.test, seeded(0))
    first = trained("plain", tiles, sizes, RATES[1], seed)
    before, how = ode_nll(first, test).nll, {"batch_size": 64, "generator": seeded(0)}
    bound = hosm.variational_nll(first, test, samples=256, data_std=STD, **how).nll
    stages: dict[str, Row] = {}
    nll: dict[str, Tensor] = {}
    for stage in STAGES:
        models = [continued(first, stage, tiles, sizes, rate, seed) for rate in AFTER]
        means = [float(ode_nll(model, validation).nll.mean()) for model in models]
        best = means.index(min(means))
        judged = ode_nll(models[best], test)
        nll[stage], error = judged.nll, float(judged.solver_error.mean())
        stages[stage] = {"rate": AFTER[best], "validation": means, "solver_error": error}
        stages[stage] |= {"nll": float(judged.nll.mean()), "change": interval(judged.nll, before)}
    for stage, base in EQUAL.items():
        stages[stage]["over equal steps"] = interval(nll[stage], nll["one"])
        stages[stage]["over equal evaluations"] = interval(nll[stage], nll[base])
    return {"nll": float(before.mean()), "gap": interval(bound, before), "stages": stages}


def main() -> None:
    parser = experiment.parser(__doc__)
    parser.add_argument("--row", choices=ROWS, help="all of them by default")
    parser.add_argument("--second-stage", action="store_true", help="in place of rows")
    options, where = experiment.begin(parser)
    sizes = LONG if options.second_stage else Sizes()
    sizes = Sizes(30, 8, 8, 4, 2) if options.smoke else sizes
    splits = split(photographs())
    if options.second_stage:
        for seed in map(str, range(SEEDS)):
            if options.smoke or seed not in results.read(SECOND_FILE):
                found = second_stages(splits, sizes, int(seed))
                results.show(f"seed {seed}", found)
                if not options.smoke:
                    results.keep(SECOND_FILE, {seed: found | {"environment": where}})
        return
    for row in [options.row] if options.row else ROWS:
        if options.smoke or row not in results.read(FILE):
            seeds = [measure(row, splits, sizes, seed) for seed in range(SEEDS)]
            print(row, [float(np.mean(each["nll"])) for each in seeds], flush=True)
            if not options.smoke:
                found = {"seeds": seeds, "environment": where}
                results.write(FILE, compared(results.read(FILE) | {row: found}))
    print({row: found.get("over plain") for row, found in results.read(FILE).items()})


if __name__ == "__main__":
    main()
