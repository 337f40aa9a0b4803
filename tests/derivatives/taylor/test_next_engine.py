"""What code raises that meets a Jet leads to the next engine."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm


class Strict(nn.Module):
    """Of a kind that some networks are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        assert type(x) is torch.Tensor
        return self.layer(x).sin()


def test_a_network_that_asserts_a_plain_tensor_goes_to_the_next_engine():
    model = hosm.ScoreModel(Strict(), hosm.VPSchedule())
    inputs = {"t": torch.tensor([0.3, 0.6]), "noise": torch.ones(2, 3)}
    inputs["probe"] = torch.ones(1, 2, 3)
    x0 = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="'reverse' takes its place"):
        found = hosm.third_order_dsm(model, x0, **inputs)
    expected = hosm.third_order_dsm(model, x0, derivative="reverse", **inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
