"""The samples that a fraction leaves with the first term alone: PyTorch's own operators."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from tests.cases import assert_same, loss_and_gradients


class Block(nn.Module):
    """Attention over many tokens, in a checkpoint or not."""

    def __init__(self, checkpoint=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.heads = nn.LayerNorm(3), nn.Linear(3, 9)
        self.checkpoint = checkpoint

    def inner(self, x):
        q, k, v = self.heads(self.norm(x)).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)

    def forward(self, x, t):
        return x + (self.checkpoint(self.inner, x) if self.checkpoint else self.inner(x))


def loss_of(network, fraction):
    generator = torch.Generator().manual_seed(2)
    return loss_and_gradients(network, (8, 40, 3), 2, fraction=fraction, generator=generator)


def test_the_rest_of_a_fraction_keeps_no_weights_of_attention():
    sizes = []

    def pack(tensor):
        if tensor.shape[-2:] == (40, 40):
            sizes.append(tensor.numel() // 1600)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(Block(), 0.25)
    # Those of the two samples that have higher terms, by component.
    assert sizes
    assert max(sizes) <= 2 * 2


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_checkpoint_inside_has_the_same_operators_again(fraction):
    assert_same(loss_of(Block(hosm.checkpoint), fraction), loss_of(Block(), fraction), 1e-11)
