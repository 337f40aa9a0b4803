"""Layers of weights, one call on the whole stack; softmax, attention and gates."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hosm_losses.derivatives.primitive_mode import safe_primitives
from hosm_losses.derivatives.taylor import carried, convolution, derived
from hosm_losses.derivatives.taylor.jet import call
from hosm_losses.derivatives.taylor.table import rule_of_each
from tests.derivatives.taylor.checks import check

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (2, 4)),
    "linear of tokens": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 5, 4)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 4, 4)),
    "conv1d, same": (lambda: nn.Conv1d(2, 3, 2, padding="same", dilation=2), (2, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 4)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1),
        (2, 3, 3),
    ),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_between_curved_functions(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    check(lambda x: layer(x.sin()).sin(), shape, *layer.parameters())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_that_differs_from_side_to_side():
    layer = nn.Conv1d(2, 3, 2, padding="same")
    check(lambda x: layer(x.sin()).sin(), (2, 5), *layer.parameters())


def test_a_weight_that_depends_on_x():
    check(lambda x: F.linear(x.sin(), x.cos()).sin(), (4,))
    kernel = torch.randn(1, 1, 3, requires_grad=True)
    check(lambda x: F.conv1d(x.sin(), kernel * x.mean()).sin(), (1, 5), kernel)


def test_an_unbatched_convolution():
    layer = nn.Conv1d(3, 2, 3, padding=1)
    check(lambda x: layer(x.sin()).sin(), (4,), *layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_every_component_as_it_rounds_the_value(dtype):
    layer, x = nn.Linear(8, 8).float(), torch.randn(2, 3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = carried(lambda x: layer(x), x[0], x[1:])
        assert found.dtype == dtype
        torch.testing.assert_close(found[0], layer(x[0]), rtol=1e-2, atol=1e-2)
    found.float().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 3.0, dtype=torch.float32))


def test_one_call_on_the_whole_stack(monkeypatch):
    seen = []
    convolve = torch.conv2d

    def counted(x, *args, **kwargs):
        seen.append(len(x))
        return convolve(x, *args, **kwargs)

    rule_of_each(counted)(convolution._convolution)
    weight, x = torch.randn(2, 1, 3, 3), torch.randn(3, 1, 5, 5)
    carried(lambda x: call(counted, (x, weight), {}), x, torch.randn(2, *x.shape))
    assert seen == [9]


ALLOWED = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])
BIAS = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_softmax(dim):
    check(lambda x: torch.softmax(x + x.sin(), dim), (2, 3))
    check(lambda x: F.softmax(x.sin(), dim=dim).sin(), (2, 3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": ALLOWED},
        {"attn_mask": BIAS},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_attention(options):
    torch.manual_seed(0)
    inner = nn.Linear(4, 12)

    def function(x):
        q, k, v = inner(x).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, -1)
        if "enable_gqa" in options:
            k, v = k[:, :1], v[:, :1]
        return F.scaled_dot_product_attention(q, k, v, **options).sin()

    def reference(x):
        with safe_primitives():
            return function(x)

    check(function, (3, 4), *inner.parameters(), reference=reference)


@pytest.mark.parametrize("which", ["q", "k", "v", "qk", "kv", "qv", "mask"])
def test_attention_of_which_only_a_part_depends_on_x(which):
    """As in cross-attention to a text."""
    torch.manual_seed(0)
    fixed = torch.randn(3, 3, 4, requires_grad=True)

    def function(x):
        q, k, v = (x.sin() if name in which else fixed for name in "qkv")
        mask = x[..., :3].cos() if which == "mask" else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sin()

    def reference(x):
        with safe_primitives():
            return function(x)

    check(function, (3, 4), fixed, reference=reference)


def test_cross_attention_with_masks():
    torch.manual_seed(0)
    fixed = torch.randn(3, 3, 4)
    for options in ({"attn_mask": ALLOWED}, {"attn_mask": BIAS}, {"is_causal": True}):

        def function(x, options=options):
            return F.scaled_dot_product_attention(fixed, fixed, x.sin(), **options)

        def reference(x, function=function):
            with safe_primitives():
                return function(x)

        check(function, (3, 4), reference=reference)


BLOCKED = torch.tensor([[False, True, False], [False, False, True], [False, False, False]])
PADDED = torch.tensor([[False, True, False], [False, False, False], [False, False, True]])
FORMS = {
    "self": lambda x, _: (x, x, x),
    "values apart": lambda x, _: (x, x, x.sin()),
    "queries": lambda x, context: (x, context, context),
    "context": lambda x, context: (context, x, x),
    "values": lambda x, context: (context, context, x),
}
MASKS = {
    "none": {},
    "blocked": {"attn_mask": BLOCKED},
    "of each head": {"attn_mask": BLOCKED.expand(6, 3, 3)},
    "padded": {"key_padding_mask": PADDED},
    "both": {"attn_mask": BLOCKED, "key_padding_mask": PADDED},
    "added": {"attn_mask": torch.zeros(3, 3).double().masked_fill(BLOCKED, -math.inf)},
    "added, padded": {"attn_mask": BIAS.double(), "key_padding_mask": PADDED},
    "causal": {"attn_mask": BLOCKED, "is_causal": True},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_module_of_attention(form, masks, weights):
    torch.manual_seed(0)
    module, context = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 3, 4)

    def function(x):
        mixed, shown = module(*FORMS[form](x, context), **MASKS[masks], **weights)
        return mixed.sin() if shown is None else mixed.sin() + shown.sum((-2, -1)).mean().cos()

    def reference(x):
        with safe_primitives():
            return function(x)

    check(function, (3, 4), *module.parameters(), reference=reference)


@pytest.mark.parametrize("options", [{"kdim": 3, "vdim": 5}, {"bias": False}], ids=str)
def test_a_module_of_attention_with_weights_of_its_own(options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=True, **options)
    keys, values = torch.randn(3, 3, module.kdim), torch.randn(3, 3, module.vdim)

    def function(x):
        return module(x.cos(), keys * x[..., :1], values, need_weights=False)[0].sin()

    def reference(x):
        with safe_primitives():
            return function(x)

    check(function, (3, 4), *module.parameters(), reference=reference)


def test_attention_of_a_module_takes_no_forward_mode(monkeypatch):
    """Which costs half as much again at order two, and four times as much with the laplacian."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    monkeypatch.setattr(derived, "along", None)
    x = torch.randn(3, 3, 4)
    for module in (layer, lambda x: layer.self_attn(x, x, x)[0]):
        assert carried(module, x, torch.randn(1, *x.shape)).shape == (2, *x.shape)


def test_one_mask_of_a_dropout_in_attention_for_value_and_derivatives():
    x = torch.randn(2, 3, 4)

    def function(x):
        return F.scaled_dot_product_attention(x, x, torch.eye(3).expand(2, 3, 3), dropout_p=0.5)

    torch.manual_seed(0)
    found = carried(function, x, torch.randn(2, *x.shape))
    dropped = found[0] == 0
    assert dropped.any()
    assert not dropped.all()
    assert ((found[1:] == 0) == dropped).all()


def test_gates():
    def by_hand(x, dim):
        value, gate = x.chunk(2, dim)
        return value * gate.sigmoid()

    check(lambda x: F.glu(x.sin()), (2, 4), reference=lambda x: by_hand(x.sin(), -1))
    check(lambda x: F.glu(x.sin(), dim=1), (2, 3), reference=lambda x: by_hand(x.sin(), 1))
    with pytest.raises(ValueError, match="glu: expected an even size"):
        carried(F.glu, torch.ones(2, 3), torch.ones(1, 2, 3))


def test_short_types_take_softmax_in_float32():
    q = torch.randn(2, 8, 4).to(torch.bfloat16)
    got = carried(lambda x: F.scaled_dot_product_attention(x, x, x), q, q.unsqueeze(0))
    assert got.dtype == torch.bfloat16
    exact = carried(
        lambda x: F.scaled_dot_product_attention(x, x, x), q.double(), q.double().unsqueeze(0)
    )
    torch.testing.assert_close(got.double(), exact, rtol=3e-2, atol=3e-2)
