"""Memory and time of a likelihood: by reverse and forward mode, and of gradients through it.

    python -m benchmarks.likelihood_memory

Every case runs in a process of its own, which says by how much its memory grew at most. A gradient
is compared over 8 and 64 steps, and its time with that of one whose activations are all kept.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.networks import MLP, Convolutional, DiT, UNet
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations

STEPS, ROUNDS = 4, 5


def density(network: nn.Module, x: Tensor, mode: str) -> None:
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    divergence = hosm.Hutchinson(mode=mode)
    hosm.ode_nll(model, x, solver=hosm.FixedGrid(STEPS), divergence=divergence)


def gradient(network: nn.Module, x: Tensor, steps: int) -> None:
    model, solver = hosm.ScoreModel(network, hosm.VPSchedule()), hosm.FixedGrid(steps)
    hosm.ode_nll(model, x, solver=solver, enable_grad=True).nll.sum().backward()


def images(count: int, size: int = 16) -> Tensor:
    return 0.5 * torch.randn(count, 3, size, size)


CASES: dict[str, Callable[[], None]] = {
    f"{name}, batch {batch}, {mode}": lambda make=make, batch=batch, mode=mode: density(
        make(), images(batch), mode
    )
    for name, make in (("UNet", UNet), ("DiT", lambda: DiT(size=16)))
    for batch in (2, 8)
    for mode in ("reverse", "forward")
}
GRADIENTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutional, d = 768": (Convolutional, lambda: images(8)),
    "MLP, d = 2": (lambda: MLP(128), lambda: torch.randn(512, 2)),
}
CASES |= {
    f"{name}, gradient over {steps} steps": lambda make=make, x=x, steps=steps: gradient(
        make(), x(), steps
    )
    for name, (make, x) in GRADIENTS.items()
    for steps in (8, 64)
}


def measure(name: str) -> None:
    """Print how much memory and time a case takes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    CASES[name]()
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name:45s} {grown:7.0f} MiB {seconds:7.2f} s", flush=True)


def compare_times(name: str) -> None:
    """Print how much longer a gradient takes than one whose activations are all kept."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, x = GRADIENTS[name]
    network, data = make(), x()
    keeping = patch.object(RecomputedEvaluations, "due", lambda _self: False)
    for steps in (8, 64):
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
    for function, names in ((measure, CASES), (compare_times, GRADIENTS)):
        for name in names:
            process = context.Process(target=function, args=(name,))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
