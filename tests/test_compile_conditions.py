"""Compiled losses of networks with conditions: the loss and the gradients of eager mode."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from tests.versions import compiles_higher_orders

pytestmark = [compiles_higher_orders, pytest.mark.filterwarnings("ignore")]


class Conditioned(nn.Module):
    """Labels, a text with its mask, a dict of tensors, a table that all share, and numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.of_label, self.query = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.of_text, self.norm = nn.Linear(3, 8), nn.LayerNorm(4)

    def forward(self, x, t, label, text, mask, added, table, absent=None, scale=1.0):
        assert absent is None
        hidden = self.first(torch.cat([x, t[:, None]], 1)) + self.of_label(label)
        keys, values = self.of_text(text)[:, None].chunk(2, -1)
        query = self.query(hidden)[:, None, None]
        attended = F.scaled_dot_product_attention(query, keys, values, mask[:, None, None])
        hidden = (hidden + attended[:, 0, 0]) * added["sizes"][0][:, None] + table[label]
        return self.last(F.silu(self.norm(hidden)) * scale)


def conditions(batch):
    mask = torch.rand(batch, 3) > 0.4
    mask[:, 0] = True
    return {
        "label": torch.randint(5, (batch,)),
        "text": torch.randn(batch, 3, 3),
        "mask": mask,
        "added": {"sizes": [torch.rand(batch) + 0.5]},
        "table": hosm.Shared(torch.randn(5, 4)),
        "absent": None,
        "scale": 0.7,
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda model: hosm.SecondOrderDSM(model, fraction=0.5),
        hosm.ThirdOrderDSM,
        lambda model: hosm.ThirdOrderDSM(model, third="laplacian"),
    ],
    ids=["order two of a fraction", "order three", "laplacian"],
)
def test_conditions_of_every_kind_in_batches_of_two_sizes(make):
    network = Conditioned()
    module = make(hosm.ScoreModel(network, hosm.VPSchedule()))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (6, 4):
        x0, noise = torch.randn(2, batch, 2).unbind()
        given = {"t": torch.rand(batch) * 0.8 + 0.1, "noise": noise}
        given["model_kwargs"] = conditions(batch)
        found = []
        for each in (compiled, module):
            torch.manual_seed(1)
            loss = each(x0, **given)
            found.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
