"""What our work costs, counted: FLOPs of matrix products and convolutions, and network calls.

    python -m benchmarks.counts

replaces benchmarks/counts.json, with which a test compares. Counts are exact, so that they can be
held without a clock. A count above the committed one is a regression. One below it is a gain,
which has to be written down or it could be lost unseen.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from tests.cases import CountFlops
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks.experiment import calls_of
from benchmarks.steps import MAIN, NAMES, NETWORKS, TWINS, VARIANTS, model_of, step_of

PATH = Path(__file__).with_name("counts.json")
BATCH, SAMPLES = 4, 2  # of a training step, and of a likelihood
LIKELIHOODS = {
    "ode_nll": partial(hosm.ode_nll, divergence=hosm.Hutchinson()),
    "ode_nll, probes=4": partial(hosm.ode_nll, divergence=hosm.Hutchinson(4)),
    "ode_nll, dct": partial(hosm.ode_nll, divergence=hosm.Hutchinson(1, "dct")),
    "ode_nll, exact, 2-D": partial(hosm.ode_nll, divergence="exact"),
    "variational_nll": hosm.variational_nll,
}
Counts = dict[str, dict[str, int]]


def count_of(work: Callable[[], object]) -> CountFlops:
    """FLOPs of some work. Attention is taken apart: PyTorch has no count for its CPU kernel."""
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as count:
        work()
    return count


def counted(network: torch.nn.Module, work: Callable[[], object]) -> dict[str, int]:
    """FLOPs of some work, how often it calls the network, and with how many samples in all."""
    with calls_of(network) as batches:
        flops = count_of(work).total
    return {"flops": flops, "calls": len(batches), "samples": sum(batches)}


def measure(names: Iterable[str] = NAMES) -> Counts:
    """What is held of networks: training steps, and likelihoods on the two smallest."""
    found: Counts = {}
    for name in tqdm(names, "counting", leave=False):
        model, shape = model_of(name), NETWORKS[name][1][1:]
        for key in VARIANTS if name in TWINS else MAIN:
            variant = VARIANTS[key]
            step = partial(step_of(name, model, **variant), BATCH)
            found[f"{name}: {key}"] = counted(model.network, step)
        for key, likelihood in LIKELIHOODS.items() if name in NAMES[:2] else ():
            if "2-D" not in key or len(shape) == 1:
                work = partial(likelihood, model, torch.randn(SAMPLES, *shape))
                found[f"{name}: {key}"] = counted(model.network, work)
    return found


def main() -> None:
    report = {"torch": torch.__version__, "batch": BATCH, "counts": measure()}
    PATH.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
