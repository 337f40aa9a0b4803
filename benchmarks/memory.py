"""Peak memory of one training step: what a new process holds above what it held before.

    python -m benchmarks.memory NETWORK '{"order": 3, "batch": 64, "derivative": "forward"}'

prints bytes: of the batch, the parameter gradients and what operators work with, not of the
parameters. The C library is told to return freed tensors at once, and the kernel to forget its
high-water mark. The result is within 2 % of what PyTorch's profiler counts as allocated, and
repeats within 1 %, on Linux with glibc. Where the mark cannot be reset, the peak is taken above
the highest before, that of a step on two samples.
"""

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

from benchmarks.experiment import alone
from benchmarks.networks import NETWORKS
from benchmarks.steps import step_of

ENVIRONMENT = {
    # Also turns off glibc's habit of raising the threshold when something large is freed.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def highest() -> int:
    """The most this process ever held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_here(network_name: str, batch: int, **variant: Any) -> int:
    """Peak resident memory during a step of a variant above that before, in bytes.

    Run it in a new process with ENVIRONMENT. A first step loads what is not the next one's.
    """
    step = step_of(network_name, **variant)
    step(batch if "compiled" in variant else 2)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = highest()
        step(batch)
        return highest() - before
    before = resident("VmRSS")
    step(batch)
    return resident("VmHWM") - before


def peak(network_name: str, batch: int | None = None, **variant: Any) -> int:
    """`peak_here` in a new process; the batch is that of NETWORKS if None."""
    batch = batch or NETWORKS[network_name][1][0]
    return alone(peak_here, network_name, batch, environment=ENVIRONMENT, **variant)


if __name__ == "__main__":
    print(peak(sys.argv[1], **json.loads(sys.argv[2])))
