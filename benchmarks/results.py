"""Files of results, kept by question, and what the numbers depend on.

A file holds, for each question, the environment and the commit it was measured in, how much was
measured ("smoke", "default" or "full"), and what was found. Measuring one question anew leaves
the others as they are. No host names and no paths are kept.
"""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Report = dict[str, Any]
ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / "benchmarks" / "results"
# NPROC is XLA's, see benchmarks.peers.in_jax, which cannot be imported without JAX.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NPROC": "1"}
# What is measured beside ours, by the name in pip.
PEERS = ("flow_matching", "jax", "k-diffusion", "scipy", "torchdiffeq")


def rounded(found: Any) -> Any:
    """Numbers with five digits, as far down as there are any."""
    if isinstance(found, dict):
        return {key: rounded(each) for key, each in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(each) for each in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


def show(title: str, rows: Report) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        print(f"{name}: {rounded(row)}")


def read(file: Path) -> Report:
    """The questions of a file; none where there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def read_all(directory: Path) -> list[Report]:
    """The reports of a directory, by the names of their files."""
    return [read(file) for file in sorted(directory.glob("*.json"))]


def keep(file: Path, found: Report) -> None:
    """Write what was found beside what a file holds already."""
    write(file, read(file) | found)


def write(file: Path, questions: Report) -> None:
    """Write the questions, sorted by name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = rounded(dict(sorted(questions.items())))
    file.write_text(json.dumps(ordered, separators=(",", ":")) + "\n")


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
        printed = subprocess.check_output(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return printed.partition("\n")[0].strip()


def environment() -> Report:
    """Processor, threads, versions and commit, with None for a package that is not installed."""
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
