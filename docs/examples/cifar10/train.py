"""Train an image model with a loss of any order, on one process or with torchrun on many.

    torchrun --nproc-per-node 8 train.py --data FOLDER --out one --sde ve --loss first
    torchrun --nproc-per-node 8 train.py --data FOLDER --out three --sde ve --loss paired3 \
        --init-from one/checkpoint.pt --steps 20000 --warmup 1000 --lr 5e-5
    # The control: order one continued for as many steps
    torchrun --nproc-per-node 8 train.py --data FOLDER --out more --sde ve --loss first \
        --init-from one/checkpoint.pt --steps 20000 --warmup 1000 --lr 5e-5

Repeating a command continues from OUT/checkpoint.pt, which SIGTERM writes as well. Everything
random in a step (the images, times, noise, probes and dropout) is drawn from a seed made of
--seed, the step and the rank. So a resumed run repeats the losses of a run that was never
stopped, and a checkpoint does not contain the state of a generator.
"""

import argparse
import copy
import json
import math
import signal
import threading
import time
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from checkpoints import check_same, digest, load, save, truncate_log
from cifar import batch_rows, prepared, write_stand_in
from cifar import load as load_images
from cost import Flops
from networks import model_of, objective
from options import HELD_OUT, read
from processes import Processes, sigterm
from score_sde import load_score_sde
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hosm_losses import check_derivatives, first_order_dsm

# Options that may not change when a run continues. Other options only affect how the run is
# computed or reported.
FIXED = (
    *("sde", "size", "dropout", "score_sde_config", "loss", "weights", "probes", "fraction"),
    *("times", "batch", "lr", "warmup", "cosine", "clip", "ema", "flip", "dequantize", "validate"),
    *("seed", "parts"),
)
NETWORK = ("sde", "size", "score_sde_config", "dequantize")
LEVELS, VALIDATED = 8, 100  # noise levels of a validation, and images at a time
ASKED_EVERY = 10  # steps after which several processes agree on whether to stop
LEAST_SHARE = 0.01  # share of the gradient's norm below which a term causes a warning


class Run:
    """The network in training, its average, and the state that a checkpoint stores."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.step, self.flops = args, 0, 0
        self.path, self.log = args.out / "checkpoint.pt", args.out / "log.jsonl"
        self.fixed = (*FIXED, "steps") if args.cosine else FIXED
        torch.manual_seed(args.seed)
        self.model = model_of(vars(args), args.score_sde_code)
        network = self.model.network
        resumed = load(self.path) if self.path.exists() else None
        self.origin = None  # what the weights were continued from
        if resumed is not None:
            check_same(resumed["options"], vars(args), self.fixed)
            self.step, self.flops = resumed["step"], resumed["flops"]
            self.origin = resumed["origin"]
        elif args.init_from is not None:
            first = load(args.init_from)
            check_same(first["options"], vars(args), NETWORK)
            if args.validate and not first["options"]["validate"]:
                raise ValueError(
                    "--validate: expected 0, as --init-from was trained on all training images; "
                    f"got {args.validate}. Train that checkpoint with --validate as well."
                )
            network.load_state_dict(first["ema"])
            self.origin = digest(first["ema"])
        elif args.score_sde_checkpoint is not None:
            load_score_sde(network, args.score_sde_checkpoint)
            self.origin = digest(network.state_dict())
        self.model.to(device)
        for weight in network.parameters() if args.bf16 else ():
            if weight.ndim == 4 and weight.shape[-1] > 1:  # convolutions, for tensor cores
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        higher = ("weights", "probes", "fraction") if args.loss != "first" else ()
        chosen = {name: getattr(args, name) for name in higher}
        self.objective = objective(self.model, args.loss, times=args.times, **chosen)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(weights, args.lr, fused=device.type == "cuda")
        if resumed is not None:
            self.objective.load_state_dict(resumed["objective"])
            self.average.network.load_state_dict(resumed["ema"])
            self.optimizer.load_state_dict(resumed["optimizer"])

    def save(self) -> None:
        """Write the checkpoint, and a permanent copy if --keep-every asks for one."""
        state = {
            "step": self.step,
            "flops": self.flops,
            "origin": self.origin,
            "options": {name: getattr(self.args, name) for name in (*FIXED, "steps")},
            "objective": self.objective.state_dict(),
            "ema": self.average.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save(self.path, state)
        if self.keeps():
            save(self.path.with_name(f"checkpoint-{self.step}.pt"), state)

    def keeps(self) -> bool:
        """Return whether --keep-every asks for a permanent checkpoint of this step."""
        return self.args.keep_every > 0 and self.step % self.args.keep_every == 0

    def write(self, entry: dict[str, Any], processes: Processes) -> None:
        """Add a line to the log, with the step."""
        if processes.rank == 0:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **entry}) + "\n")

    def update(self) -> torch.Tensor:
        """Take an optimizer step at the current learning rate; return the gradient's norm."""
        args, network = self.args, self.model.network
        norm = nn.utils.clip_grad_norm_(network.parameters(), args.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        decay = min(args.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = zip(self.average.parameters(), network.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, 1 - decay)
        self.step += 1
        return norm

    def rate(self) -> float:
        """Return the learning rate of the next step."""
        args = self.args
        rate = args.lr * min(1.0, (self.step + 1) / max(1, args.warmup))
        return rate * (1 + math.cos(math.pi * self.step / args.steps)) / 2 if args.cosine else rate


def train(
    run: Run,
    images: torch.Tensor,
    held_out: torch.Tensor,
    processes: Processes,
    terminated: threading.Event,
) -> None:
    """Take the remaining steps, or stop early at SIGTERM."""
    args, device = run.args, processes.device
    loss_of: nn.Module = run.objective.train()
    if processes.many:
        where = [device.index] if device.type == "cuda" else None
        loss_of = DistributedDataParallel(loss_of, device_ids=where)
    worst, flops, stops = torch.zeros((), device=device), 0, False
    logged, since = run.step, time.perf_counter()
    while run.step < args.steps and not stops:
        x0, seed = draw(images, run, processes)
        norms = {}
        if args.loss != "first" and run.step % args.shares_every == 0:
            norms = term_norms(run, loss_of, x0, seed)
        torch.manual_seed(seed)
        run.optimizer.zero_grad()
        with nullcontext() if flops else Flops() as counter:
            means = add_gradients(loss_of, x0, args)
        flops = flops or processes.count * counter.total  # the same in every step
        norm, rate = run.update().detach(), run.optimizer.param_groups[0]["lr"]
        run.flops += flops
        worst = torch.maximum(worst, norm)  # stays NaN once it is NaN

        if not processes.many or run.step % ASKED_EVERY == 0:
            stops = processes.any(terminated.is_set())
        last = stops or run.step == args.steps
        logs = last or run.step % args.log_every == 0
        saves = last or run.step % args.save_every == 0 or run.keeps()
        if (logs or saves or norms) and not torch.isfinite(worst):
            raise RuntimeError(
                f"expected finite gradients up to step {run.step}; got a norm of {float(worst)}. "
                f"{run.path}, if it exists, is from an earlier step. Use a smaller --lr or "
                "--clip, or leave out --bf16."
            )
        if norms:
            shares = {name: float(part / norm) for name, part in norms.items()}
            run.write({"shares": shares}, processes)
            warn_of_small(shares, processes)
        if logs:
            averaged = processes.mean(torch.stack([*means.values()]))
            entry = dict(zip(means, averaged, strict=True))
            entry |= {"grad_norm": float(norm), "lr": rate, "flops": run.flops}
            count, now = (run.step - logged) * args.batch, time.perf_counter()
            run.write({**entry, "images_per_second": count / (now - since)}, processes)
            logged, since = run.step, now
        if args.validate and run.step % args.validate == 0:
            validate(run, held_out, processes)
        if saves:
            processes.check_same_weights(run.model.network)
            if processes.rank == 0:
                run.save()


def draw(images: torch.Tensor, run: Run, processes: Processes) -> tuple[torch.Tensor, int]:
    """Return this process's batch for the next step, and the seed for the rest of the step."""
    args, rank = run.args, processes.rank
    place = {"step": run.step, "batch": args.batch, "rank": rank, "ranks": processes.count}
    rows = batch_rows(len(images), seed=args.seed, **place)
    sequence = np.random.SeedSequence([args.seed, run.step, rank])
    of_images, of_noise = sequence.generate_state(2, np.uint64).tolist()
    torch.manual_seed(of_images)
    batch = images[torch.from_numpy(rows).to(images.device)]
    return prepared(batch, flip=args.flip, dequantize=args.dequantize), of_noise


def add_gradients(
    loss_of: nn.Module, x0: torch.Tensor, args: argparse.Namespace, **options: Any
) -> dict[str, torch.Tensor]:
    """Accumulate the gradient of a batch in parts; return the mean loss and the mean terms."""
    means: dict[str, torch.Tensor] = {}
    parts = x0.chunk(args.parts)
    for place, part in enumerate(parts, 1):
        share = len(part) / len(x0)
        # The processes exchange their gradients in the last part.
        waits = isinstance(loss_of, DistributedDataParallel) and place < len(parts)
        with loss_of.no_sync() if waits else nullcontext():
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=args.bf16):
                loss, terms = loss_of(part, return_terms=True, **options)
            (share * loss).backward()
        for name, value in {"loss": loss, **terms._asdict()}.items():
            if value is not None:
                mean = share * value.detach().mean().double()
                means[name] = means.get(name, 0) + mean
    return means


def term_norms(run: Run, loss_of: nn.Module, x0: torch.Tensor, seed: int) -> dict[str, Any]:
    """Return the norm of the weighted gradient of each term whose weight is not zero.

    The terms use the times, noise, probes and dropout of the step itself, so their gradients add
    up to the gradient of the step. A term whose weight is a tensor of zero does not contribute to
    the loss, but the draws stay the same.
    """
    norms = {}
    for place, name in enumerate(("first", "second", "trace", "third")[: len(run.args.weights)]):
        if run.args.weights[place]:
            alone = [
                x0.new_tensor(w * (k == place)) if w else w for k, w in enumerate(run.args.weights)
            ]
            torch.manual_seed(seed)
            run.optimizer.zero_grad()
            add_gradients(loss_of, x0, run.args, weights=alone)
            gradients = [
                weight.grad for weight in run.model.parameters() if weight.grad is not None
            ]
            norms[name] = nn.utils.get_total_norm(gradients)
    return norms


def warn_of_small(shares: dict[str, float], processes: Processes) -> None:
    """Warn about terms that cost evaluations but hardly change the network."""
    for name in shares:
        if shares[name] < LEAST_SHARE and processes.rank == 0:
            warnings.warn(
                f"the gradient of the term {name!r} has less than {LEAST_SHARE:.0%} of the norm "
                "of the total gradient: the term costs evaluations and changes next to nothing. "
                "Raise its weight, or set it to 0; log.jsonl lists the shares.",
                stacklevel=2,
            )


@torch.no_grad()
def validate(run: Run, images: torch.Tensor, processes: Processes) -> None:
    """Log the order-one loss of the averaged weights on held-out images, by noise level."""
    args, schedule = run.args, run.model.schedule
    low, high = schedule.log_sigma_hat_range
    levels = low + (high - low) * (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    sums = torch.zeros(LEVELS + 1, dtype=torch.float64, device=images.device)
    torch.manual_seed(args.seed + processes.rank)  # the same noise every time
    for part in images[processes.rank :: processes.count].split(VALIDATED):
        x0 = prepared(part, flip=False, dequantize=args.dequantize)
        for place, t in enumerate(schedule.time(levels).tolist()):
            loss = first_order_dsm(run.average, x0, t=x0.new_full((len(x0),), t), reduction="sum")
            sums[place] += loss
        sums[-1] += len(x0)
    *totals, count = processes.mean(sums)
    losses = [total / count for total in totals]
    run.write({"log_sigma_hat": levels.tolist(), "validation": losses}, processes)


def main(argv: list[str] | None = None) -> None:
    """Make a stand-in, or train."""
    args = read(argv)
    if args.make_stand_in is not None:
        write_stand_in(args.make_stand_in)
        print(f"{args.make_stand_in}: generated pictures in the format of CIFAR-10")
        return
    processes = Processes()
    images = load_images(args.data, train=True)
    held_out = images[len(images) - len(images) // HELD_OUT :] if args.validate else images[:0]
    images = images[: len(images) - len(held_out)]
    if args.validate and len(held_out) < processes.count:
        raise ValueError(
            f"--validate: expected {HELD_OUT} training images or more for each process; got "
            f"{len(images)} for {processes.count}. Leave out --validate."
        )
    if args.batch % processes.count or not 0 < args.batch <= len(images):
        raise ValueError(
            f"--batch: expected a multiple of the {processes.count} processes, up to the "
            f"{len(images)} images; got {args.batch}."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args, processes.device)
    (mean,) = processes.mean(torch.tensor([float(run.step)]))
    if mean != run.step:
        raise RuntimeError(
            f"expected all processes to start from the same step; got {run.step} in process "
            f"{processes.rank} and {mean} on average. Pass an --out that all processes can read."
        )
    images, held_out = images.to(processes.device), held_out.to(processes.device)
    if args.score_sde_code is not None and args.loss != "first":
        # On a GPU, score_sde resamples with an operator whose derivatives PyTorch does not know.
        x0 = prepared(images[:2], flip=False, dequantize=args.dequantize)
        with torch.backends.cudnn.flags(allow_tf32=False):  # for finite differences
            print(check_derivatives(run.model.train(), x0, len(args.weights) - 1))
    if processes.rank == 0:
        truncate_log(run.log, run.step)
        size = sum(weight.numel() for weight in run.model.parameters())
        print(f"{args.loss}, {size / 1e6:.1f} million weights, from step {run.step}")
        if args.steps == 0 and not run.path.exists():
            run.save()  # for an evaluation of the start
    with sigterm() as terminated:
        train(run, images, held_out, processes, terminated)
    if processes.rank == 0:
        print(f"{processes.count} process(es) with one network at step {run.step}: {run.path}")
    processes.close()
    if run.step < args.steps:
        raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
