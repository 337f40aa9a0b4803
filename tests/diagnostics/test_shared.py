"""A table that samples share as a set is the same when it is permuted, and is named all the same."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm

VP = hosm.VPSchedule()


class Attends(nn.Module):
    """Every sample attends to the same tokens (N, 3), or to its own (B, N, 3)."""

    def __init__(self, reduce=None):
        super().__init__()
        self.layer, self.reduce = nn.Linear(3, 3), reduce

    def forward(self, x, t, tokens, label=None):
        hidden = torch.tanh(self.layer(x) + t[:, None])
        if label is not None:
            hidden = hidden + label[:, None]
        if self.reduce is not None:
            return hidden * self.reduce(tokens)
        weights = torch.softmax(tokens @ hidden[..., None], -2)
        return hidden + (weights * tokens).sum(-2)


SETS = {
    "attention": None,
    "mean": lambda tokens: tokens.mean(0),
    "largest": lambda tokens: tokens.amax(0),
    "product": lambda tokens: tokens.T @ tokens @ torch.ones_like(tokens[0]),
}


def checked(reduce, batch, tokens, dtype=torch.float64, **conditions):
    torch.manual_seed(0)
    model = hosm.ScoreModel(Attends(reduce).to(dtype), VP)
    kwargs = {"tokens": tokens, **conditions}
    hosm.check_derivatives(model, torch.randn(batch, 3, dtype=dtype), model_kwargs=kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("name", SETS)
def test_a_set_is_named_and_taken_where_it_is_marked(name, batch, dtype):
    tokens = torch.randn(batch, 3, dtype=dtype)
    message = r"^model_kwargs\['tokens'\]: expected a tensor that belongs.*other rows than their"
    with pytest.raises(hosm.DerivativeError, match=message):
        checked(SETS[name], batch, tokens, dtype)
    label = torch.randn(batch, dtype=dtype)
    with pytest.raises(hosm.DerivativeError, match=message):
        checked(SETS[name], batch, tokens, dtype, label=label)
    checked(SETS[name], batch, hosm.Shared(tokens), dtype, label=label)


@pytest.mark.parametrize("batch", [2, 5])
def test_tokens_of_every_sample_are_no_alarm(batch):
    checked(None, batch, torch.randn(batch, 4, 3), label=torch.arange(batch))
    checked(lambda tokens: tokens.sin(), batch, torch.randn(batch, 3))
