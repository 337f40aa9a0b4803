"""Masks with rows that allow nothing, as classifier-free guidance makes of dropped conditions.

PyTorch's attention is zero there. The oracle leaves out the keys that a sample may not look at.
"""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import vmap

import hosm_losses as hosm
from tests.cases import FUNCTIONS, VP, assert_same, given, randomise, with_gradients
from tests.versions import compiles_higher_orders

# What each sample may not look at: all of its condition, a part of it, nothing.
DROPPED = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])


class Attention(nn.MultiheadAttention):
    """PyTorch's, which does not take a condition of no tokens."""

    def forward(self, query, key, value, **named):
        if not key.shape[1]:
            bias = self.out_proj.bias
            return (torch.zeros_like(query) if bias is None else bias.expand_as(query)), None
        return super().forward(query, key, value, **named)


class Cross(nn.Module):
    """Attention to a condition, with the arguments of nn.TransformerDecoderLayer."""

    def __init__(self, **options):
        super().__init__()
        self.multihead_attn = Attention(4, 2, batch_first=True, **options)

    def forward(self, x, context, memory_mask=None, memory_key_padding_mask=None):
        masks = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
        mixed, _ = self.multihead_attn(x, context, context, need_weights=False, **masks)
        return x + mixed.sin()


def decoder():
    layer = nn.TransformerDecoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True)
    layer.multihead_attn = Attention(4, 2, batch_first=True)
    return layer


def added(blocked):
    """A mask of numbers, as PyTorch makes it of one in which True blocks."""
    return torch.zeros(blocked.shape).masked_fill(blocked, -torch.inf)


def for_queries(dropped):
    """The mask of every query of every head."""
    return dropped[:, None].expand(-1, 2, -1).repeat_interleave(2, 0)


MASKS = {
    "padding": lambda dropped: {"memory_key_padding_mask": dropped},
    "added padding": lambda dropped: {"memory_key_padding_mask": added(dropped)},
    "queries": lambda dropped: {"memory_mask": for_queries(dropped)},
    "both": lambda dropped: {
        "memory_key_padding_mask": dropped & torch.tensor([True, False, False]),
        "memory_mask": for_queries(dropped & torch.tensor([False, True, True])),
    },
}
LAYERS = {"cross": Cross, "without a bias": lambda: Cross(bias=False), "decoder": decoder}


class Guided(nn.Module):
    """Tokens (B, 2, 4) that look at a condition (B, 3, 4), by a mask or with fewer tokens."""

    def __init__(self, layer="cross", mask="padding"):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.layer, self.mask = nn.Linear(4, 4), LAYERS[layer](), MASKS[mask]
        self.by_hand = False
        randomise(self)

    def forward(self, x, t, context, dropped):
        hidden = (self.inner(x) + t[:, None, None]).sin()
        if not self.by_hand:
            return self.layer(hidden, context, **self.mask(dropped))
        rows = zip(hidden, context, dropped, strict=True)
        return torch.cat([self.layer(h[None], c[~hide][None]) for h, c, hide in rows])


def losses(network, order, step=None, **options):
    """A loss with its gradients in the parameters and the condition."""
    torch.manual_seed(2)
    x0, inputs = given((3, 2, 4), order)
    context = torch.randn(3, 3, 4, requires_grad=True)
    inputs["model_kwargs"] = {"context": context, "dropped": DROPPED}
    step = step or FUNCTIONS[order]
    loss = step(hosm.ScoreModel(network, VP), x0, **inputs, **options)
    return with_gradients(loss, [*network.parameters(), context], retain_graph=False)


ORDERS = [(1, {})]
for _engine in ("taylor", "reverse"):
    ORDERS += [(2, {"engine": _engine}), (3, {"engine": _engine})]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_row_that_allows_nothing_counts_as_zero(layer, mask):
    network = Guided(layer, mask)
    for order, options in ORDERS:
        found = []
        for network.by_hand in (False, True):
            found.append(losses(network, order, **options))
        assert_same(*found)


@pytest.mark.parametrize("engine", ["taylor", "reverse"])
def test_and_so_it_does_for_each_sample_under_vmap(engine):
    network = Guided("decoder")
    model, (x0, inputs) = hosm.ScoreModel(network, VP), given((3, 2, 4), 3)
    context = torch.randn(3, 3, 4)

    def loss(x0, noise, probe, t, context, dropped):
        alone = {"t": t[None], "noise": noise[None], "probe": probe[None, None]}
        alone["model_kwargs"] = {"context": context[None], "dropped": dropped[None]}
        return hosm.third_order_dsm(model, x0[None], engine=engine, **alone)

    probe = inputs["probe"][0]
    found = vmap(loss)(x0, inputs["noise"], probe, inputs["t"], context, DROPPED)
    network.by_hand = True
    parts = zip(x0, inputs["noise"], probe, inputs["t"], context, DROPPED, strict=True)
    assert_same(found, torch.stack([loss(*part) for part in parts]))


@pytest.mark.slow
@compiles_higher_orders
@pytest.mark.parametrize("mask", MASKS)
def test_and_under_compile(mask):
    found, network = [], Guided("decoder", mask)
    for compiled in (True, False):
        torch._dynamo.reset()
        step = torch.compile(hosm.third_order_dsm, backend="eager", fullgraph=True)
        network.by_hand = not compiled
        found.append(losses(network, 3, step if compiled else None))
    assert_same(*found)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_with_the_weights_asked_for_it_is_refused_for_pytorchs_own_value_is_nan(order):
    class Weighted(Guided):
        def forward(self, x, t, context, dropped):
            attention = self.layer.multihead_attn
            return attention(x, context, context, key_padding_mask=dropped)[0]

    for engine in ("taylor", "reverse") if order > 1 else (None,):
        with pytest.raises(ValueError, match="expected finite outputs"):
            losses(Weighted(), order, **({} if engine is None else {"engine": engine}))
