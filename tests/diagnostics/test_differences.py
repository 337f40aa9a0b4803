"""Networks without second derivatives are findings at order three."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from tests.diagnostics.test_check import Around, check

ENGINES = ("auto", "taylor", "reverse")
JUMPS = "a first derivative that jumps"


class Applied(nn.Module):
    """A layer with a function in its own forward."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


class Plain(nn.Module):
    """Two layers and an activation between."""

    def __init__(self, activation, time=None):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)
        self.activation = activation
        self.time = nn.Sequential(nn.Linear(1, 8), nn.Identity() if time is None else time)

    def forward(self, x, t):
        return self.outer(self.activation(self.inner(x) + self.time(t[:, None])))


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (nn.ReLU(), torch.float32),
        (nn.ReLU(), torch.float64),
        (nn.LeakyReLU(), torch.float32),
        (nn.Hardtanh(), torch.float64),
    ],
)
def test_a_network_without_second_derivatives_is_a_finding(activation, dtype):
    message = rf"{JUMPS}, in the module 'activation' \({type(activation).__name__}\).*nn\.SiLU"
    with pytest.raises(hosm.DerivativeError, match=message):
        check(Plain(activation), dtype=dtype)
    check(Plain(activation), dtype=dtype, order=2)


@pytest.mark.parametrize("engine", ENGINES)
def test_derivatives_that_are_not_finite_are_told_from_wrong_ones(engine):
    """Of a branch that torch.where does not take."""
    network = Plain(Applied(lambda h: torch.where(h < 9, h.sin(), h.sqrt())))
    network.activation.layer = nn.Identity()
    with pytest.raises(
        hosm.DerivativeError, match=r"that is not finite, in the module .*torch\.where\("
    ):
        check(network, derivative=engine, dtype=torch.float64, order=2)


LARGE = {
    "data": (lambda x, t: x + (x / 1e4).sin() * t[:, None], 1e4),
    "values": (lambda x, t: x.sin() + 1e5 * t[:, None], 1.0),
}


@pytest.mark.parametrize("what", LARGE)
def test_next_to_what_is_large_a_right_network_is_not_accused(what):
    """The float32 derivatives are right, and the differences they are held against are not."""
    network, size = LARGE[what]
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x = size * torch.randn(2, 4, dtype=torch.float32)
    hosm.check_derivatives(model, x)
    hosm.check_derivatives(model, x.double())


def test_derivatives_that_float32_alone_has_wrong_are_told_from_other_faults():
    def network(x, t):
        return x.sin() if x.dtype == torch.float64 else 0.9 * x.sin() + 0.1 * x.detach().sin()

    model = hosm.ScoreModel(network, hosm.VPSchedule())
    with pytest.raises(hosm.DerivativeError, match=r"A float64 copy has no such fault"):
        hosm.check_derivatives(model, torch.randn(2, 4, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("activation", "order"), [(nn.ReLU(), 2), (nn.ELU(), 3)])
def test_many_kinks_are_none_for_the_order_that_may_have_them(activation, order, dtype):
    """With as many units as a small image has, some kink is between the points of every step."""

    def convolution(before, after):
        return nn.Conv2d(before, after, 3, padding=1)

    layers = (convolution(3, 16), activation, convolution(16, 16), activation, convolution(16, 3))
    network = nn.Sequential(*layers).to(dtype)
    model = hosm.ScoreModel(network, hosm.VPSchedule(), call=lambda network, x, t: network(x))
    hosm.check_derivatives(model, torch.randn(2, 3, 8, 8, dtype=dtype), order)
    layers[-1].register_forward_hook(lambda module, args, out: out + 0.1 * out.detach().sin())
    with pytest.raises(hosm.DerivativeError, match=r"agree with differences; got .* off by"):
        hosm.check_derivatives(model, torch.randn(2, 3, 8, 8, dtype=dtype), order)


def test_a_fault_next_to_what_is_large_is_not_called_rounding():
    model = hosm.ScoreModel(lambda x, t: x * x.detach(), hosm.VPSchedule())
    with pytest.raises(hosm.DerivativeError, match=r"without \.detach\(\)"):
        hosm.check_derivatives(model, 1e4 * torch.randn(2, 4, dtype=torch.float32), order=2)


def test_nor_is_what_float32_has_no_derivative_of():
    """As of a kernel of PyTorch's that float64 does not use."""

    def network(x, t):
        return x.sin() if x.dtype == torch.float64 else torch.cdist(x, x) @ x

    model = hosm.ScoreModel(network, hosm.VPSchedule())
    with pytest.raises(hosm.DerivativeError, match=r"no derivative at all.*without \.detach\(\)"):
        hosm.check_derivatives(model, torch.randn(1, 4, dtype=torch.float32), order=2)


@pytest.mark.parametrize("engine", ENGINES)
def test_with_every_engine(engine):
    with pytest.raises(hosm.DerivativeError, match=JUMPS):
        check(Plain(nn.ReLU()), derivative=engine)


@pytest.mark.parametrize(
    "function",
    [F.relu, torch.abs, lambda x: torch.maximum(x, x.flip(1)), lambda x: x.clamp(-0.5, 0.5)],
)
def test_one_kink_among_smooth_layers_is_named(function):
    message = rf"{JUMPS}, in the module 'blocks\.1' \(Applied\)"
    with pytest.raises(hosm.DerivativeError, match=message):
        check(Around(Applied(function)), dtype=torch.float64)


def test_max_pooling_is_named():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pool = nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2)
            self.last = nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x, t):
            pooled = self.pool(torch.tanh(self.first(x) + t[:, None, None, None]))
            return self.last(F.interpolate(pooled, scale_factor=2))

    with pytest.raises(hosm.DerivativeError, match=rf"{JUMPS}.*'pool' \(MaxPool2d\)"):
        check(Pooled(), (2, 4, 4), torch.float64)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_network_is_none(dtype, engine):
    check(Plain(nn.Identity()), dtype=dtype, derivative=engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "activation", [nn.SiLU(), nn.GELU(), nn.Softplus(), nn.Tanh(), nn.ELU(), nn.Mish()]
)
def test_neither_is_a_smooth_one_nor_kinks_in_time(activation, dtype):
    check(Plain(activation, time=nn.ReLU()), dtype=dtype)


@pytest.mark.parametrize("frequency", [10, 40])
def test_a_smooth_network_that_the_first_rule_cannot_follow_is_none(frequency):
    check(Around(Applied(lambda x: (frequency * x).sin())), dtype=torch.float64)


def test_a_norm_that_is_nearly_a_step_is_none():
    """A group of two elements, normalized, is the smoothed sign of their difference."""
    check(Around(nn.GroupNorm(2, 4)), dtype=torch.float64)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_values_that_jump_are_a_finding_at_either_order(engine, order):
    message = r"values that jump, in the module 'blocks\.1' \(Applied\)"
    network = Around(Applied(lambda x: torch.tanh(x) + (8 * x).round()))
    with pytest.raises(hosm.DerivativeError, match=message):
        check(network, dtype=torch.float64, order=order, derivative=engine)
