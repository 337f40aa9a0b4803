"""What could change in silence of the texts and private names of PyTorch, with its versions.

A test that fails after an upgrade of PyTorch names what to change in `_torch_internals`. Names
that are gone are an AttributeError in many other tests.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from hosm_losses import _torch_internals as internals
from hosm_losses._checks import can_read_values
from tests.cases import OnceDifferentiable
from tests.versions import DIFFERENTIABLE_ONCE

ONES = torch.ones(2)
plain_checkpoint = partial(checkpoint, use_reentrant=False)


def leaf(*shape):
    return torch.ones(shape or 2, requires_grad=True)


class Forgets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, cotangent):
        return ctx.kept * cotangent


class Kind(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise ArithmeticError("reached")


# What PyTorch says: 2.6, 2.13 and 2.15.
def once_and_again(function, x=None):
    """Two backward passes through one graph."""
    x = leaf() if x is None else x
    value = function(x).sum()
    torch.autograd.grad(value, x, retain_graph=True)
    torch.autograd.grad(value, x)


def twice(function, x=None):
    x = leaf() if x is None else x
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


def attend(x):
    return F.scaled_dot_product_attention(*[x[:, None, None] * torch.ones(2, 1, 4, 2)] * 3).sin()


class Layer(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


def compiled_by_itself():
    layer = Layer(2, 2)
    assert getattr(layer, internals.COMPILED_PART) is None
    layer.compile(backend="aot_eager")
    assert getattr(layer, internals.COMPILED_PART) is not None
    twice(lambda x: layer(x * torch.ones(1, 2)))


def doubled(x):
    return x * 2


def in_script():
    torch.jit.script(doubled)(torch.Tensor._make_wrapper_subclass(Kind, (2,)))


def changed_since():
    kept = torch.ones(2)
    value = (leaf() * kept).sum()
    kept += 1
    value.backward()


SAID = {
    "NOT_TWICE": [
        lambda: twice(lambda x: DIFFERENTIABLE_ONCE(x.sin()[None]).sin()),
        lambda: twice(lambda x: attend(x.sin())),
    ],
    "NO_GRAPH": [lambda: torch.autograd.grad(ONES.sum(), ONES)],
    "REENTRANT_CHECKPOINT": [
        lambda: once_and_again(lambda x: checkpoint(torch.sin, x, use_reentrant=True))
    ],
    "HOOKS_IN_TRANSFORM": [lambda: grad(lambda x: plain_checkpoint(torch.sin, x).sum())(ONES)],
    "DOUBLE_BACKWARD_OF_COMPILED": [compiled_by_itself],
    "CHANGED_SINCE": [changed_since],
    "LOST_ATTRIBUTE": [lambda: once_and_again(Forgets.apply)],
    "IN_SCRIPT": [in_script],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=pytest.mark.slow) if "COMPILED" in each else each for each in SAID],
)
def test_texts_of_errors(name):
    words = getattr(internals, name)
    words = (words,) if isinstance(words, str) else words
    for function in SAID[name]:
        with pytest.raises((RuntimeError, IndexError, AttributeError)) as error:
            function()
        assert any(each in str(error.value) for each in words)


def test_transforms_are_seen_and_what_is_inside_them():
    """torch._C._functorch: get_interpreter_stack and TransformType: 2.13 and 2.15."""
    found = []

    def look(x):
        assert can_read_values(x) == (x.is_cpu and not internals.in_functorch())
        seen = internals.in_functorch(), internals.differentiated()
        found.append("".join("-x"[each] for each in seen))
        return x.sum()

    x, unasked = torch.ones(2, 2), torch.no_grad()(look)
    look(x)
    look(torch.ones(2, 2, device="meta"))
    jvp(look, (x,), (x,))
    vmap(look)(x[None])
    vjp(look, x)
    torch.no_grad()(grad(look))(x)
    grad(unasked)(x)
    vmap(grad(look))(x[None])
    assert found == ["--", "--", "x-", "x-", "xx", "xx", "x-", "xx"]


def test_custom_functions_are_told_from_operators_and_so_are_their_gradients():
    """_forward_cls, BackwardHookFunction, torch::autograd::Error: 2.6, 2.13 and 2.15.

    torch.autograd.grad passes by the error of what is marked once_differentiable.
    """
    x = leaf()
    once = OnceDifferentiable.apply(x)
    assert internals.custom_function(once.grad_fn) is OnceDifferentiable
    assert internals.custom_function(x.sin().grad_fn) is None
    layer = nn.Linear(2, 2)
    layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    nodes = internals.graph_nodes([layer(leaf(1, 2))])
    assert [*map(internals.custom_function, nodes)].count(internals.MODULE_HOOK) == 2
    twice(lambda x: OnceDifferentiable.apply(x.sin()).sin())
    (lost,) = torch.autograd.grad(once.sin().sum(), x, create_graph=True)
    assert internals.has_graph(x * 2)
    assert not internals.has_graph(lost)
    assert not internals.has_graph(x.detach())
