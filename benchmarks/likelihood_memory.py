"""Memory and time of a likelihood: by reverse and forward mode, and of gradients through it.

    python -m benchmarks.likelihood_memory

Every case runs in a process of its own, which says by how much its memory grew at most. A gradient
is compared over 8 and 64 steps.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks.networks import MLP, Convolutional, DiT, UNet

STEPS = 4


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
CASES |= {
    f"{name}, gradient over {steps} steps": lambda make=make, x=x, steps=steps: gradient(
        make(), x(), steps
    )
    for name, make, x in (
        ("convolutional, d = 768", lambda: Convolutional(), lambda: images(8)),
        ("MLP, d = 2", lambda: MLP(128), lambda: torch.randn(512, 2)),
    )
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


def main() -> None:
    # Else freed memory that is not handed back counts as well, up to four times what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for name in CASES:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
