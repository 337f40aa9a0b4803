"""Our work costs what benchmarks/counts.json says, exactly."""

import pytest
import torch
from benchmarks import counts
from benchmarks.steps import MAIN, NAMES
from torch import nn


def test_counts_are_those_held():
    found = counts.measure()
    held, version = counts.read()
    lines = counts.differences(found, held)
    assert not lines, (
        f"PyTorch {torch.__version__}, held with {version}. If this is meant, python -m "
        "benchmarks.counts --write:\n" + "\n".join(lines)
    )


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_near_the_fewest(name):
    """Within 2.5 % of a whole number of passes, to which products of attention add their own."""
    held, share = counts.read()[0], counts.attention_share(name)
    flops = [held[f"{name}: {key}"]["flops"] for key in MAIN]
    two, three, laplacian, fraction = (each / flops[0] for each in flops[1:])
    assert two <= 1.025 * (2 + share)
    assert three <= 1.025 * (4 + 5 * share)
    assert laplacian <= 1.025 * (3 + 3 * share)
    assert fraction <= 1 + 0.26 * (three - 1)


def test_a_layer_is_counted_by_hand():
    layer = nn.Linear(3, 5, bias=False)
    x = torch.randn(2, 3)

    def work():
        layer(x)
        layer(x).sum().backward()

    # Two products forward, and back one for the weights: x has no gradient.
    products = 3 * (2 * 2 * 3 * 5)
    assert counts.counted(layer, work) == {"flops": products, "calls": 2, "samples": 4}


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"a": {"flops": 11}}, "1.1000"),
        ({"a": {"flops": 9}}, "0.9000"),
        ({"a": {"flops": 10}, "b": {"flops": 1}}, "not held"),
        ({}, "not counted"),
    ],
)
def test_every_difference_is_told(found, word):
    (line,) = counts.differences(found, {"a": {"flops": 10}})
    assert word in line


def test_no_difference_tells_nothing():
    assert counts.differences({"a": {"flops": 10}}, {"a": {"flops": 10}}) == []
