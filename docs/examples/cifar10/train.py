"""Train an image model with a loss of any order, on one process or with torchrun on many.

    python train.py --data FOLDER --out RUN --sde ve --loss first
    torchrun --nproc-per-node 8 train.py --data FOLDER --out RUN2 --sde ve --loss paired3 \
        --init-from RUN/checkpoint.pt

The same command again goes on from RUN/checkpoint.pt. All that is random in a step, the images,
the times, the noise, the probes and the dropout, is drawn from a seed made of --seed, the step and
the rank. So a resumed run repeats the losses of one that was never killed, and a checkpoint needs
no state of a generator.
"""

import argparse
import copy
import gc
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from checkpoints import check_same, load, save, truncate_log
from cifar import batch_rows, prepared, write_stand_in
from cifar import load as load_images
from networks import LOSSES, SIZES, TIMES, objective, score_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What may not change when a run goes on. The others only say how it is computed or reported.
FIXED = (
    *("sde", "size", "dropout", "loss", "weights", "probes", "fraction", "times", "batch", "lr"),
    *("warmup", "clip", "ema", "flip", "seed", "parts"),
)


def options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder of CIFAR-10's binary version")
    add("--make-stand-in", type=Path, help="write generated pictures there instead of training")
    add("--out", type=Path, default=Path("run"), help="folder of checkpoint.pt and log.jsonl")
    add("--init-from", type=Path, help="start from the averaged weights of this checkpoint")
    add("--sde", choices=("ve", "vp"), default="ve", help="noise schedule")
    add("--size", choices=SIZES, default="paper", help="network")
    add("--dropout", type=float, default=0.0, help="inside residual blocks")
    add("--loss", choices=LOSSES, default="first", help="order, and estimator")
    add("--weights", nargs="+", default=None, help="one for each term")
    add("--probes", type=int, default=None, help="random probes a sample; the loss's own if None")
    add("--fraction", type=float, default=1.0, help="part of a batch with higher terms")
    add("--parts", type=int, default=1, help="of a batch, one after the other, to save memory")
    add("--times", choices=TIMES, default="log_sigma_hat", help="what is uniform")
    add("--steps", type=int, default=500_000, help="of the whole run")
    add("--batch", type=int, default=128, help="images a step, of all processes together")
    add("--lr", type=float, default=2e-4, help="of Adam")
    add("--warmup", type=int, default=5000, help="steps in which the rate rises to --lr")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--ema", type=float, default=0.9999, help="decay of the averaged weights")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of all")
    add("--bf16", action="store_true", help="autocast the network to bfloat16")
    add("--seed", type=int, default=0, help="of everything random")
    add("--log-every", type=int, default=100, help="steps")
    add("--save-every", type=int, default=5000, help="steps")
    add("--keep-every", type=int, default=0, help="steps between checkpoints kept by number")
    args = parser.parse_args(argv)
    if args.make_stand_in is None and args.data is None:
        parser.error("expected --data FOLDER, or --make-stand-in FOLDER to make one")
    least = {
        "steps": 0,
        "batch": 1,
        "parts": 1,
        "warmup": 0,
        "log_every": 1,
        "save_every": 1,
        "keep_every": 0,
    }
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            shown = name.replace("_", "-")
            parser.error(f"--{shown}: expected {smallest} or more; got {getattr(args, name)}")
    if args.loss == "first":
        for name, default in (("weights", None), ("probes", None), ("fraction", 1)):
            if getattr(args, name) != default:
                parser.error(f"--{name}: expected none with --loss first, which has one term")
    args.weights = _weights(parser, args)
    return args


def _weights(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Any:
    """What --weights says, a list of numbers; None if it was not given."""
    if args.weights is None:
        return None
    try:
        numbers = [float(word) for word in args.weights]
    except ValueError:
        parser.error(f"--weights: expected numbers; got {' '.join(args.weights)}")
    expected = {"second": 3, "paired2": 3, "third": 4, "paired3": 4}[args.loss]
    if len(numbers) != expected:
        parser.error(f"--weights: expected {expected} with --loss {args.loss}; got {len(numbers)}")
    return numbers


class Processes:
    """This process among those that torchrun started, or alone."""

    def __init__(self) -> None:
        self.many = "RANK" in os.environ
        cuda = torch.cuda.is_available()
        if self.many:
            dist.init_process_group("nccl" if cuda else "gloo")
        self.rank = dist.get_rank() if self.many else 0
        self.count = dist.get_world_size() if self.many else 1
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)

    def mean(self, values: torch.Tensor) -> list[float]:
        """The mean over all processes, as numbers."""
        if self.many:
            dist.all_reduce(values)
        return (values / self.count).tolist()

    def check_same_weights(self, network: nn.Module) -> None:
        """Raise where the networks of the processes have come apart."""
        total = sum(each.detach().double().abs().sum() for each in network.parameters())
        (mean,) = self.mean(total.reshape(1).clone())
        if self.many and abs(mean - float(total)) > 1e-9 * abs(mean):
            raise RuntimeError(
                f"expected one network in all processes; the weights of process {self.rank} add "
                f"up to {float(total)}, in the mean to {mean}. Go on from the last checkpoint."
            )

    def close(self) -> None:
        """Leave together."""
        if self.many:
            gc.collect()  # DDP holds the group, in a cycle
            dist.barrier()
            dist.destroy_process_group()


class Run:
    """Network, average and optimizer of a run, at a step."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.step = args, 0
        self.path, self.log = args.out / "checkpoint.pt", args.out / "log.jsonl"
        torch.manual_seed(args.seed)
        self.model = score_model(args.sde, args.size, args.dropout).to(device)
        resumed = load(self.path) if self.path.exists() else None
        if resumed is None and args.init_from is not None:
            first = load(args.init_from)
            check_same(first["options"], vars(args), ("sde", "size"))
            self.model.network.load_state_dict(first["ema"])
        chosen = {name: getattr(args, name) for name in ("weights", "probes")}
        if args.loss != "first":
            chosen["fraction"] = args.fraction
        self.objective = objective(self.model, args.loss, times=args.times, **chosen).to(device)
        self.average = copy.deepcopy(self.model.network).eval().requires_grad_(False)
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, args.lr)
        if resumed is not None:
            check_same(resumed["options"], vars(args), FIXED)
            self.step = resumed["step"]
            self.objective.load_state_dict(resumed["objective"])
            self.average.load_state_dict(resumed["ema"])
            self.optimizer.load_state_dict(resumed["optimizer"])

    def save(self) -> None:
        """Write the checkpoint, and a copy that stays where --keep-every asks for one."""
        state = {
            "step": self.step,
            "options": {name: getattr(self.args, name) for name in FIXED},
            "objective": self.objective.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save(self.path, state)
        if self.kept_by_number():
            save(self.path.with_name(f"checkpoint-{self.step}.pt"), state)

    def kept_by_number(self) -> bool:
        """Whether --keep-every asks for a checkpoint of this step that stays."""
        return self.args.keep_every > 0 and self.step % self.args.keep_every == 0

    def update(self) -> torch.Tensor:
        """Take a step along the gradient, at the rate of this step; return the gradient's norm."""
        args, network = self.args, self.model.network
        norm = nn.utils.clip_grad_norm_(network.parameters(), args.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        decay = min(args.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        self.step += 1
        return norm

    def rate(self) -> float:
        """The learning rate of the step that comes."""
        return self.args.lr * min(1.0, (self.step + 1) / max(1, self.args.warmup))


def train(run: Run, images: torch.Tensor, processes: Processes) -> None:
    """Take the steps that are left."""
    args, device = run.args, processes.device
    where = [device.index] if device.type == "cuda" else None
    loss_of: nn.Module = run.objective.train()
    if processes.many:
        loss_of = DistributedDataParallel(loss_of, device_ids=where)
    worst = torch.zeros((), device=device)
    logged, since = run.step, time.perf_counter()
    bar = _progress(run.step, args.steps, shown=processes.rank == 0)
    while run.step < args.steps:
        chosen = {"batch": args.batch, "rank": processes.rank, "ranks": processes.count}
        rows = batch_rows(len(images), seed=args.seed, step=run.step, **chosen)
        seed = np.random.SeedSequence([args.seed, run.step, processes.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        x0 = prepared(images[torch.from_numpy(rows).to(device)], flip=args.flip)
        run.optimizer.zero_grad()
        means = _add_gradients(loss_of, x0, args)
        norm, rate = run.update().detach(), run.optimizer.param_groups[0]["lr"]
        worst = torch.maximum(worst, norm)  # not a number, once it was
        last = run.step == args.steps
        logs = last or run.step % args.log_every == 0
        saves = last or run.step % args.save_every == 0 or run.kept_by_number()
        if (logs or saves) and not torch.isfinite(worst):
            raise RuntimeError(
                f"expected finite gradients up to step {run.step}; got a norm of {float(worst)}. "
                f"{run.path} is from before, if there is one. Take a smaller --lr or --clip, or "
                "leave out --bf16."
            )
        if logs:
            every = processes.mean(torch.stack([*means.values()]))
            entry = {"step": run.step, **dict(zip(means, every, strict=True))}
            count, now = (run.step - logged) * args.batch, time.perf_counter()
            entry |= {"grad_norm": float(norm), "lr": rate}
            entry |= {"images_per_second": count / (now - since)}
            logged, since = run.step, now
            if processes.rank == 0:
                with run.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
        if saves:
            processes.check_same_weights(run.model.network)
            if processes.rank == 0:
                run.save()
        if bar is not None:
            bar.update()


def _add_gradients(
    loss_of: nn.Module, x0: torch.Tensor, args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """Accumulate the gradient of a batch in parts; return its loss and terms, averaged."""
    means: dict[str, torch.Tensor] = {}
    parts = x0.chunk(args.parts)
    for place, part in enumerate(parts, 1):
        share = len(part) / len(x0)
        # The processes exchange their gradients in the last part.
        waits = isinstance(loss_of, DistributedDataParallel) and place < len(parts)
        with loss_of.no_sync() if waits else nullcontext():
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=args.bf16):
                loss, terms = loss_of(part, return_terms=True)
            (share * loss).backward()
        for name, value in {"loss": loss, **terms._asdict()}.items():
            if value is not None:
                mean = share * value.detach().mean().double()
                means[name] = means.get(name, 0) + mean
    return means


def _progress(done: int, steps: int, *, shown: bool) -> Any:
    """A bar where tqdm is installed and somebody looks."""
    if not (shown and sys.stderr.isatty()):
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=done, total=steps)


def main(argv: list[str] | None = None) -> None:
    """Make a stand-in, or train."""
    args = options(argv)
    if args.make_stand_in is not None:
        write_stand_in(args.make_stand_in)
        print(f"{args.make_stand_in}: generated pictures in the format of CIFAR-10")
        return
    processes = Processes()
    images = load_images(args.data, train=True)
    if args.batch % processes.count or not 0 < args.batch <= len(images):
        raise ValueError(
            f"--batch: expected a multiple of the {processes.count} processes, up to the "
            f"{len(images)} images; got {args.batch}."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args, processes.device)
    (mean,) = processes.mean(torch.tensor([float(run.step)], device=processes.device))
    if mean != run.step:
        raise RuntimeError(
            f"expected all processes to start from one step; process {processes.rank} has "
            f"{run.step}, the mean is {mean}. --out has to be a folder that all of them see."
        )
    if processes.rank == 0:
        truncate_log(run.log, run.step)
        size = sum(each.numel() for each in run.model.parameters())
        print(f"{args.loss}, {args.sde}, {size / 1e6:.1f} million weights, from step {run.step}")
    train(run, images.to(processes.device), processes)
    if processes.rank == 0:
        print(f"{processes.count} process(es) with one network at step {run.step}: {run.path}")
    processes.close()


if __name__ == "__main__":
    main()
