"""Bits per dimension."""

import math

import pytest
import torch

from hosm_losses import NLLResult


def result(nll, shape):
    zeros = torch.zeros(len(nll))
    return NLLResult(nll, torch.zeros(len(nll), *shape), zeros, None, zeros, zeros > 0)


def test_continuous_bits_are_nats_over_d_log_2():
    bits = result(torch.tensor([1.0, -6.0]), (3, 2)).bits_per_dim()
    torch.testing.assert_close(bits, torch.tensor([1.0, -6.0]) / (6 * math.log(2)))


@pytest.mark.parametrize(("low", "high", "offset"), [(-1, 1, 7.0), (0, 1, 8.0), (0, 256, 0.0)])
def test_levels_add_the_width_of_a_level(low, high, offset):
    """A uniform density over [low, high] gives every 8-bit level 8 bits."""
    nll = torch.tensor([3 * math.log(high - low)])
    got = result(nll, (3,)).bits_per_dim(levels=256, low=low, high=high)
    torch.testing.assert_close(got, torch.tensor([8.0]))
    zero = result(torch.zeros(1), (3,)).bits_per_dim(levels=256, low=low, high=high)
    torch.testing.assert_close(zero, torch.tensor([offset]))


@pytest.mark.parametrize(("levels", "low", "high"), [(0, -1, 1), (256, 1, 1), (256, 1, -1)])
def test_impossible_levels_are_refused(levels, low, high):
    with pytest.raises(ValueError, match="bits_per_dim: expected levels >= 1 and low < high"):
        result(torch.zeros(1), (3,)).bits_per_dim(levels, low, high)
