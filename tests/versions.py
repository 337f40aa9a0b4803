"""What PyTorch 2.6, the oldest that is declared, cannot do; `.ci/oldest` runs on it.

Known are 2.6, which cannot, and 2.13, which can; the versions between were not tried.
"""

import pytest
import torch

OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)

# torch.compile ends in an internal error: at `tensor.as_subclass(Jet)`, and past it elsewhere.
compiles_higher_orders = pytest.mark.skipif(OLD, reason="this torch.compile knows order one alone")
# fully_shard asks a CPU for a stream with events.
shards_on_cpu = pytest.mark.skipif(OLD, reason="fully_shard needs a GPU in this PyTorch")
# Nothing tells which saved-tensor hooks are on.
tells_hooks = pytest.mark.skipif(OLD, reason="this PyTorch does not tell which hooks are on")
