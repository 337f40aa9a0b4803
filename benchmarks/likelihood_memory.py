"""Memory and time of gradients through a likelihood.

    python -m benchmarks.likelihood_memory

Every case runs in a process of its own, which says by how much its memory grew at most. A gradient
is compared over 8 and 64 steps, and its time with that of one whose activations are all kept.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from itertools import product
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.networks import MLP, Convolutional
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations

ROUNDS, STEPS = 5, (8, 64)


def gradient(network: nn.Module, x: Tensor, steps: int) -> None:
    model, solver = hosm.ScoreModel(network, hosm.VPSchedule()), hosm.FixedGrid(steps)
    hosm.ode_nll(model, x, solver=solver, enable_grad=True).nll.sum().backward()


GRADIENTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutional, d = 768": (Convolutional, lambda: 0.5 * torch.randn(8, 3, 16, 16)),
    "MLP, d = 2": (lambda: MLP(128), lambda: torch.randn(512, 2)),
}


def measure(name: str, steps: int) -> None:
    """Print how much memory and time a gradient takes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, x = GRADIENTS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    gradient(make(), x(), steps)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name}, gradient over {steps} steps: {grown:.0f} MiB, {seconds:.2f} s", flush=True)


def compare_times(name: str) -> None:
    """Print how much longer a gradient takes than one whose activations are all kept."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, x = GRADIENTS[name]
    network, data = make(), x()
    keeping = patch.object(RecomputedEvaluations, "applies", lambda _self: False)
    for steps in STEPS:
        ratios: list[float] = []
        for _ in range(ROUNDS):
            start = time.process_time()
            gradient(network, data, steps)
            middle = time.process_time()
            with keeping:
                gradient(network, data, steps)
            ratios.append((middle - start) / (time.process_time() - middle))
        print(f"{name}, gradient over {steps} steps: {median(ratios):.2f} times the time")


def main() -> None:
    # Else freed memory that is not handed back counts as well, up to four times what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    cases = [(measure, each) for each in product(GRADIENTS, STEPS)]
    for function, given in (*cases, *((compare_times, (name,)) for name in GRADIENTS)):
        process = context.Process(target=function, args=given)
        process.start()
        process.join()


if __name__ == "__main__":
    main()
