"""The recipes of docs/examples run as their first lines say, on two processes where they say so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*command):
    """Standard output of a Python process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_likelihood_of_two_processes_is_that_of_one():
    """37 images in batches of 8: the second process pads its last batch, which must not count."""
    pytest.importorskip("accelerate")
    script = [EXAMPLES / "likelihood_many_gpus.py", "--cpu", "--divergence", "exact"]
    alone, together = run(*script), run(*LAUNCH, *script)
    assert "over 37 samples" in alone
    assert re.findall(r"[-\d.]+", together) == re.findall(r"[-\d.]+", alone)
