"""The benchmarks measure in float32, as users do."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _double_precision():
    """In place of that of all other tests."""
    torch.manual_seed(0)
