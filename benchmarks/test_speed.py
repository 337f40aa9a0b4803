"""What a training step costs by every route, over one of order one: FLOPs, time and memory.

python -m benchmarks speed [--full]

All variants of a network take turns in one process of one thread, JAX too, so that their ratios
are of one run; benchmarks.speed says what is measured. With --full there are all networks, and
memory on those with twins in JAX. Compiled losses are those of benchmarks.compiled.

Old code against new, by pytest-benchmark:

python -m pytest benchmarks/test_speed.py -k test_step --benchmark-autosave
python -m pytest benchmarks/test_speed.py -k test_step --benchmark-compare
"""

import pytest

from benchmarks.experiment import alone
from benchmarks.speed import measure
from benchmarks.steps import BASE, MAIN, NAMES, NETWORKS, TWINS, VARIANTS, step_of


@pytest.mark.parametrize("name", NAMES)
def test_all_in_turns(record, choose, name):
    if name not in choose(NAMES[:2], NAMES[:2], NAMES):
        pytest.skip("with --full")
    variants = VARIANTS if name in TWINS else {key: VARIANTS[key] for key in MAIN}
    some = choose([BASE], variants, variants) if name == "convolutional" else []
    batch = choose(4, NETWORKS[name][1][0], NETWORKS[name][1][0])
    # A new process: pytest would make an error of every warning of a compiler.
    weighed = choose(some, some, variants if name in TWINS else [])
    record(alone(measure, name, variants, choose(1, 4, 10), batch, weighed))


@pytest.mark.parametrize("key", MAIN)
@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, name, key):
    batch = NETWORKS[name][1][0]
    benchmark.pedantic(step_of(name, **VARIANTS[key]), (batch,), rounds=5, warmup_rounds=1)
