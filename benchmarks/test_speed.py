"""Old code against new, by pytest-benchmark: a training step of every network.

python -m pytest benchmarks/test_speed.py --benchmark-autosave
python -m pytest benchmarks/test_speed.py --benchmark-compare
"""

import pytest
import torch

from benchmarks.steps import MAIN, NAMES, NETWORKS, VARIANTS, step_of


@pytest.mark.parametrize("key", MAIN)
@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, name, key):
    torch.set_num_threads(1)
    batch = NETWORKS[name][1][0]
    benchmark.pedantic(step_of(name, **VARIANTS[key]), (batch,), rounds=5, warmup_rounds=1)
