"""What a training step costs by every route, over one of order one: FLOPs, time and memory.

python -m pytest benchmarks/test_speed.py [--full] [--compiled]

All variants of a network take turns in one process of one thread, JAX too, so that their ratios
are of one run; benchmarks.speed says what is measured. With --full there are two networks more,
and memory of every variant; with --compiled also the compiled loss, on the UNet and the DiT.
test_step has the variants apart, for `--benchmark-autosave` before a change and
`--benchmark-compare` after it.
"""

from functools import partial

import pytest

from benchmarks.networks import NETWORKS
from benchmarks.speed import Setting, measured
from benchmarks.steps import BASE, NAMES, VARIANTS, step_of

SMALL = ("mlp", "convolutional")
# Whose memory is measured without --full.
WEIGHED = [key for key in VARIANTS if "taylor" in key or "fraction" in key or "chunks" in key]


@pytest.mark.parametrize("name", NAMES)
def test_all_in_turns(benchmark, choose, pytestconfig, name):
    if name not in choose(SMALL, SMALL, NAMES):
        pytest.skip("with --full")
    weighed = name == "convolutional"
    chosen = Setting(
        rounds=choose(1, 4, 10),
        batch=choose(4, None, None),
        compiled=pytestconfig.getoption("--compiled") and name in ("unet", "dit"),
        memory=choose([BASE] * weighed, [BASE, *WEIGHED] * weighed, None),
        peers=choose([BASE] if name == "mlp" else [], None, None),
    )
    found = benchmark.pedantic(measured, (name, chosen), rounds=1)
    benchmark.extra_info.update(found)
    failed = {key: row["failed"] for key, row in found["variants"].items() if "failed" in row}
    assert not failed


@pytest.mark.parametrize("key", VARIANTS)
def test_step(benchmark, choose, key):
    name = choose("mlp", "convolutional", "convolutional")
    batch = choose(4, NETWORKS[name][1][0], NETWORKS[name][1][0])
    step = partial(step_of(name, **VARIANTS[key]), batch)
    benchmark.pedantic(step, rounds=choose(1, 1, 5), warmup_rounds=1)
