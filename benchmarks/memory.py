"""Peak memory of one training step: what a new process holds above what it held before.

    python -m benchmarks.memory NETWORK '{"order": 3, "batch": 64, "derivative": "forward"}'

prints bytes. The C library is told to return freed tensors at once, and the kernel to forget its
high-water mark, so that the mark is that of the step: its batch, its parameter gradients and what
operators work with are in it, the parameters are not. It is within 2 % of what PyTorch's profiler
counts as allocated, and repeats within 1 %. That is so on Linux with glibc; where the mark cannot
be reset, the peak is taken above the highest before, that of a step on two samples.
"""

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import hosm_losses as hosm
from benchmarks.networks import NETWORKS

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    # Also turns off glibc's habit of raising the threshold when something large is freed.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}
LOSSES = {1: hosm.first_order_dsm, 2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status: expected {field}.")


def _highest() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes(step: Callable[[], object]) -> int:
    """Peak resident memory of this process during `step()` above that before, in bytes.

    Run it in a process with ENVIRONMENT, after a warm-up: what the first step of a process loads
    once is not the step's.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except OSError:
        before = _highest()
        step()
        return _highest() - before
    step()
    return _resident("VmHWM") - before


def step_of(network_name: str, order: int, **options: Any) -> Callable[[int], None]:
    """A training step, loss and backward pass, as a function of the size of its batch.

    Args:
        network_name: one of NETWORKS.
        order: 1, 2 or 3.
        options: keyword arguments of the loss.

    Returns:
        The step.
    """
    torch.manual_seed(0)
    make, shape = NETWORKS[network_name]
    network = make()
    model = hosm.ScoreModel(network, hosm.VPSchedule())

    def step(batch: int) -> None:
        LOSSES[order](model, torch.randn(batch, *shape[1:]), **options).backward()
        network.zero_grad()  # here and not before, so that no gradients are held before the next

    return step


def peak(network_name: str, order: int, batch: int | None = None, **options: Any) -> int:
    """`peak_bytes` of one training step, measured in a process of its own.

    Args:
        network_name: one of NETWORKS.
        order: 1, 2 or 3.
        batch: that of NETWORKS if None.
        options: keyword arguments of the loss, as JSON can hold them.

    Returns:
        Bytes.
    """
    batch = NETWORKS[network_name][1][0] if batch is None else batch
    given = json.dumps({"order": order, "batch": batch, **options})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", network_name, given],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


def ratios(
    network_name: str, variants: Mapping[str, Mapping[str, Any]], batch: int | None = None
) -> dict[str, float]:
    """Peak of each variant, {"order": 3, ...}, over that of a step of order one."""
    base = peak(network_name, 1, batch)
    return {
        key: peak(network_name, batch=batch, **variant) / base for key, variant in variants.items()
    }


def main() -> None:
    """Measure in this process, started again where the C library was not told, and print."""
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):
        again = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **ENVIRONMENT})
    network_name, given = sys.argv[1:]
    options = json.loads(given)
    order, batch = options.pop("order"), options.pop("batch")
    step = step_of(network_name, order, **options)
    step(2)
    print(peak_bytes(lambda: step(batch)))


if __name__ == "__main__":
    main()
