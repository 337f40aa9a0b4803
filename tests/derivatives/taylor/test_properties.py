"""Tools around a loss, properties and casts.

The engine is not given up for tools and properties, nor is it misled. Every component follows a cast
to a floating type; integers and masks carry nothing.
"""

import logging

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hosm_losses as hosm
from hosm_losses import DerivativeError
from hosm_losses.derivatives.taylor import Jet, TaylorError, carried
from tests.derivatives.taylor.checks import BATCH, check

SHAPE = (1, 4, 4)


class Seen(TorchDispatchMode):
    """Somebody's own log of operators."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (torch.ops.aten.convolution.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


class Watched(TorchFunctionMode):
    """Somebody's own mode of functions."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def setting():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Softplus()),
        *(nn.Flatten(), nn.Linear(64, 16), nn.Unflatten(1, SHAPE)),
    )
    return network, hosm.ScoreModel(lambda x, t: network(x), hosm.VPSchedule())


def step(network, model, derivative="auto", **options):
    torch.manual_seed(1)
    loss = hosm.third_order_dsm(model, torch.ones(3, *SHAPE), derivative=derivative, **options)
    return loss, *torch.autograd.grad(loss, list(network.parameters()))


MODES = {
    "counter": lambda network: FlopCounterMode(display=False),
    "dispatch": lambda network: Seen(),
    "function": lambda network: Watched(),
    "device": lambda network: torch.device("cpu"),
    "profiler": lambda network: torch.profiler.profile(record_shapes=True, with_modules=True),
}


@pytest.mark.parametrize("options", [{}, {"third": "laplacian"}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_modes_around_a_loss_change_nothing(mode, options, caplog):
    network, model = setting()
    expected = step(network, model, "taylor", **options)
    with MODES[mode](network):
        got = step(network, model, "taylor", **options)
    with caplog.at_level(logging.INFO, "hosm_losses"), MODES[mode](network):
        chosen = step(network, model, **options)
    assert not caplog.records  # no other engine
    # The counter takes PyTorch's silu_backward apart, at order one too, which rounds otherwise.
    rounding = 1e-15 if mode == "counter" else 0
    for one, two, reference in zip(got, chosen, expected, strict=True):
        torch.testing.assert_close(one, reference, rtol=rounding, atol=rounding)
        torch.testing.assert_close(two, reference, rtol=rounding, atol=rounding)


def test_the_operations_of_a_loss_are_counted():
    """As many products as there are without the counter's hooks, and those of each module."""
    network, model = setting()
    with FlopCounterMode(display=False) as counter:
        step(network, model)
    with Seen() as seen:
        step(network, model)
    parts = counter.get_flop_counts()
    convolution, linear = parts["Sequential.0"], parts["Sequential.5"]
    # A stack of two; its pass back in the weights and in x; and the passes back of that.
    single = 2 * 3 * 16 * 4 * 9
    assert convolution[torch.ops.aten.convolution] >= 2 * single
    assert linear[torch.ops.aten.mm] >= 2 * (2 * 3 * 64 * 16)
    total = sum(parts["Global"].values())
    assert counter.get_total_flops() == total
    assert seen.products > 0


def test_a_hook_sees_the_gradient_in_the_value_and_may_not_change_it():
    x = torch.rand(2, 3, requires_grad=True)
    shown = []

    def observed(point):
        inner = point.sin()
        inner.register_hook(lambda gradient: shown.append(gradient))
        return inner * inner

    stack = carried(observed, x, torch.ones(1, 2, 3))
    stack[0].sum().backward()
    torch.testing.assert_close(shown[0], 2 * x.sin())

    def changed(point):
        inner = point.sin()
        inner.register_hook(lambda gradient: 2 * gradient)
        return inner * inner

    with pytest.raises(DerivativeError, match="hooks that look at gradients"):
        carried(changed, x, torch.ones(1, 2, 3)).sum().backward()
    without = carried(changed, x.detach(), torch.ones(1, 2, 3))
    assert not without.requires_grad


@pytest.mark.parametrize(
    "function",
    [
        lambda x: setattr(x, "data", x.detach()),
        lambda x: x.as_strided((2, 2), (1, 1)),
    ],
)
def test_what_reaches_for_the_memory_of_x_is_refused(function):
    x = torch.rand(2, 3)
    with pytest.raises(TaylorError, match=r"in place|where the elements"):
        carried(lambda x: (function(x * 1), x)[1], x, x.unsqueeze(0))


OTHER = torch.ones(3, dtype=torch.int16)
TO_WHOLE = {
    "to a type": lambda x: x.to(torch.int64),
    "to a type by name": lambda x: x.to(dtype=torch.int32),
    "to a device and a type": lambda x: x.to("cpu", torch.int64),
    "to another tensor": lambda x: x.to(OTHER),
    "to another tensor by name": lambda x: x.to(tensor=OTHER),
    "type": lambda x: x.type(torch.int64),
    "type by its name": lambda x: x.type("torch.LongTensor"),
    "type by keyword": lambda x: x.type(dtype=torch.uint8),
    "type as": lambda x: x.type_as(OTHER),
    "to bool": lambda x: x.to(torch.bool),
    **{
        name: lambda x, name=name: getattr(x, name)()
        for name in ("int", "long", "short", "char", "byte", "bool")
    },
}


@pytest.mark.parametrize("name", TO_WHOLE)
def test_whole_numbers_have_no_derivatives_and_none_when_cast_back(name):
    def function(x):
        whole = TO_WHOLE[name](5 * x.abs())
        assert not isinstance(whole, Jet)
        return x.sin() * whole.to(x.dtype) + whole.type_as(x)

    check(function, (4,))


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.to(torch.float64),
        lambda x: x.to("cpu"),
        lambda x: x.to("cpu", torch.float64, non_blocking=True),
        lambda x: x.to(device="cpu", dtype=torch.float64, copy=True),
        lambda x: x.to(x),
        lambda x: x.type(torch.DoubleTensor),
        lambda x: x.double(memory_format=torch.preserve_format).cpu(),
        lambda x: torch.as_tensor(x),
        lambda x: x.to(tensor=x),
        lambda x: x.reshape(BATCH, 2, 2, 1).to(memory_format=torch.channels_last),
    ],
)
def test_floating_types_keep_them(cast):
    check(lambda x: cast(x.sin()).sin(), (4,))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cdouble().real,
        lambda x: x.to(torch.complex128).real,
        lambda x: x * 1j,
        lambda x: x + torch.ones(4, dtype=torch.complex128),
        lambda x: x + torch.fft.ifft(torch.fft.fft(x)).real,
        lambda x: x + torch.view_as_real(torch.complex(x, x))[..., 0],
        lambda x: x + (x**1j).real,
    ],
)
def test_complex_numbers_are_refused_by_name(function):
    x = torch.rand(3, 4) + 1
    with pytest.raises(TaylorError, match="complex numbers"):
        carried(function, x, x.unsqueeze(0))


def test_other_bits_are_refused_in_every_spelling():
    x = torch.ones(1, 2)
    for function in (lambda x: x.view(torch.int64), lambda x: x.view(dtype=torch.int64)):
        with pytest.raises(TaylorError, match="another dtype for the same bits"):
            carried(function, x, x.unsqueeze(0))
