"""Tools around a loss, and properties: the engine is not given up for them, nor is it misled."""

import logging

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hosm_losses as hosm
from hosm_losses.derivatives.taylor import TaylorError, carried

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
    for one, two, reference in zip(got, chosen, expected, strict=True):
        torch.testing.assert_close(one, reference, rtol=0, atol=0)
        torch.testing.assert_close(two, reference, rtol=0, atol=0)


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

    with pytest.raises(TaylorError, match="a hook changes in place"):
        carried(changed, x, torch.ones(1, 2, 3)).sum().backward()
    without = carried(changed, x.detach(), torch.ones(1, 2, 3))
    assert not without.requires_grad


@pytest.mark.parametrize(
    "function",
    [
        lambda x: setattr(x, "data", x.detach()),
        lambda x: x.as_strided((2, 2), (1, 1)),
        lambda x: x.__ifloordiv__(2),
        lambda x: x.__imod__(2),
    ],
)
def test_what_reaches_for_the_memory_of_x_is_refused(function):
    x = torch.rand(2, 3)
    with pytest.raises(TaylorError, match=r"in place|where the elements"):
        carried(lambda x: (function(x * 1), x)[1], x, x.unsqueeze(0))
