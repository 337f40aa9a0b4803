"""What our work costs, counted: FLOPs of matrix products and convolutions, and network calls.

    python -m benchmarks.counts           compares with benchmarks/counts.json
    python -m benchmarks.counts --write   replaces it

Counts are exact, so that they can be held without a clock. A count above the committed one is a
regression; one below it is a gain, which has to be written down or it could be lost unseen.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.oracles import CountFlops
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks.memory import LOSSES
from benchmarks.networks import NETWORKS
from benchmarks.speed import NAMES, VARIANTS

PATH = Path(__file__).with_name("counts.json")
BATCH = 4
LIKELIHOODS: dict[str, Callable[[hosm.ScoreModel, Tensor], object]] = {
    "ode_nll": lambda model, x: hosm.ode_nll(model, x),
    "ode_nll, probes=4": lambda model, x: hosm.ode_nll(model, x, probes=4),
    "ode_nll, dct": lambda model, x: hosm.ode_nll(model, x, distribution="dct"),
    "ode_nll, exact, 2-D": lambda model, x: hosm.ode_nll(model, x, divergence="exact"),
    "variational_nll": lambda model, x: hosm.variational_nll(model, x),
}
Counts = dict[str, dict[str, int]]


def counted(network: nn.Module, work: Callable[[], Any]) -> dict[str, int]:
    """FLOPs of some work, how often it calls the network, and with how many samples in all."""
    batches: list[int] = []
    handle = network.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    # Attention is taken apart, as PyTorch has no count for its kernel on CPUs.
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as flops:
        work()
    handle.remove()
    return {"flops": flops.total, "calls": len(batches), "samples": sum(batches)}


def loss_counts(name: str) -> Counts:
    """A training step of every variant on one network."""
    make, shape = NETWORKS[name]
    network, x0 = make(), torch.randn(BATCH, *shape[1:])
    model, found = hosm.ScoreModel(network, hosm.VPSchedule()), {}
    for key, variant in VARIANTS.items():
        options = dict(variant)
        loss = LOSSES[options.pop("order")]

        def step(loss=loss, options=options) -> None:
            loss(model, x0, **options).backward()

        found[f"{name}: {key}"] = counted(network, step)
    return found


def likelihood_counts(name: str) -> Counts:
    """A likelihood of two samples by every route that the network's size allows."""
    make, shape = NETWORKS[name]
    network, x = make(), torch.randn(2, *shape[1:])
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    return {
        f"{name}: {key}": counted(network, lambda work=work: work(model, x))
        for key, work in LIKELIHOODS.items()
        if "2-D" not in key or name == "mlp"
    }


def measure() -> Counts:
    """Everything that is held."""
    torch.manual_seed(0)
    found: Counts = {}
    for name in tqdm(NAMES, "counting", leave=False):
        found |= loss_counts(name)
        if name in ("mlp", "convolutional"):
            found |= likelihood_counts(name)
    return found


def differences(found: Counts, held: Counts) -> list[str]:
    """A line for every count that is not the one held, what costs more first."""
    lines: list[tuple[bool, str]] = []
    for key in sorted(found.keys() | held.keys()):
        new, old = found.get(key), held.get(key)
        if new is None or old is None:
            lines.append((True, f"{key}: {'not held' if old is None else 'not counted'}"))
            continue
        for field in new:
            ratio = new[field] / max(old[field], 1)
            if new[field] != old[field]:
                line = f"{key}: {field} {new[field]:,}, held {old[field]:,} ({ratio:.4f})"
                lines.append((ratio < 1, line))
    return [line for _, line in sorted(lines)]


def read() -> tuple[Counts, str]:
    """The counts that are held, and the PyTorch they were counted with."""
    held = json.loads(PATH.read_text())
    return held["counts"], held["torch"]


def main() -> None:
    """Count, then compare or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = measure()
    if options.write:
        report = {"torch": torch.__version__, "batch": BATCH, "counts": found}
        PATH.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{len(found)} rows written to {PATH.name}.")
        return
    lines = differences(found, read()[0])
    print("\n".join(lines) or f"{len(found)} rows, all as held.")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
