"""What our work costs, counted: FLOPs of matrix products and convolutions, and network calls.

    python -m benchmarks.counts           compares with benchmarks/counts.json
    python -m benchmarks.counts --write   replaces it

Counts are exact, so that they can be held without a clock. A count above the committed one is a
regression. One below it is a gain, which has to be written down or it could be lost unseen.
"""

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from tests.cases import CountFlops
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import hosm_losses as hosm
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
    batches: list[int] = []
    handle = network.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    flops = count_of(work).total
    handle.remove()
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


def differences(found: Counts, held: Counts) -> list[str]:
    """A line for every count that is not the one held."""
    lines = [f"{key}: not counted" for key in held if key not in found]
    lines += [f"{key}: not held" for key in found if key not in held]
    for key in found.keys() & held.keys():
        for field, new in found[key].items():
            if new != (old := held[key][field]):
                lines.append(f"{key}: {field} {new:,}, held {old:,} ({new / max(old, 1):.4f})")
    return sorted(lines)


def read() -> tuple[Counts, str]:
    """The counts that are held, and the PyTorch they were counted with."""
    held = json.loads(PATH.read_text())
    return held["counts"], held["torch"]


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    options, found = parser.parse_args(), measure()
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
