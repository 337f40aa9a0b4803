"""Faults planted in the source one at a time, each of which the fast tests have to notice.

    python -m tests.mutants [NUMBER ...] [--named-only]

For each mutant a copy of the package has `old` replaced by `new`. The named tests run first; the
rest of the fast tests run only for mutants which those let through. `.ci/mutants` writes the
outcome to `tests/mutants.txt`. Whoever rewrites a line of the source rewrites its mutant.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "hosm_losses"


class Mutant(NamedTuple):
    """A fault: `old`, which occurs once in `file`, becomes `new`; `tests` are tried first."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS: list[Mutant] = []


def plant(mutant: Mutant, folder: Path) -> None:
    """Copy the package into `folder`, with the fault."""
    copy = folder / "hosm_losses"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / mutant.file).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file}: expected {mutant.old!r} once.")
    (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")


def first_failure(folder: Path, *arguments: str) -> str | None:
    """The first test that fails with the package in `folder`, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow"]
    command += ["--tb=no", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if run.returncode not in (0, 1) and not failed:
        raise SystemExit(run.stdout + run.stderr)
    return failed[0].split(" - ")[0] if failed else None


def hunt(mutant: Mutant, named_only: bool) -> str | None:
    """The test that kills the mutant, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        plant(mutant, Path(scratch))
        killer = first_failure(Path(scratch), *mutant.tests.split())
        if killer is None and not named_only:
            killer = first_failure(Path(scratch), "-n", "auto", "tests")
    return killer


def main() -> None:
    """Run the mutants whose numbers are given, or all, and print what kills each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("numbers", type=int, nargs="*")
    parser.add_argument("--named-only", action="store_true", help="run the named tests alone")
    options = parser.parse_args()
    numbers = options.numbers or range(len(MUTANTS))
    survivors = 0
    for number in numbers:
        killer = hunt(MUTANTS[number], options.named_only)
        survivors += killer is None
        print(f"{number:3} {MUTANTS[number].file}: {killer or 'SURVIVED'}", flush=True)
    print(f"{len(numbers) - survivors} of {len(numbers)} killed")


if __name__ == "__main__":
    main()
