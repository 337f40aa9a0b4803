"""Operators that are PyTorch's own until their gradient is differentiated."""

import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from hosm_losses.taylor import primitives
from hosm_losses.taylor.primitive_mode import safe_primitives
from tests.cases import assert_same, loss_and_gradients
from tests.versions import OLD


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    monkeypatch.setattr(primitives, "SMALL", 0)


MASK = torch.tensor([[True, False, True], [True, True, False], [False, True, False]])
SDPA, HEADS = F.scaled_dot_product_attention, [(2, 2, 3, 4)] * 3
OPERATORS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 3, 4), (4,), (4,)]),
    "layer_norm of torch": (lambda x, w: torch.layer_norm(x, (4,), w), [(2, 3, 4), (4,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3), (4,), (4,)]),
    "group_norm of torch": (lambda x: torch.group_norm(x, 2, eps=1e-3), [(2, 4, 3)]),
    "a scale": (lambda q, k, v: SDPA(q, k, v, scale=0.7), HEADS),
    "causal": (lambda q, k, v: SDPA(q, k, v, is_causal=True), HEADS),
    "a mask": (lambda q, k, v: SDPA(q, k, v, attn_mask=MASK), HEADS),
    "numbers added": (SDPA, [*HEADS, (3, 3)]),
}


def given(name, dtype=torch.float64):
    torch.manual_seed(0)
    function, shapes = OPERATORS[name]
    return function, [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


SHORT, SINGLE, HALF = torch.bfloat16, torch.float32, torch.float16
TYPES = [(torch.float64, None), (SINGLE, None), (SHORT, None), (SINGLE, SHORT), (SINGLE, HALF)]


@pytest.mark.parametrize(("dtype", "autocast"), TYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_value_and_gradient_are_those_of_pytorch(name, dtype, autocast):
    function, tensors = given(name, dtype)
    found = []
    for mode in (safe_primitives(at_first=True), safe_primitives(enabled=False)):
        with torch.autocast("cpu", autocast or SHORT, enabled=autocast is not None), mode:
            value = function(*tensors)
        # Outside autocast, as a trainer has it.
        cotangent = torch.linspace(-1, 1, value.numel()).reshape(value.shape).to(value)
        found.append((value, *torch.autograd.grad(value, tensors, cotangent)))
    # The older PyTorch has a gradient of its own there.
    rounded = {"rtol": 0.02, "atol": 2e-3} if OLD and autocast else {}
    torch.testing.assert_close(*found, **rounded)


@pytest.mark.parametrize("name", OPERATORS)
def test_further_gradients_are_those_of_the_composition(name):
    found = []
    for at_first in (True, False):
        function, tensors = given(name)
        with safe_primitives(at_first=at_first):
            value, parts = function(*tensors).sin().sum(), []
        for _ in range(3):
            parts.append(torch.autograd.grad(value, tensors, create_graph=True))
            value = sum(part.sin().sum() for part in parts[-1])
        found.append([each for part in parts for each in part])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)

    def gradient(*values):
        places = tuple(range(len(values)))
        with safe_primitives(at_first=True):
            return torch.func.grad(lambda *each: function(*each).sin().sum(), places)(*values)

    # The same by a transform: the Hessian is symmetric.
    plain = tuple(tensor.detach() for tensor in tensors)
    slope = sum((part * tensor).sum() for part, tensor in zip(parts[0], plain, strict=True))
    expected = torch.autograd.grad(slope, tensors)
    assert_same(torch.func.jvp(gradient, plain, plain)[1], expected)


def test_a_dropout_inside_attention_is_drawn_once():
    q, v = torch.randn(1, 1, 5, 4, requires_grad=True), torch.eye(5, 5)[None, None]
    for call in (lambda: SDPA(q, q, v, None, 0.5), lambda: SDPA(q, q, v, dropout_p=0.5)):
        with safe_primitives(at_first=True):
            value = call()
        # The weights themselves: those that were dropped have no gradient.
        expected = (value.detach() != 0) * torch.softmax(q @ q.mT / 2, -1) * 2
        assert_same(value, expected)
        assert_same(*(torch.autograd.grad(each.sin().sum(), q) for each in (value, expected)))


class Block(nn.Module):
    """Attention over many tokens, in a checkpoint or not."""

    def __init__(self, checkpoint=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.heads = nn.LayerNorm(3), nn.Linear(3, 9)
        self.checkpoint = checkpoint

    def inner(self, x):
        q, k, v = self.heads(self.norm(x)).unsqueeze(1).chunk(3, -1)
        return SDPA(q, k, v).squeeze(1)

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


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_kept_that_autograd_does_not_know_of(name):
    """A checkpoint packs what is kept; what a closure holds would stay."""
    function, tensors = given(name)
    inner = [tensor * 1 for tensor in tensors]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda _: None)
    with hooks, safe_primitives(at_first=True):
        value = function(*inner)
    references = [weakref.ref(each) for each in inner]
    del inner
    assert [each() for each in references] == [None] * len(references)
    assert value.grad_fn is not None
