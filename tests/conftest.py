"""Settings for every test: reproducible examples, one thread, float64, a fixed seed."""

import os

import pytest
import torch
from hypothesis import Phase, settings

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=25)
# Explores: other draws at each run, and more of them.
settings.register_profile("nightly", deadline=None, max_examples=1000)
# For planted faults, where it is enough that a test fails.
settings.register_profile(
    "unshrunk", settings.get_profile("reproducible"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
