"""What a training step costs by every route, over one of order one: FLOPs, time and memory.

python -m benchmarks speed [--full] [--compiled]

All variants of a network take turns in one process of one thread, JAX too, so that their ratios
are of one run; benchmarks.speed says what is measured. With --full there are two networks more,
and memory of every variant; with --compiled also the compiled loss, on the UNet and the DiT.
"""

import pytest

from benchmarks.experiment import alone
from benchmarks.networks import NETWORKS
from benchmarks.speed import measure
from benchmarks.steps import BASE, COMPILED, NAMES, VARIANTS

SMALL = ("mlp", "convolutional")
# Whose memory is measured without --full.
WEIGHED = [key for key in VARIANTS if "taylor" in key or "fraction" in key or "chunks" in key]


@pytest.mark.parametrize("name", NAMES)
def test_all_in_turns(record, choose, pytestconfig, name):
    if name not in choose(SMALL, SMALL, NAMES):
        pytest.skip("with --full")
    some = choose([BASE], [BASE, *WEIGHED], []) if name == "convolutional" else []
    compiled = pytestconfig.getoption("--compiled") and name in ("unet", "dit")
    variants = VARIANTS | (COMPILED if compiled else {})
    # A new process: pytest would make an error of every warning of a compiler.
    found = alone(
        measure,
        name,
        variants,
        rounds=choose(1, 4, 10),
        batch=choose(4, NETWORKS[name][1][0], NETWORKS[name][1][0]),
        weighed=choose(some, some, [*variants]),
        peers=choose([BASE] if name == "mlp" else [], None, None),
    )
    record(found)
    failed = {key: row["failed"] for key, row in found["variants"].items() if "failed" in row}
    assert not failed
