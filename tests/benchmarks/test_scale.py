"""The counts of benchmarks.scale are those held, and count what they say."""

import json

import pytest
import torch
from benchmarks import scale

DIT = "DiT-XL/2, latents 4×32×32"


def test_counts_are_those_held():
    report = json.loads(scale.FILE.read_text("utf-8"))
    held = report["networks"]
    assert {name: each["parameters"] for name, each in held.items()} == {
        name: scale.parameters(name) for name in scale.NETWORKS
    }
    for loss in ("order 1", "order 2"):
        found, row = scale.step(DIT, loss), held[DIT]["losses"][loss]
        assert found["flops"] == row["flops"]
        # What is alive at once is PyTorch's affair as well.
        exact = torch.__version__ == report["torch"]
        assert found["memory"] == pytest.approx(row["memory"], rel=0 if exact else 0.1)


def test_what_a_sample_adds_does_not_depend_on_the_batch(monkeypatch):
    # Of few samples most is alive elsewhere: copies of the gradients, or weights of one layer.
    held = json.loads(scale.FILE.read_text("utf-8"))["networks"][DIT]["losses"]
    monkeypatch.setattr(scale, "BATCHES", (128, 192))
    for loss in ("order 3, `fraction=0.25`", f"order 2{scale.CHECKPOINT}"):
        assert scale.step(DIT, loss)["memory"] == pytest.approx(held[loss]["memory"], rel=0.02)


def test_what_is_alive_is_counted_by_hand():
    with scale.Alive() as alive:
        a = torch.zeros(4, device="meta")
        b = a[:2] + 1  # a view and its sum: 8 bytes
        del a
        c = torch.zeros(3, device="meta")
        assert alive.now == 8 + 12
        del b, c
    assert (alive.most, alive.now) == (24, 0)


def test_weights_by_hand():
    # Two workers in a ring send half of the gradients twice, and hold half of 16 bytes.
    assert scale.weights(10**9, 2) == {"ddp": 16, "fsdp2": 8 + 8, "sent": 4}
