"""Train an image model on CIFAR-10 with a loss of any order, and compare bits per dimension.

    python cifar10.py pictures FOLDER   # synthetic pictures in CIFAR-10's format, for a trial run
    torchrun --nproc-per-node 8 cifar10.py train FOLDER one --loss first
    torchrun --nproc-per-node 8 cifar10.py train FOLDER three --loss paired3 --init-from one \
        --steps 20000 --warmup 1000 --lr 5e-5
    # The control: order one continued for the same number of steps
    torchrun --nproc-per-node 8 cifar10.py train FOLDER more --loss first --init-from one \
        --steps 20000 --warmup 1000 --lr 5e-5
    torchrun --nproc-per-node 8 cifar10.py evaluate FOLDER one more three

Rerunning a command continues from its last checkpoint. All random numbers of a step are drawn from
a seed that combines --seed, the step and the rank. Therefore, a resumed run has the same losses as
an uninterrupted one, and checkpoints contain no generator state.
"""

import argparse
import copy
import json
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hosm_losses as hosm

# Channels at each resolution, residual blocks at each resolution, and groups of each group norm.
# "deep" has 8 blocks, like the paper's deep networks.
SIZES = {
    "tiny": ((8, 32), 1, 4),
    "small": ((32, 64, 64), 2, 8),
    "paper": ((128, 256, 256, 256), 4, 32),
    "deep": ((128, 256, 256, 256), 8, 32),
}
LOSSES = {
    "first": hosm.FirstOrderDSM,
    "second": hosm.SecondOrderDSM,
    "third": hosm.ThirdOrderDSM,
    "paired2": partial(hosm.SecondOrderDSM, probes=hosm.Paired()),
    "paired3": partial(hosm.ThirdOrderDSM, probes=hosm.Paired()),
}
RECORD = 1 + 3 * 32 * 32  # a label from 0 to 9 and the pixels, red first, row by row
TRAIN, TEST = [f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"]
HELD_OUT, LEVELS = 50, 8  # one training image in 50 is held out; noise levels of a validation
CLIP = 1.0  # largest norm of the gradient
FREE = ("run", "data", "out", "log_every", "validate", "save_every")  # may change in a run


def read_images(folder: Path, names: list[str]) -> Tensor:
    """Return the images of CIFAR-10's binary files, uint8 (N, 3, 32, 32)."""
    parts = [np.fromfile(folder / name, np.uint8) for name in names]
    for name, part in zip(names, parts, strict=True):
        if not len(part) or len(part) % RECORD or part[::RECORD].max() > 9:
            raise ValueError(
                f"{folder / name}: expected records of {RECORD} bytes that begin with a label "
                f"from 0 to 9; got {len(part)} bytes. Unpack CIFAR-10's binary version again."
            )
    pixels = np.concatenate(parts).reshape(-1, RECORD)[:, 1:]
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32))


def write_pictures(folder: Path, records: int = 400) -> None:
    """Write smooth synthetic pictures in the format of CIFAR-10, `records` per file."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for name in TRAIN + TEST:
        coarse = 256 * torch.rand(records, 3, 4, 4, generator=generator)
        smooth = nn.functional.interpolate(coarse, size=32, mode="bilinear")
        rough = smooth + 3 * torch.randn(smooth.shape, generator=generator)
        pixels = rough.clamp(0, 255).to(torch.uint8).flatten(1)
        torch.cat([pixels[:, :1] % 10, pixels], 1).numpy().tofile(folder / name)


def new_model(sde: str, size: str, dropout: float) -> hosm.ScoreModel:
    """Return a model with a new network: diffusers' UNet2DModel with attention at 16 x 16.

    Its options make it resemble DDPM++ ("vp", which predicts the noise) and NCSN++ ("ve", which
    divides the output of its last layer by σ and so predicts the score). Data in [-1, 1] have
    twice the scale of data in [0, 1], hence σ from 0.02 to 100 instead of the 0.01 to 50 in the
    paper's code.
    """
    channels, layers, groups = SIZES[size]
    if sde == "ve":  # its blocks have group norms of 32 groups
        channels = tuple(max(32, width) for width in channels)
    skip = "Skip" if sde == "ve" else ""
    down = [f"{skip}DownBlock2D"] * len(channels)
    down[1] = f"Attn{skip}DownBlock2D"
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        norm_num_groups=groups,
        norm_eps=1e-6,
        attention_head_dim=None,  # one head
        dropout=dropout,
        time_embedding_type="fourier" if sde == "ve" else "positional",
        mid_block_scale_factor=2**0.5 if sde == "ve" else 1,
    )
    output = attrgetter("sample")
    if sde == "vp":
        return hosm.ScoreModel(network, hosm.VPSchedule(), "epsilon", time=999.0, output=output)
    schedule = hosm.VESchedule(sigma_min=0.02, sigma_max=100.0)
    return hosm.ScoreModel(network, schedule, "score", time=schedule.sigma, output=output)


def new_objective(model: hosm.ScoreModel, args: argparse.Namespace) -> nn.Module:
    """Return the loss module, with times drawn uniformly in log σ̂ for every term."""
    low, high = model.schedule.log_sigma_hat_range

    def times(batch: int, generator: torch.Generator | None) -> Tensor:
        unit = torch.rand(batch, generator=generator, device=next(model.parameters()).device)
        return model.schedule.time(low + (high - low) * unit)

    options: dict[str, Any] = {"weights": args.weights, "fraction": args.fraction}
    return LOSSES[args.loss](
        model, time_sampler=times, **(options if args.loss != "first" else {})
    )


def start() -> tuple[int, int, torch.device]:
    """Join torchrun's processes; return the rank, the number of processes and the device."""
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def summed(values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def load(run: Path) -> dict[str, Any]:
    """Return the checkpoint of a run, on the CPU."""
    return torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)


class Training:
    """The network being trained, the average of its weights, and the optimizer."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.args, self.step, self.options = args, 0, dict(vars(args))
        for name in FREE:
            del self.options[name]
        self.model = new_model(args.sde, args.size, args.dropout)
        saved = load(args.out) if (args.out / "checkpoint.pt").exists() else None
        if saved is None and args.init_from is not None:
            self.model.network.load_state_dict(load(Path(args.init_from))["ema"])
        self.model.to(device)
        self.objective = new_objective(self.model, args).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), args.lr)
        if saved is not None:
            if saved["options"] != self.options:
                raise ValueError(
                    f"expected the options of {args.out}/checkpoint.pt, {saved['options']}; got "
                    f"{self.options}. Choose another folder for another run."
                )
            self.step = saved["step"]
            self.objective.load_state_dict(saved["objective"])
            self.average.network.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])

    def save(self) -> None:
        """Write the checkpoint; if the process is killed, the old checkpoint remains."""
        state = {"step": self.step, "options": self.options}
        state |= {"objective": self.objective.state_dict()}
        state |= {"ema": self.average.network.state_dict()}
        partial_file = self.args.out / "checkpoint.partial"
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, partial_file)
        partial_file.replace(self.args.out / "checkpoint.pt")

    def update(self) -> Tensor:
        """Take an Adam step and update the average; return the norm of the gradient.

        If the stage continues another one, the learning rate decays to 0 along a half cosine and,
        by default, the weights are averaged over a tenth of the steps.
        """
        args, continues = self.args, self.args.init_from is not None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        rate = args.lr * min(1.0, (self.step + 1) / max(1, args.warmup))
        if continues:
            rate *= (1 + math.cos(math.pi * self.step / args.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        own = max(0.0, 1 - 10 / args.steps) if continues else 0.9999
        decay = own if args.ema is None else args.ema
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, 1 - decay)
        self.step += 1
        return norm


@lru_cache(maxsize=1)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the images in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batches(images: Tensor, run: Training, rank: int, count: int) -> Iterator[Tensor]:
    """Yield this process's images for each remaining step, dequantized and randomly mirrored.

    Images that do not fill a batch at the end of an epoch are skipped.
    """
    args = run.args
    while run.step < args.steps:
        epoch, place = divmod(run.step, len(images) // args.batch)
        rows = order(len(images), args.seed, epoch)[place * args.batch :][: args.batch]
        seeds = np.random.SeedSequence([args.seed, run.step, rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        x = dequantized(images[torch.from_numpy(rows[rank::count]).to(images.device)])
        yield torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def dequantized(images: Tensor) -> Tensor:
    """Return uint8 images as floats in [-1, 1], with uniform noise within each level."""
    return -1 + 2 * (images.float() + torch.rand(images.shape, device=images.device)) / 256


def train(args: argparse.Namespace) -> None:
    """Take the remaining steps; log, validate and save checkpoints."""
    rank, count, device = start()
    images = read_images(args.data, TRAIN)
    held_out, images = images[: len(images) // HELD_OUT], images[len(images) // HELD_OUT :]
    if args.batch % count or not 0 < args.batch <= len(images):
        raise ValueError(
            f"--batch: expected a multiple of the {count} processes, up to the {len(images)} "
            f"images; got {args.batch}."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    run = Training(args, device)
    loss_of: nn.Module = run.objective
    if dist.is_initialized():
        loss_of = DistributedDataParallel(loss_of)
    for x0 in batches(images.to(device), run, rank, count):
        run.optimizer.zero_grad()
        means = add_gradients(loss_of, x0, args)
        norm = run.update()
        last, log = run.step == args.steps, {"step": run.step}
        saves = last or run.step % args.save_every == 0
        if last or saves or run.step % args.log_every == 0:
            log |= {name: float(summed(mean) / count) for name, mean in means.items()}
            log |= {"grad_norm": float(norm), "lr": run.optimizer.param_groups[0]["lr"]}
            if not math.isfinite(log["grad_norm"]):
                raise RuntimeError(f"step {run.step}: the gradient is not finite. Lower --lr.")
        if last or run.step % args.validate == 0:
            log["validation"] = validation(run, held_out.to(device), rank, count)
        if rank == 0 and len(log) > 1:
            with (args.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(log) + "\n")
        if rank == 0 and saves:
            run.save()


def add_gradients(loss_of: nn.Module, x0: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Accumulate the gradient of a batch in parts; return the mean loss and the mean terms."""
    means: dict[str, Tensor] = {}
    parts = x0.chunk(args.parts)
    for place, part in enumerate(parts, 1):
        # The processes exchange gradients only in the last part.
        waits = isinstance(loss_of, DistributedDataParallel) and place < len(parts)
        with loss_of.no_sync() if waits else nullcontext():
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=args.bf16):
                loss, terms = loss_of(part, return_terms=True)
            share = len(part) / len(x0)
            (share * loss).backward()
        for name, value in {"loss": loss, **terms._asdict()}.items():
            if value is not None:
                means[name] = means.get(name, 0) + share * value.detach().mean().double()
    return means


@torch.no_grad()
def validation(run: Training, images: Tensor, rank: int, count: int) -> list[float]:
    """Return the order-one loss of the averaged weights on held-out images, by noise level."""
    low, high = run.model.schedule.log_sigma_hat_range
    levels = low + (high - low) * (torch.arange(LEVELS).double() + 0.5) / LEVELS
    sums = torch.zeros(LEVELS, dtype=torch.float64, device=images.device)
    torch.manual_seed(rank)  # the same noise every time
    for part in images[rank::count].split(100):
        x0 = dequantized(part)
        for place, t in enumerate(run.model.schedule.time(levels).tolist()):
            times = torch.full((len(x0),), t, device=x0.device)
            sums[place] += hosm.first_order_dsm(run.average, x0, t=times, reduction="sum")
    return (summed(sums) / len(images)).tolist()


def bits_of(run: Path, images: Tensor, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the bits per dimension of every image; NaN where a path failed.

    The random numbers of a batch depend only on its index, so all runs use the same numbers.
    """
    rank, count, device = start()
    saved = load(run)
    options = saved["options"]
    model = new_model(options["sde"], options["size"], 0.0).to(device).eval()
    model.network.load_state_dict(saved["ema"])
    divergence, solver = hosm.Hutchinson(1, "dct"), hosm.FixedGrid(args.steps)
    ode = partial(hosm.ode_nll, model, divergence=divergence, solver=solver)
    likelihoods = {
        "ODE": ode,  # from t_min on, as most papers report it
        "ODE, clean data": partial(ode, clean=True),
        "SDE, bound": partial(hosm.variational_nll, model),
    }
    bits = torch.zeros(len(likelihoods), len(images), dtype=torch.float64, device=device)
    for number, rows in enumerate(torch.arange(len(images)).split(args.batch)):
        for row, likelihood in zip(bits, likelihoods.values(), strict=True):
            if number % count == rank:
                drawn = torch.Generator(device).manual_seed(number)
                x, how = images[rows].to(device), {"dequantization": hosm.Uniform()}
                row[rows.to(device)] = likelihood(x, generator=drawn, **how).bits_per_dim()
    return dict(zip(likelihoods, summed(bits).tolist(), strict=True))


def evaluate(args: argparse.Namespace) -> None:
    """Print all runs' bits per dimension, and the last run's paired differences from others."""
    torch.backends.cudnn.allow_tf32 = False
    rank, _, _ = start()
    images, found = read_images(args.data, TEST)[: args.limit], {}
    for run in args.runs:
        found[str(run)] = bits_of(run, images, args)
        if rank == 0:
            (run / "evaluation.json").write_text(json.dumps(found[str(run)]), encoding="utf-8")
    *others, last = found
    for quantity in found[last] if rank == 0 else ():
        rows = {name: np.array(each[quantity]) for name, each in found.items()}
        rows |= {f"{last} less {other}": rows[last] - rows[other] for other in others}
        kept = np.isfinite([*rows.values()]).all(0)  # images that failed in no run
        print(f"{quantity}, {kept.sum()} of {len(images)} images")
        for name, values in rows.items() if kept.sum() > 1 else ():
            mean, error = values[kept].mean(), values[kept].std(ddof=1) / kept.sum() ** 0.5
            print(f"  {name}: {mean:.4f} ± {error:.4f} bits/dim")


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run its command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("pictures", help="write generated pictures")
    command.set_defaults(run=lambda args: write_pictures(args.data))
    command.add_argument("data", type=Path)
    add = (command := commands.add_parser("train", help="train, or continue")).add_argument
    command.set_defaults(run=train)
    add("data", type=Path, help="folder of CIFAR-10's binary version")
    add("out", type=Path, help="folder of checkpoint.pt and log.jsonl")
    add("--init-from", help="run whose averaged weights are continued")
    add("--sde", choices=("ve", "vp"), default="ve")
    add("--size", choices=SIZES, default="paper")
    add("--dropout", type=float, default=0.1)
    add("--loss", choices=LOSSES, default="first")
    add("--weights", type=float, nargs="+", help="of the terms")
    add("--fraction", type=float, default=1.0, help="part of a batch with higher-order terms")
    add("--parts", type=int, default=1, help="of a batch, one after the other, to save memory")
    add("--steps", type=int, default=500_000)
    add("--batch", type=int, default=128, help="of all processes together")
    add("--lr", type=float, default=2e-4)
    add("--warmup", type=int, default=5000, help="steps in which the rate rises to --lr")
    add("--ema", type=float, help="decay of the averaged weights")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=100, help="steps")
    add("--validate", type=int, default=5000, help="steps")
    add("--save-every", type=int, default=5000, help="steps")
    add = (command := commands.add_parser("evaluate", help="bits per dimension")).add_argument
    command.set_defaults(run=evaluate)
    add("data", type=Path, help="folder of CIFAR-10's binary version")
    add("runs", type=Path, nargs="+", help="folders of runs; the last is compared with the others")
    add("--limit", type=int, default=10_000, help="images of the test set")
    add("--batch", type=int, default=100, help="images at a time")
    add("--steps", type=int, default=64, help="of the ODE's solver")
    args = parser.parse_args(argv)
    args.run(args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
