"""Files of results, kept by question, and what the numbers depend on.

A file holds, for each question, the environment and the commit it was measured in, how much was
measured ("smoke" or "full"), and what was found. Measuring one question anew leaves
the others as they are. No host names and no paths are kept.

A result belongs to a commit. Benchmarks do not start while files differ from it, except those that
benchmarks write; with --dirty they do, and the commit that they keep ends in "-dirty". The pages
show the commits, and a test compares them with the history.
"""

import json
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
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
PEERS = ("diffrax", "jax", "scipy", "torchdiffeq", "zuko")


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


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"\W+", "_", name)


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


def git(*command: str) -> str | None:
    """The first line that Git prints about this repository; None where it fails."""
    return said("git", "--git-dir", ".git", *command)


def change() -> str | None:
    """A file that differs from the commit; "" if there is none, None outside of Git.

    Benchmarks write results and pages themselves, so these may differ. They measure docs/examples.
    """
    status = ("status", "--porcelain", "--untracked-files", "--")
    return git(*status, ".", ":!benchmarks/results", ":!docs") or git(*status, "docs/examples")


def environment(*, dirty: bool) -> Report:
    """Processor, threads, versions and commit, with None for a package that is not installed.

    A benchmark calls this before it measures, and writes it beside its results.

    Raises:
        SystemExit: if files have been changed since the commit, or there is none, unless `dirty`.
    """
    changed, commit = change(), git("rev-parse", "--short", "HEAD") or "unknown"
    if changed != "" and not dirty:
        raise SystemExit(
            "expected no changes since the last commit, outside benchmarks/results and docs; got "
            f"{changed or 'no Git history'}. Commit first, or pass --dirty, which the pages show."
        )
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "numpy": installed("numpy"),
        "peers": {name: installed(name) for name in PEERS},
        "commit": f"{commit}-dirty" if changed else commit,
        "date": datetime.now(UTC).date().isoformat(),
    }


def sources(directory: Path) -> Report:
    """How many results each file has, or all files of a folder, and from which commits."""
    found: dict[str, Counter[str]] = {}
    for file in sorted(directory.rglob("*.json")):
        name = file.relative_to(directory).parts[0].removesuffix(".json")
        found.setdefault(name, Counter()).update(commits(read(file)))
    return {
        name: {
            "results": counted.total(),
            "dirty": sum(n for commit, n in counted.items() if "-dirty" in commit),
            "commits": "; ".join(f"{commit} ({n})" for commit, n in counted.most_common()),
        }
        for name, counted in found.items()
    }


def commits(report: Report) -> Iterator[str]:
    """The commits of a file: of each row of a study, of the whole file, or of each question."""
    if "rows" in report:
        for row in report["rows"].values():
            yield report["environments"][row["environment"]]["commit"]
        return
    for each in [report] if "environment" in report else report.values():
        yield each["environment"]["commit"]
