"""What a training step costs by every route, over one of order one: FLOPs, time and memory.

python -m benchmarks speed [--full] [--compiled]

All variants of a network take turns in one process of one thread, JAX too, so that their ratios
are of one run; benchmarks.speed says what is measured. With --full there are two networks more,
and memory on every network; with --compiled also the compiled loss, on the UNet and the DiT.
"""

import pytest

from benchmarks.experiment import alone
from benchmarks.networks import NETWORKS
from benchmarks.speed import measure
from benchmarks.steps import BASE, COMPILED, NAMES, VARIANTS


@pytest.mark.parametrize("name", NAMES)
def test_all_in_turns(record, choose, pytestconfig, name):
    if name not in choose(NAMES[:2], NAMES[:2], NAMES):
        pytest.skip("with --full")
    compiled = pytestconfig.getoption("--compiled") and name in ("unet", "dit")
    variants = VARIANTS | (COMPILED if compiled else {})
    some = choose([BASE], variants, variants) if name == "convolutional" else []
    batch = choose(4, NETWORKS[name][1][0], NETWORKS[name][1][0])
    # A new process: pytest would make an error of every warning of a compiler.
    given = name, variants, choose(1, 4, 10), batch, choose(some, some, variants)
    record(alone(measure, *given))
