"""The rule for functions without one, spellings, tools around a loss, and what is refused.

Never is a derivative wrong in silence, nor is the engine given up for tools and properties.
"""

import logging

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import hosm_losses as hosm
from hosm_losses.taylor import TaylorError, propagate
from tests.cases import OnceDifferentiable, assert_same, gradients

X = torch.rand(3, 4, dtype=torch.float64) + 0.5
W = torch.ones(1, 3, 4, dtype=torch.float64)


REFUSED = {
    "without derivatives": Tensor.detach,
    "not of x": lambda x: X,
    "its data": lambda x: x.data,
    "no tensor": len,
    "a custom Function": OnceDifferentiable.apply,
    "no_grad": torch.no_grad()(lambda x: x.abs()),
    "its memory": lambda x: x.as_strided((2, 2), (1, 1)),
    "other bits": lambda x: x.view(torch.int64),
    "other bits by name": lambda x: x.view(dtype=torch.int64),
    "out": lambda x: F.normalize(x, 2.0, 1, 1e-12, torch.empty(3, 4)),
    "out of a determinant": lambda x: torch.linalg.det(x[:2, :2], out=torch.empty(())),
    "torch.func": lambda x: torch.func.vmap(torch.sin)(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_without_right_derivatives_are_refused(name):
    for around in (torch.enable_grad, torch.no_grad):
        with around(), pytest.raises(TaylorError):
            propagate(REFUSED[name], X, W)


def normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, [4]).tanh()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make", [lambda: torch.jit.script(normed), lambda: torch.jit.script(nn.LayerNorm(4).double())]
)
def test_torchscript_is_left_to_who_knows_it(make):
    """A norm inside has PyTorch's gradient, which no engine would notice to be wrong."""
    layer, scripted = nn.Linear(4, 4).double(), make()
    model = hosm.ScoreModel(lambda x, t: scripted(layer(x)), hosm.VPSchedule())
    for engine in ("auto", "taylor"):
        for loss in (hosm.second_order_dsm, hosm.third_order_dsm):
            with pytest.raises(hosm.DerivativeError):
                loss(model, X, engine=engine)
    if not isinstance(scripted, nn.Module):
        assert hosm.first_order_dsm(model, X).isfinite()
        assert hosm.second_order_dsm(model, X, engine="reverse").isfinite()


# ---------------------------------------------------------------------- tools and properties
def test_properties_are_those_of_the_value():
    seen = []

    def function(x):
        seen.append((x.shape, x.size(), x.size(0), x.dim(), x.ndim, x.numel(), len(x), x.stride()))
        seen.append((x.dtype, x.device, x.is_floating_point(), x.is_contiguous(), x.is_cuda))
        seen.append((x.requires_grad, bool((x > 0).all()), x.argmax(-1).shape, x.layout, x.type()))
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x

    x = torch.rand(3, 2, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    propagate(function, x, torch.ones_like(x).unsqueeze(0))
    got, seen[:] = list(seen), []
    function(x)
    assert got == seen


class Watched(TorchFunctionMode):
    """Somebody's own mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def step(network, engine="auto"):
    torch.manual_seed(1)
    model = hosm.ScoreModel(lambda x, t: network(x), hosm.VPSchedule())
    loss = hosm.third_order_dsm(model, torch.ones(3, 1, 4, 4), engine=engine)
    return [loss, *gradients(loss, network)]


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Softplus()),
        *(nn.Flatten(), nn.Linear(64, 16), nn.Unflatten(1, (1, 4, 4))),
    )


@pytest.mark.parametrize(
    "mode",
    [
        lambda: FlopCounterMode(display=False),
        Watched,
        lambda: torch.device("cpu"),
        lambda: torch.profiler.profile(record_shapes=True, with_stack=True),
    ],
)
def test_modes_around_a_loss_change_nothing(mode, caplog):
    network = small_network()
    expected = step(network, "taylor")
    with caplog.at_level(logging.INFO, "hosm_losses"), mode() as around:
        chosen = step(network)
    assert not caplog.records  # no other engine
    # The counter takes PyTorch's silu_backward apart, at order one too, which rounds otherwise.
    assert_same(chosen, expected, 1e-14 if isinstance(around, FlopCounterMode) else 0)


def test_a_hook_sees_the_gradient_in_the_value_and_may_not_change_it():
    x, shown = torch.rand(2, 3, requires_grad=True), []

    def observed(point, hook=shown.append):
        inner = point.sin()
        inner.register_hook(hook)
        return inner * inner

    # Of the square and of its derivative, twice the product.
    propagate(observed, x, torch.ones(1, 2, 3)).sum().backward()
    torch.testing.assert_close(shown[0], 2 * x.sin() + 2 * x.cos())
    with pytest.raises(hosm.DerivativeError):
        propagate(lambda x: observed(x, lambda g: 2 * g), x, torch.ones(1, 2, 3)).sum().backward()
    assert not propagate(observed, x.detach(), torch.ones(1, 2, 3)).requires_grad
