"""What a training step costs by every route, over one of order one, in one run.

OMP_NUM_THREADS=1 NPROC=1 python -m pytest benchmarks/test_speed.py --benchmark-autosave

The time that pytest-benchmark compares is that of all steps together, extra_info has each. JAX
takes part where NPROC keeps it to one thread.
"""

import os

import pytest

from benchmarks.networks import NETWORKS
from benchmarks.speed import NAMES, add_memory, add_times, peer_steps, prepare
from benchmarks.timing import times

ROUNDS = 5


@pytest.mark.parametrize("name", NAMES)
def test_steps(benchmark, name):
    batch = NETWORKS[name][1][0]
    rows, steps = prepare(name, batch)
    if os.environ.get("NPROC") == "1":
        peers = peer_steps(name, batch, None)
        steps |= {f"JAX, {key}": step for key, step in peers.items()}
    add_times(rows, benchmark.pedantic(times, (steps, ROUNDS), rounds=1))
    add_memory(rows, name, batch, None)
    benchmark.extra_info.update(rows)
    assert not [key for key, row in rows.items() if "failed" in row]
