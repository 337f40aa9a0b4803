"""Indices in every spelling: PyTorch's own result, with its derivatives."""

import numpy as np
import pytest
import torch

from tests.derivatives.taylor.checks import check

INDEX = np.array([1, 0, 1])
TENSOR = torch.from_numpy(INDEX)
MASK = np.array([True, False, True])
INDICES = {
    "an array": INDEX,
    "two arrays": (INDEX, INDEX),
    "arrays apart": (INDEX, slice(None), INDEX),
    "arrays apart by a new axis": (INDEX, None, INDEX),
    "an array and a tensor apart": (TENSOR, slice(None), INDEX),
    "a list and an array apart": ([0, 1, 2], slice(None), INDEX),
    "tensors apart": (TENSOR, slice(None), TENSOR),
    "a number of NumPy": (INDEX[0], ..., INDEX[1]),
    "a list": [0, 1],
    "lists in a list": [[0, 1], [1, 0]],
    "lists in a tuple": ([[0, 1], [1, 0]],),
    "an array of two axes": np.array([[0, 1], [1, 0]]),
    "a mask of NumPy": MASK,
    "a mask as a list": [True, False, True],
    "a mask of fewer axes": torch.from_numpy(MASK),
    "a mask and an array apart": (torch.from_numpy(MASK), slice(None), np.array([0, 1])),
    "a mask of two axes": torch.tensor([[True, False], [True, True], [False, False]]),
    "a range": range(2),
    "True": True,
    "True among others": (slice(None), True, 0),
    "a tensor without axes": torch.tensor(1),
    "tensors without axes": (torch.tensor(1), slice(None), torch.tensor(0)),
    "short integers": TENSOR.to(torch.int32),
    "nothing": (),
    "a new axis": (..., None),
    "a new axis within": (None, slice(None), None, 1),
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("name", INDICES)
def test_between_curved_functions(name):
    check(lambda x: x.sin()[INDICES[name]].sin(), (2, 4))


def test_a_number_without_axes():
    check(lambda x: x.sin().mean()[None] + x.mean()[...] + x.cos().mean()[()], (2,))


def test_a_place_that_is_found_in_x():
    """The largest element, by an index that is a constant part of x."""

    def largest(x):
        return x.sin()[torch.arange(3), x.argmax(-1)] + x[:, x[0].argmax()]

    check(largest, (4,))
