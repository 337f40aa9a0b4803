"""What rules ask of their arguments."""

from itertools import product

import pytest
import torch

from hosm_losses.derivatives.taylor.arguments import promoted

DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64)
DTYPES += (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((), (2,))


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_type_of_a_result_is_that_of_pytorch(default):
    """torch.compile traces no torch.result_type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        tensors = [torch.ones(shape, dtype=dtype) for dtype in DTYPES for shape in SHAPES]
        for pair in product([*tensors, True, 2, 2.5], repeat=2):
            assert promoted(*pair) == torch.result_type(*pair), pair
    finally:
        torch.set_default_dtype(before)
