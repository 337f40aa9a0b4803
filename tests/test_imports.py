"""What importing the package loads."""

import subprocess
import sys

import pytest

LOADED = """
import sys
import numpy, torch, torch.utils.checkpoint  # with which PyTorch 2.6 loads sympy
before = set(sys.modules)
import hosm_losses, hosm_losses.interop
own = {name.partition(".")[0] for name in set(sys.modules) - before}
print(" ".join(sorted(own - set(sys.stdlib_module_names))))
"""


@pytest.mark.slow
def test_nothing_beyond_torch_numpy_and_the_standard_library():
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, timeout=120
    )
    assert set(done.stdout.split()) <= {"hosm_losses", "torch", "numpy"}
