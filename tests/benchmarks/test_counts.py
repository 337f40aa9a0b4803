"""Our work costs what is held of it, and what is counted is what it says."""

import json

import pytest
import torch
from benchmarks import counts, scale
from benchmarks.steps import NAMES

HELD = json.loads(counts.PATH.read_text("utf-8"))
SCALE = json.loads(scale.FILE.read_text("utf-8"))
DIT = "DiT-XL/2, latents 4×32×32"


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_held(name):
    held = {key: row for key, row in HELD["counts"].items() if key.startswith(f"{name}: ")}
    assert counts.measure([name]) == held, (
        f"PyTorch {torch.__version__}, held with {HELD['torch']}. If this is meant, python -m "
        "benchmarks.counts"
    )


@pytest.mark.parametrize("loss", ["order 1", "order 2"])
def test_counts_at_scale_are_those_held(loss):
    """What is alive at once is PyTorch's affair as well."""
    held = SCALE["networks"][DIT]
    assert held["parameters"] == scale.parameters(DIT)
    found, row = scale.step(DIT, loss), held["losses"][loss]
    assert found["flops"] == row["flops"]
    same = torch.__version__ == SCALE["environment"]["torch"]
    assert found["memory"] == pytest.approx(row["memory"], rel=0 if same else 0.1)


def test_what_is_alive_is_counted_by_hand():
    with scale.Alive() as alive:
        a = torch.zeros(4, device="meta")
        b = a[:2] + 1  # a view and its sum: 8 bytes
        del a
        c = torch.zeros(3, device="meta")
        assert alive.now == 8 + 12
        del b, c
    assert (alive.most, alive.now) == (24, 0)
