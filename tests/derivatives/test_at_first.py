"""Operators that are PyTorch's own until their gradient is differentiated."""

import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives import primitives
from hosm_losses.derivatives.primitive_mode import safe_primitives
from tests.versions import OLD


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(primitives, "SMALL", 0)


MASK = torch.tensor([[True, False, True], [True, True, False], [False, True, False]])


def attention(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


HEADS = [(2, 2, 3, 4)] * 3
OPERATORS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 3, 4), (4,), (4,)]),
    "layer_norm of torch": (lambda x, w: torch.layer_norm(x, (4,), w), [(2, 3, 4), (4,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3), (4,), (4,)]),
    "group_norm of torch": (lambda x: torch.group_norm(x, 2, eps=1e-3), [(2, 4, 3)]),
    "attention": (attention(), HEADS),
    "a scale": (attention(scale=0.7), HEADS),
    "causal": (attention(is_causal=True), HEADS),
    "a mask": (attention(attn_mask=MASK), HEADS),
    "numbers added": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask),
        [*HEADS, (3, 3)],
    ),
}


def given(name, dtype=torch.float64):
    torch.manual_seed(0)
    function, shapes = OPERATORS[name]
    return function, [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_value_and_gradient_are_those_of_pytorch(name, dtype):
    function, tensors = given(name, dtype)
    native = function(*tensors)
    with safe_primitives(at_first=True):
        value = function(*tensors)
    assert value.dtype == native.dtype
    torch.testing.assert_close(value, native)
    c = torch.randn_like(value)
    mine, theirs = (torch.autograd.grad(y, tensors, c) for y in (value, native))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", OPERATORS)
def test_further_gradients_are_those_of_the_composition(name):
    found = []
    for at_first in (True, False):
        function, tensors = given(name)
        with safe_primitives(at_first=at_first):
            value = function(*tensors).sin().sum()
        for _ in range(3):
            parts = torch.autograd.grad(value, tensors, create_graph=True)
            found.append(parts)
            value = sum(part.sin().sum() for part in parts)
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_types_of_autocast_are_kept_for_the_pass_back(name, kind):
    function, tensors = given(name, torch.float32)
    found = []
    for mode in (safe_primitives(at_first=True), safe_primitives(enabled=False)):
        with torch.autocast("cpu", dtype=kind), mode:
            value = function(*tensors)
        # Outside autocast, as a trainer has it.
        found.append((value, *torch.autograd.grad(value.sum(), tensors)))
    rounded = {"rtol": 0.02, "atol": 2e-3} if OLD else {}  # a gradient of its own
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **rounded)


@pytest.mark.parametrize("name", OPERATORS)
def test_under_transforms_the_composition_is_differentiated(name):
    function, tensors = given(name)
    tensors = [tensor.detach() for tensor in tensors]
    places = tuple(range(len(tensors)))

    def gradient(*values):
        with safe_primitives(at_first=True):
            return torch.func.grad(lambda *each: function(*each).sin().sum(), places)(*values)

    torch.testing.assert_close(
        torch.func.jvp(gradient, tuple(tensors), tuple(tensors))[1],
        tuple(along_itself(function, tensors)),
        rtol=1e-6,
        atol=1e-8,
    )


def along_itself(function, tensors, step=1e-5):
    """The derivative of the gradient along the tensors, by central differences."""
    parts = []
    for sign in (1, -1):
        moved = [(tensor * (1 + sign * step)).requires_grad_() for tensor in tensors]
        parts.append(torch.autograd.grad(function(*moved).sin().sum(), moved))
    return [(one - other) / (2 * step) for one, other in zip(*parts, strict=True)]


def test_small_tensors_go_through_the_composition(monkeypatch):
    nodes = []
    for small in (0, 6, 7):
        monkeypatch.setattr(primitives, "SMALL", small)
        with safe_primitives(at_first=True):
            value = F.layer_norm(torch.ones(2, 3, requires_grad=True), (3,))
        nodes.append(type(value.grad_fn).__name__)
    assert nodes[0] == nodes[1] != nodes[2]


def test_a_dropout_inside_attention_is_drawn_once():
    q = torch.randn(1, 1, 5, 4, requires_grad=True)
    for options in ({"dropout_p": 0.5}, {"attn_mask": None, "dropout_p": 0.5}):
        torch.manual_seed(1)
        with safe_primitives(at_first=True):
            value = F.scaled_dot_product_attention(q, q, torch.eye(5, 5)[None, None], **options)
        # The weights themselves: those that were dropped have no gradient.
        weights = torch.softmax(q @ q.mT / 2, -1)
        expected = (value.detach() != 0) * weights * 2
        torch.testing.assert_close(value, expected)
        (got,) = torch.autograd.grad(value.sin().sum(), q)
        (wanted,) = torch.autograd.grad(expected.sin().sum(), q)
        torch.testing.assert_close(got, wanted)


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


def loss_of(network, **options):
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(8, 40, 3, generator=torch.Generator().manual_seed(3))
    return hosm.second_order_dsm(model, x0, generator=generator, **options)


def test_the_rest_of_a_fraction_keeps_no_weights_of_attention():
    sizes = []

    def pack(tensor):
        if tensor.shape[-2:] == (40, 40):
            sizes.append(tensor.numel() // 1600)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(Block(), fraction=0.25)
    # Those of the two samples that have higher terms, by component.
    assert sizes
    assert max(sizes) <= 2 * 2


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_checkpoint_inside_has_the_same_operators_again(fraction):
    found = []
    for checkpoint in (None, hosm.checkpoint):
        network = Block(checkpoint)
        loss = loss_of(network, fraction=fraction)
        found.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_kept_that_autograd_does_not_know_of(name):
    """A checkpoint packs what is kept; what a closure holds would stay."""
    function, tensors = given(name)
    inner = [tensor * 1 for tensor in tensors]
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda _: None),
        safe_primitives(at_first=True),
    ):
        value = function(*inner)
    references = [weakref.ref(each) for each in inner]
    del inner
    assert [each() for each in references] == [None] * len(references)
    assert value.grad_fn is not None
