"""What a training step of each order costs on a CUDA GPU, eager and compiled.

    python -m benchmarks.gpu [--batch 128 48] [--compile] [--out FILE.json] [--dirty | --smoke]

A U-Net of 54 million parameters, about the size of DDPM++, on 3×32×32, with new weights. A step is
loss and backward pass. fp32 is as PyTorch has it, convolutions in TF32; bf16 is torch.autocast.

    gradient      error, relative, of the parameter gradient on at most 8 samples against reverse
                  mode
    step          ms between CUDA events, the median over rounds in which the variants take turns,
                  each after a step of its own so that the host is ahead. memory, peak bytes above
                  those before. sync, where PyTorch's debug mode saw the host wait, or null.
    compiled      With --compile: ms and memory of the compiled loss, seconds of its first step.

What fails is recorded as "failed". --smoke takes a tiny network and no TF32, and exits with an
error where a loss is not finite, or in fp32 a gradient wrong by 1e-4. It works on a CPU, without
what needs CUDA.
"""

import gc
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import Row, parser, reason
from benchmarks.networks import UNet
from benchmarks.results import said
from benchmarks.steps import VARIANTS, loss_of

Step = Callable[[], object]
# Four probes would take four times the memory.
MEASURED = {key: variant for key, variant in VARIANTS.items() if "probes" not in variant}
WARM_UP, ROUNDS = 3, 7
LARGE, SMALL = (128, (1, 2, 2, 2), 5), (8, (1, 2), 1)


class Job:
    """A network and a batch, on which the variants are measured."""

    def __init__(self, setting: Namespace) -> None:
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = not setting.smoke
        self.bf16, self.device = setting.precision == "bf16", torch.device(setting.device)
        self.network = UNet(*SMALL if setting.smoke else LARGE).to(self.device)
        self.model = hosm.ScoreModel(self.network, hosm.VPSchedule())
        size = 8 if setting.smoke else 32
        self.x0 = torch.randn(setting.batch, 3, size, size, device=self.device)

    def step(self, variant: Row) -> Step:
        """A training step of a variant."""
        loss = loss_of(self.model, **variant)

        def step() -> None:
            self.network.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                value = loss(self.x0)
            value.backward()
            self.loss = value.detach()

        return step

    def gradient(self, variant: Row) -> Tensor:
        """All parameter gradients after a step that draws the same for every variant."""
        step = self.step(variant)
        torch.manual_seed(1)
        step()
        pairs = [(p.detach(), p.grad) for p in self.network.parameters()]
        return torch.cat([(0 * p if grad is None else grad).flatten() for p, grad in pairs])

    def peak(self, step: Step) -> int:
        """Peak bytes of a step above those before."""
        for _ in range(WARM_UP):
            step()
        self.free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        self.network.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()  # nothing without CUDA

    def attempt(self, measure: Callable[..., Row], *args: object) -> Row:
        """What is measured, or why not."""
        self.free()
        try:
            return measure(self, *args)
        except Exception as error:
            return {"failed": reason(error)}


def checked(job: Job, variant: Row) -> Row:
    """The loss of a variant, and its gradient beside that by the plainest route."""
    gradient = job.gradient(variant)
    found = {"loss": float(job.loss)}
    if variant.get("engine", "reverse") != "reverse":
        expected = job.gradient(variant | {"engine": "reverse"})
        found["error"] = float((gradient - expected).norm() / expected.norm())
    return found


def measured(job: Job, variant: Row) -> Row:
    """Memory and waits of a step."""
    step = job.step(variant)
    found: Row = {"memory": job.peak(step), "sync": None}
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        found["sync"] = reason(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found


def timed(steps: Mapping[str, Step]) -> dict[str, float]:
    """Median milliseconds of every step."""
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _, key in tqdm(list(product(range(ROUNDS), steps)), "time", leave=False):
        torch.cuda.empty_cache()  # its blocks have the sizes of another variant
        steps[key]()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        steps[key]()
        end.record()
        end.synchronize()
        times[key].append(start.elapsed_time(end))
    return {key: statistics.median(found) for key, found in times.items()}


def compiled(job: Job, variant: Row) -> Row:
    torch.compiler.reset()
    step, start = job.step(variant | {"compiled": True}), time.perf_counter()
    step()
    torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - start, "memory": job.peak(step)}
    return found | timed({"ms": step})


def measure_all(setting: Namespace) -> dict[str, Row]:
    """Everything about every variant."""
    small = Job(Namespace(**vars(setting) | {"batch": min(8, setting.batch)}))
    rows = {
        key: {"gradient": small.attempt(checked, variant)}
        for key, variant in tqdm(MEASURED.items(), "gradients", leave=False)
    }
    if small.device.type != "cuda":
        return rows
    job = Job(setting)
    for key, variant in tqdm(MEASURED.items(), "memory", leave=False):
        rows[key]["step"] = job.attempt(measured, variant)
    steps = {key: job.step(v) for key, v in MEASURED.items() if "memory" in rows[key]["step"]}
    found = job.attempt(lambda _: timed(steps))
    for key in steps:
        rows[key]["step"] |= {"ms": found[key]} if key in found else found
    for key, variant in tqdm(MEASURED.items(), "compiled") if setting.compile else ():
        rows[key]["compiled"] = job.attempt(compiled, variant)
    return rows


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--batch", type=int, nargs="+", help="default: 128 48, or 4 with --smoke")
    given.add_argument("--compile", action="store_true")
    given.add_argument("--out", type=Path, metavar="FILE.json")
    options = given.parse_args()
    cpu = options.smoke and not torch.cuda.is_available()
    device = options.device = "cpu" if cpu else "cuda"
    where = results.environment(dirty=options.dirty or options.smoke or options.out is None) | {
        "card": torch.cuda.get_device_name(device) if device == "cuda" else None,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }
    report: Row = {"environment": where, "tables": []}
    batches = options.batch or ([4] if options.smoke else [128, 48])
    for batch, precision in product(batches, ("fp32", "bf16")):
        shared = {"batch": batch, "precision": precision}
        rows = measure_all(Namespace(**vars(options) | shared))
        results.show(f"batch {batch}, {precision}", rows)
        report["tables"].append(shared | {"smoke": options.smoke, "variants": rows})
        if options.out:
            results.write(options.out, report)
        limit = 1e-4 if precision == "fp32" else math.inf
        for key, found in ((key, row["gradient"]) for key, row in rows.items()):
            right = math.isfinite(found.get("loss", math.nan)) and found.get("error", 0) <= limit
            if options.smoke and not right:
                raise SystemExit(f"{key}, {precision}: {found}")


if __name__ == "__main__":
    main()
