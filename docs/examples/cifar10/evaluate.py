"""Bits per dimension of the test set by the ODE, the SDE's bound beside it, and samples.

    python evaluate.py --checkpoint RUN/checkpoint.pt --data FOLDER
    torchrun --nproc-per-node 8 evaluate.py --checkpoint RUN/checkpoint.pt --data FOLDER

It writes evaluation.json, with the bits of every image, and samples.png, beside the checkpoint.
What is random in a batch of images is drawn from a seed made of --seed and the batch's number. So
the numbers do not depend on the number of processes, and two checkpoints are given the same draws.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from checkpoints import load
from cifar import SHAPE
from cifar import load as load_images
from networks import score_model
from PIL import Image
from train import Processes

from hosm_losses import (
    FixedGrid,
    Hutchinson,
    NLLResult,
    ScoreModel,
    Uniform,
    ode_nll,
    ode_sample,
    variational_nll,
)

NUMBERS = ("nll", "nfe", "standard_error", "solver_error", "failed")
QUANTIZED = {"levels": 256, "low": -1, "high": 1}


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
    add("--images", type=int, default=10_000, help="of the test set, from its start")
    add("--batch", type=int, default=100, help="images at a time, in each process")
    add("--steps", type=int, default=64, help="of the ODE's solver")
    add("--probes", type=int, default=1, help="random probes at every step")
    add("--distribution", default="dct", help="of the probes")
    add("--clean", action="store_true", help="images as data without noise, as the bound has them")
    add("--levels", type=int, default=64, help="noise levels of the bound, an even number")
    add("--samples", type=int, default=64, help="drawn by the ODE; 0 for none")
    add("--seed", type=int, default=0, help="of everything random")
    args = parser.parse_args(argv)
    for name, least in {"images": 1, "batch": 1, "steps": 4, "probes": 1, "samples": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected {least} or more; got {getattr(args, name)}")
    if args.levels < 2 or args.levels % 2:
        parser.error(f"--levels: expected an even number of 2 or more; got {args.levels}")
    return args


def of_all(
    likelihood: Callable[..., NLLResult],
    images: torch.Tensor,
    args: argparse.Namespace,
    processes: Processes,
) -> NLLResult:
    """Return the likelihood of all images; every process evaluates some batches of them."""
    table = torch.zeros(len(images), len(NUMBERS), dtype=torch.float64, device=processes.device)
    starts = range(0, len(images), args.batch)
    for number in range(processes.rank, len(starts), processes.count):
        rows = slice(starts[number], starts[number] + args.batch)
        seed = np.random.SeedSequence([args.seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator(processes.device).manual_seed(int(seed[0]))
        x = images[rows].to(processes.device)
        result = likelihood(x, dequantization=Uniform(), generator=generator)
        for column, name in enumerate(NUMBERS):
            value = getattr(result, name)
            table[rows, column] = torch.nan if value is None else value.double()
    if processes.many:
        dist.all_reduce(table)
    nll, nfe, standard_error, solver_error, failed = table.unbind(1)
    known = None if bool(standard_error.isnan().all()) else standard_error
    latent = table.new_zeros(()).expand(len(images), *SHAPE)  # only its size counts
    return NLLResult(nll, latent, nfe, known, solver_error, failed > 0)


@torch.no_grad()
def save_samples(model: ScoreModel, path: Path, args: argparse.Namespace) -> None:
    """Draw samples by the ODE, take off the noise of t_min, and save them as one picture."""
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


def main(argv: list[str] | None = None) -> None:
    """Evaluate the averaged weights of a checkpoint."""
    args = options(argv)
    state = load(args.checkpoint)
    kept = state["options"]
    images = load_images(args.data, train=False)[: args.images]
    processes = Processes()
    model = score_model(kept["sde"], kept["size"]).to(processes.device).eval()
    model.network.load_state_dict(state["ema"])
    ode = {"solver": FixedGrid(args.steps), "clean": args.clean}
    ode["divergence"] = Hutchinson(args.probes, args.distribution)
    named = {
        "ode": partial(ode_nll, model, **ode),
        "sde_bound": partial(variational_nll, model, samples=args.levels),
    }
    out = args.out or args.checkpoint.parent
    found = {"step": state["step"], "options": kept, "clean": args.clean, "seed": args.seed}
    for name, likelihood in named.items():
        result = of_all(likelihood, images, args, processes)
        summary = result.summary(**QUANTIZED)
        bits = result.bits_per_dim(**QUANTIZED).tolist()
        bits = [value if np.isfinite(value) else None for value in bits]
        found[name] = {**asdict(summary), "bits": bits}
        if processes.rank == 0:
            print(f"{name}: {summary}")
            out.mkdir(parents=True, exist_ok=True)
            (out / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    if processes.rank == 0 and args.samples:
        save_samples(model, out / "samples.png", args)
    processes.close()


if __name__ == "__main__":
    main()
