"""Bits per dimension of the test set by the ODE, the SDE's bound, their gap, and samples.

    python evaluate.py --checkpoint RUN/checkpoint.pt --data FOLDER
    torchrun --nproc-per-node 8 evaluate.py --checkpoint RUN/checkpoint.pt --data FOLDER

It evaluates the averaged weights, without TF32, and writes evaluation.json beside the checkpoint,
with the bits of every image:

    uniform             by the ODE, for images with uniform noise on their levels, from t_min on
    truncated normal    by the ODE, for images with normal noise whose std is a sixth of a cell
    clean               like uniform, but for clean data: noise is added to reach t_min
    bound               by the bound of the SDE, for the same points
    gap                 bound less clean

All random numbers for a batch of images are drawn from a seed made of --seed and the batch's
number. So the results do not depend on the number of processes, and two checkpoints get the same
draws.
"""

import argparse
import json
import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from checkpoints import digest, load
from cifar import SHAPE
from cifar import load as load_images
from compare import read, table
from networks import model_of
from PIL import Image
from processes import Processes

from hosm_losses import (
    FixedGrid,
    Hutchinson,
    NLLResult,
    ScoreModel,
    TruncatedNormal,
    Uniform,
    ode_nll,
    ode_sample,
    variational_nll,
)

NUMBERS = ("nll", "nfe", "standard_error", "solver_error", "products", "failed")
SETTINGS = ("limit", "batch", "steps", "probes", "distribution", "levels", "seed")
NARROWEST = 2 / 255 / 6  # σ/α at which TruncatedNormal starts


def options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="written by train.py")
    add("--data", type=Path, required=True, help="folder of CIFAR-10's binary version")
    add("--out", type=Path, help="folder of evaluation.json and samples.png")
    add("--score-sde-code", type=Path, help="checkout of the network's code, if it is score_sde's")
    add("--beside", type=Path, nargs="+", default=[], help="evaluated runs to compare it with")
    add("--limit", type=int, default=10_000, help="images of the test set, from its start")
    add("--batch", type=int, default=100, help="images at a time, in each process")
    add("--steps", type=int, default=64, help="of the ODE's solver")
    add("--probes", type=int, default=1, help="random probes at every step")
    add("--distribution", default="dct", help="of the probes")
    add("--levels", type=int, default=64, help="noise levels of the bound, an even number")
    add("--samples", type=int, default=64, help="drawn by the ODE; 0 for none")
    add("--seed", type=int, default=0, help="of everything random")
    args = parser.parse_args(argv)
    for name, least in {"limit": 1, "batch": 1, "steps": 4, "probes": 1, "samples": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected {least} or more; got {getattr(args, name)}")
    if args.levels < 2 or args.levels % 2:
        parser.error(f"--levels: expected an even number of 2 or more; got {args.levels}")
    return args


def of_all(
    likelihood: Callable[..., NLLResult],
    images: torch.Tensor,
    dequantization: Uniform | TruncatedNormal,
    args: argparse.Namespace,
    processes: Processes,
) -> tuple[NLLResult, dict[int, str]]:
    """Return the likelihood of all images, and the reasons of failures by row.

    Every process evaluates some batches. If a batch raises an error, all its images have failed.
    """
    numbers = torch.zeros(len(images), len(NUMBERS), dtype=torch.float64, device=processes.device)
    starts, failures = range(0, len(images), args.batch), dict[int, str]()
    for number in range(processes.rank, len(starts), processes.count):
        rows = range(len(images))[starts[number] : starts[number] + args.batch]
        part = slice(rows.start, rows.stop)
        seed = np.random.SeedSequence([args.seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator(processes.device).manual_seed(int(seed[0]))
        x = images[part].to(processes.device)
        try:
            result = likelihood(x, dequantization=dequantization, generator=generator)
        except Exception as error:  # the other batches are still evaluated and written
            failures |= dict.fromkeys(rows, f"{type(error).__name__}: {error}")
            numbers[part] = torch.nan
            continue
        failures |= {rows[row]: text for row, text in result.failures().items()}
        for column, name in enumerate(NUMBERS):
            value = getattr(result, name)
            numbers[part, column] = torch.nan if value is None else value.double()
    if processes.many:
        dist.all_reduce(numbers)
    columns = dict(zip(NUMBERS, numbers.unbind(1), strict=True))
    failed = columns.pop("failed") != 0  # true for NaN as well
    columns = {k: None if bool(v.isnan().all()) else v for k, v in columns.items()}  # unknown
    columns |= {name: numbers[:, NUMBERS.index(name)] for name in ("nll", "nfe")}
    latent = numbers.new_zeros(()).expand(len(images), *SHAPE)  # only the size matters
    quantization = dequantization.quantization
    result = NLLResult(**columns, latent=latent, failed=failed, quantization=quantization)
    return result, dict(sorted(processes.merged(failures).items()))


@torch.no_grad()
def save_samples(model: ScoreModel, path: Path, args: argparse.Namespace) -> None:
    """Draw samples by the ODE, remove the noise of t_min, and save them as one picture."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(args.seed)
    ode = {"solver": FixedGrid(args.steps), "divergence": None, "batch_size": args.batch}
    x = ode_sample(model, (args.samples, *SHAPE), generator=generator, **ode).x
    t_min = torch.full((len(x),), model.schedule.t_min, device=device)
    parts = zip(x.split(args.batch), t_min.split(args.batch), strict=True)
    x = torch.cat([model.denoise(*part) for part in parts])
    columns = int(np.ceil(len(x) ** 0.5))
    x = torch.nn.functional.pad(x, (1, 1, 1, 1), value=1.0)  # white lines between the samples
    blanks = x.new_ones(-len(x) % columns, *x.shape[1:])
    rows = torch.cat([x, blanks]).unflatten(0, (-1, columns))
    pixels = ((rows + 1) * 128).floor().clamp(0, 255).to(torch.uint8)
    grid = pixels.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(grid.cpu().numpy()).save(path)


def evaluate(
    model: ScoreModel,
    images: torch.Tensor,
    report: dict[str, Any],
    path: Path,
    args: argparse.Namespace,
    processes: Processes,
) -> list[str]:
    """Add all quantities to the report, and write each quantity before it is summarised.

    Returns:
        The names of the quantities that are missing for all images.
    """
    ode = partial(ode_nll, model, solver=FixedGrid(args.steps))
    ode = partial(ode, divergence=Hutchinson(args.probes, args.distribution))
    bound = partial(variational_nll, model, samples=args.levels)
    likelihoods = {
        "uniform": (ode, Uniform()),
        "truncated normal": (ode, TruncatedNormal()),
        "clean": (partial(ode, clean=True), Uniform()),
        "bound": (bound, Uniform()),
    }
    lowest = math.exp(model.schedule.log_sigma_hat_range[0])
    if lowest > NARROWEST:
        del likelihoods["truncated normal"]
        report["truncated normal"] = {"left_out": f"σ/α starts at {lowest:.2g} > {NARROWEST:.2g}"}
    empty = []
    for name, (likelihood, dequantization) in likelihoods.items():
        result, failures = of_all(likelihood, images, dequantization, args, processes)
        bits = result.bits_per_dim().tolist()
        bits = [number if math.isfinite(number) else None for number in bits]
        report[name] = {"bits": bits, "failures": failures}
        write(report, path, processes)
        if all(number is None for number in bits):
            empty.append(name)
        elif processes.rank == 0:
            print(f"{name}: {result.summary()}")
        if failures and processes.rank == 0:
            first = next(iter(failures))
            rows = ", ".join(map(str, failures))
            print(f"{name}: failed images {rows}; image {first}: {failures[first]}")
    pairs = zip(report["bound"]["bits"], report["clean"]["bits"], strict=True)
    report["gap"] = {"bits": [None if None in pair else pair[0] - pair[1] for pair in pairs]}
    write(report, path, processes)
    return empty


def write(report: dict[str, Any], path: Path, processes: Processes) -> None:
    """Write the report, from one process only."""
    if processes.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Evaluate the averaged weights of a checkpoint."""
    args = options(argv)
    state = load(args.checkpoint)
    out = args.out or args.checkpoint.parent
    beside = {str(folder): read(folder) for folder in args.beside}
    images = load_images(args.data, train=False)[: args.limit]
    processes = Processes()
    model = model_of(state["options"], args.score_sde_code).to(processes.device).eval()
    model.network.load_state_dict(state["ema"])
    settings = {name: getattr(args, name) for name in SETTINGS}
    report = {name: state[name] for name in ("step", "flops", "origin", "options")}
    report |= {"weights": digest(state["ema"]), "settings": settings}
    settings |= {"limit": len(images), "images": zlib.crc32(images.numpy().tobytes())}
    settings |= {"device": processes.device.type}  # the draws depend on it
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(allow_tf32=False):
        empty = evaluate(model, images, report, out / "evaluation.json", args, processes)
        if processes.rank == 0:
            print(table({**beside, str(out): report}))
            if args.samples and not empty:
                save_samples(model, out / "samples.png", args)
    processes.close()
    if empty:
        raise SystemExit(f"expected an image without failure; got none of {', '.join(empty)}")


if __name__ == "__main__":
    main()
