"""What joins several tensors, and chooses among them."""

import pytest
import torch

from tests.derivatives.taylor.checks import check

OTHER = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).double()
MASK = OTHER > 0
JOINS = {
    "an empty tensor": lambda x: torch.cat([torch.empty(0), x, x.sin()], 1),
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
def test_between_curved_functions(name):
    check(lambda x: JOINS[name](x).sin(), (4,))
