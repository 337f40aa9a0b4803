"""A remedy only where its cause may be: in the graph of the module at fault."""

import re

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.derivatives.primitives import PRIMITIVES
from tests.diagnostics.test_check import Around, CheckpointFunction, Custom, Detached, check
from tests.oracles import Detaches

PLAIN = "without .detach(), .data or torch.no_grad()"
ENGINES = ("auto", "taylor", "reverse")


class Fine(torch.autograd.Function):
    """Right at all orders in reverse mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class FlashFunction(Fine):
    """Fine, with a name that has a remedy."""


class Partly(Detaches):
    """Keeps the graph to the incoming gradient and loses that to its input."""

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * grad


class PartlyFlash(Partly):
    """Not fine."""


class Calls(nn.Module):
    def __init__(self, *functions):
        super().__init__()
        self.layer, self.functions = nn.Linear(4, 4), functions

    def forward(self, x):
        x = self.layer(x)
        for function in self.functions:
            x = function(x)
        return x


class FlashAttentionCheckpoint(nn.Module):
    """A name alone: its fault is a plain detach."""

    def forward(self, x):
        return x.sin() * x.detach()


def fault(network, **options):
    with pytest.raises(hosm.DerivativeError) as caught:
        check(network, dtype=torch.float64, **options)
    return str(caught.value)


def general(message):
    assert PLAIN in message
    for words in ("Fused attention", "checkpoint", "autograd.Function", "In its graph"):
        assert words not in message


@pytest.mark.parametrize("engine", ["auto", "reverse"])
def test_a_function_of_another_module_is_not_blamed(engine):
    network = Around(Detached())
    network.blocks[0] = Calls(FlashFunction.apply)
    message = fault(network, derivative=engine)
    assert "in the module 'blocks.1' (Detached)" in message
    general(message)


def test_the_name_of_a_module_is_no_cause():
    general(fault(Around(FlashAttentionCheckpoint())))


@pytest.mark.parametrize("detach_first", [False, True])
@pytest.mark.parametrize("engine", ["auto", "reverse"])
def test_a_fine_function_beside_the_fault_is_not_all_that_is_told(engine, detach_first):
    functions = [FlashFunction.apply, lambda x: x * x.detach().cos()]
    message = fault(
        Around(Calls(*(reversed(functions) if detach_first else functions))), derivative=engine
    )
    assert "in the module 'blocks.1' (Calls)" in message
    assert "In its graph: FlashFunction. Fused attention kernels" in message
    assert PLAIN in message


@pytest.mark.parametrize("engine", ["auto", "reverse"])
def test_fine_functions_are_no_alarm_in_float32_where_their_modules_are_checked_alone(engine):
    check(Around(Calls(FlashFunction.apply, Fine.apply)), derivative=engine)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ["auto", "reverse"])
def test_of_two_functions_both_are_named_with_the_remedy_of_each(engine, order):
    for functions in ((Fine.apply, Partly.apply), (Partly.apply, Fine.apply)):
        message = fault(Around(Calls(*functions)), derivative=engine, order=order)
        assert "in the module 'blocks.1' (Calls)" in message
        assert re.search(r"In its graph: (Fine, Partly|Partly, Fine)\.", message)
        assert message.count("A custom autograd.Function needs a backward") == 1
    message = fault(Around(Calls(Fine.apply, PartlyFlash.apply)), derivative=engine, order=order)
    assert "Fused attention kernels" in message
    assert "A custom autograd.Function needs a backward" in message


def test_a_checkpoint_at_fault_has_the_remedy_that_works():
    message = fault(Around(Custom(CheckpointFunction)), derivative="reverse")
    assert "lambda f, i, p, flag: hosm_losses.checkpoint(f, *i) if flag else f(*i)" in message


class AttentionOp(torch.autograd.Function):
    """EDM's operator as documented: a backward of its own, made of differentiable operators."""

    @staticmethod
    def forward(ctx, q, k):
        w = torch.softmax(q.mT @ k / q.shape[1] ** 0.5, -1)
        ctx.save_for_backward(q, k, w)
        return w

    @staticmethod
    def backward(ctx, grad):
        q, k, w = ctx.saved_tensors
        inner = w * (grad - (grad * w).sum(-1, keepdim=True)) / q.shape[1] ** 0.5
        return k @ inner.mT, q @ inner


class Weights(nn.Module):
    """A layer around EDM's operator."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x):
        q, k = self.layer(x).reshape(len(x), 2, 4).chunk(2, 1)
        return (AttentionOp.apply(q, k) @ x[..., None])[..., 0]


@pytest.mark.parametrize("order", [2, 3])
def test_edms_attention_is_right_in_reverse_and_its_remedy_says_where_it_is_not(order):
    for engine in ("auto", "reverse"):
        check(Around(Weights()), dtype=torch.float64, order=order, derivative=engine)
    message = fault(Around(Weights()), order=order, derivative="taylor")
    assert "in the module 'blocks.1' (Weights)" in message
    for words in ("right in reverse mode", "laplacian", "several probes at once"):
        assert words in message


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_partial_drop_is_found_with_every_engine(engine, order):
    message = fault(Around(Calls(Partly.apply)), derivative=engine, order=order)
    assert "in the module 'blocks.1' (Calls)" in message
    if engine != "taylor":  # which refuses every custom Function
        assert "off by" in message
    assert "Partly" in message


@torch.library.custom_op("hosm_tests::misdifferentiated", mutates_args=())
def misdifferentiated(x: torch.Tensor) -> torch.Tensor:
    """Stands for an operator whose second derivative PyTorch has wrong, as it has of norms."""
    return torch.sin(x)


misdifferentiated.register_autograd(
    lambda ctx, cotangent: cotangent * ctx.saved_tensors[0].detach().cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("order", [2, 3])
def test_primitives_are_advised_where_they_mend_it(order, monkeypatch):
    operator, options = torch.ops.hosm_tests.misdifferentiated, {"derivative": "reverse"}
    monkeypatch.setitem(PRIMITIVES, operator, torch.sin)
    check(Around(Calls(operator)), order=order, **options)
    message = fault(Around(Calls(operator)), order=order, primitives=False, **options)
    assert "in the module 'blocks.1' (Calls)" in message
    assert message.endswith("Leave primitives=True in ScoreModel, which replaces such operators.")
    message = fault(Around(Detached()), derivative="reverse", primitives=False)
    general(message)
    assert "primitives" not in message
