"""What joins several tensors, chooses among them, and indices in every spelling."""

import numpy as np
import pytest
import torch

from tests.derivatives.taylor.checks import check

OTHER = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).double()
MASK = OTHER > 0
JOINS = {
    "an empty tensor": lambda x: torch.cat([torch.empty(0), x, x.sin()], 1),
    "an empty tensor that depends on x": lambda x: x * torch.cat([x[0, :0], OTHER[0]]),
    "empty tensors alone": lambda x: x + torch.cat([x[0, :0], x[0, :0]]).sum(),
    "integers": lambda x: torch.cat([x.sin(), MASK.long()]),
    "concat along an axis": lambda x: torch.concat([x.sin(), x], axis=1),
    "by name": lambda x: torch.cat(tensors=(x.sin(), OTHER), dim=-1),
    "numbers": lambda x: torch.stack([x.mean(), x.sin().sum(), torch.tensor(2.0)]),
    "stack by name": lambda x: torch.stack(tensors=[x.sin(), OTHER], dim=-1),
    "where as a method": lambda x: x.sin().where(MASK, x) + OTHER.where(MASK, x.sin()),
    "where of a mask as a method": lambda x: x * OTHER.where(x > 0, x.sin()),
    "where with numbers": lambda x: torch.where(MASK, x.sin(), 2) + torch.where(MASK, 0.5, x),
    "where by name": lambda x: torch.where(condition=MASK, input=x.sin(), other=OTHER),
    "where it holds": lambda x: x.sin()[torch.where(x > 0)],
    "a wider mask": lambda x: x[0].sin().masked_fill(MASK, 2.0),
    "a fill that depends on x": lambda x: OTHER.masked_fill(MASK, x.sin().mean()),
    "a fill by name": lambda x: x.sin().masked_fill(mask=MASK, value=torch.tensor(3)),
}


@pytest.mark.parametrize("name", JOINS)
def test_joins_between_curved_functions(name):
    check(lambda x: JOINS[name](x).sin(), (4,))


INDEX = np.array([1, 0, 1])
TENSOR = torch.from_numpy(INDEX)
MASKS = np.array([True, False, True])
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
    "a mask of NumPy": MASKS,
    "a mask as a list": [True, False, True],
    "a mask of fewer axes": torch.from_numpy(MASKS),
    "a mask and an array apart": (torch.from_numpy(MASKS), slice(None), np.array([0, 1])),
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
def test_indices_between_curved_functions(name):
    check(lambda x: x.sin()[INDICES[name]].sin(), (2, 4))


def test_a_number_without_axes():
    check(lambda x: x.sin().mean()[None] + x.mean()[...] + x.cos().mean()[()], (2,))


def test_a_place_that_is_found_in_x():
    """The largest element, by an index that is a constant part of x."""

    def largest(x):
        return x.sin()[torch.arange(3), x.argmax(-1)] + x[:, x[0].argmax()]

    check(largest, (4,))
