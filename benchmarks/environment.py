"""What the numbers depend on: processor, threads, versions, commit. No host names, no paths."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# NPROC is XLA's, see benchmarks.peers.in_jax, which cannot be imported without JAX.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NPROC": "1"}
# What is measured beside ours, by the name in pip.
PEERS = ("flow_matching", "jax", "k-diffusion", "scipy", "torchdiffeq")


def installed(name: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The model of the processor, as Linux names it, with its family where that is given."""
    file = Path("/proc/cpuinfo")
    lines = re.findall(r"^(.*\S)\s*: *(.*)$", file.read_text(), re.M) if file.exists() else []
    told = dict(reversed(lines))
    if "model name" not in told:
        return platform.processor() or platform.machine()
    widest = ", AVX-512" if "avx512f" in told.get("flags", "") else ""
    return f"{told['model name']}, family {told.get('cpu family', '?')}{widest}"


def said(*command: str) -> str | None:
    """The first line that a program prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip()


def environment() -> dict[str, Any]:
    """All of it, with None for a package that is not installed."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "numpy": installed("numpy"),
        "peers": {name: installed(name) for name in PEERS},
        # "-dirty" where files have changed since; None outside git.
        "commit": said("git", "describe", "--always", "--dirty", "--exclude", "*"),
        "date": datetime.now(UTC).date().isoformat(),
    }
