"""The benchmarks measure in float32, as users do."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _double_precision():
    """In place of that of all other tests."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)  # a comparison with JAX is made in float64


@pytest.fixture
def rows_called(monkeypatch):
    """A function of a class of networks: the sizes of the batches that these are called with."""

    def watch(network):
        rows, forward = [], network.forward

        def counted(self, x, t):
            rows.append(len(x))
            return forward(self, x, t)

        monkeypatch.setattr(network, "forward", counted)
        return rows

    return watch
