"""The precision in which a network works, and what has to hold of its values."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.oracles import MLP

ENGINES = ("auto", "taylor", "reverse", "forward")
VP = hosm.VPSchedule()
FLOAT32, FLOAT64 = torch.float32, torch.float64


class Casts(nn.Module):
    """It works in another dtype than that of x, in all or in a torso beside a skip connection."""

    def __init__(self, dtype, middle=None, skip=False):
        super().__init__()
        self.dtype, self.skip = dtype, skip
        self.inner = nn.Linear(3, 8, dtype=dtype)
        self.middle = nn.Tanh() if middle is None else middle
        self.outer = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x, t):
        hidden = self.inner(x.to(self.dtype)) + t.to(self.dtype)[:, None]
        out = self.outer(self.middle(hidden)).to(x.dtype)
        return torch.sin(x) + out if self.skip else out


class Partly(nn.Module):
    def forward(self, x):
        return x.sin() * (x + x.detach())


class OwnCast(nn.Module):
    """float32 parameters, cast to the dtype of x where they are used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=FLOAT32))

    def forward(self, x, t):
        return torch.tanh(x @ self.weight.to(x.dtype)) * t[:, None]


def check(network, order=3, dtype=FLOAT64, **options):
    x0 = torch.randn(2, 3, dtype=dtype)
    hosm.check_derivatives(hosm.ScoreModel(network, VP), x0, order, **options)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["all", "torso", "parameters"])
def test_a_network_that_casts_to_float32_is_no_alarm(kind, engine, order):
    network = OwnCast() if kind == "parameters" else Casts(FLOAT32, skip=kind == "torso")
    check(network, order, derivative=engine)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("skip", [False, True])
def test_and_what_is_wrong_in_it_is_found(skip, order):
    network = Casts(FLOAT32, Partly(), skip)
    with pytest.raises(hosm.DerivativeError, match=r"off by.*the module 'middle' \(Partly\)"):
        check(network, order)


def test_a_table_in_float32_does_not_lower_the_precision():
    """A derivative that is wrong by less than 1 % is still found in float64."""

    class Slightly(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.layer, self.wrong = nn.Linear(3, 3), wrong
            self.register_buffer("table", torch.linspace(0, 1, 4, dtype=FLOAT32))

        def forward(self, x, t):
            features = (t.float()[:, None] * self.table).sin().sum(1)
            hidden = self.layer(x) + features.to(x.dtype)[:, None]
            return torch.sin(hidden) + self.wrong * hidden * hidden.detach()

    check(Slightly(0.0))
    with pytest.raises(hosm.DerivativeError, match="off by 0"):
        check(Slightly(1e-3))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_half_precision_inside_is_refused(dtype, half):
    message = rf"got {half}, in the module 'inner' \(Linear\)\. Check a float32 copy"
    with pytest.raises(TypeError, match=message):
        check(Casts(half, skip=True), dtype=dtype)


def test_so_is_autocast_in_a_forward():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=FLOAT32)

        def forward(self, x, t):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x).float()

    with pytest.raises(TypeError, match=r"got torch\.bfloat16, in the module 'layer'"):
        check(Autocast(), dtype=FLOAT32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_with_their_module(value):
    network = Casts(FLOAT64)
    with torch.no_grad():
        network.inner.bias[0] = value
    network.middle = nn.Identity()
    message = r"network: expected finite values; got 6 NaN or infinite of 6, first in the module "
    with pytest.raises(hosm.DerivativeError, match=message + "'inner'"):
        check(network)


@pytest.mark.parametrize(("parameters", "data"), [(FLOAT32, FLOAT64), (FLOAT64, FLOAT32)])
def test_a_dtype_with_which_the_call_fails_is_explained(parameters, data):
    message = rf"network: its call failed .*The data are {data} and its parameters {parameters}"
    with pytest.raises(TypeError, match=message):
        check(MLP(3).to(parameters), dtype=data)


def test_the_networks_own_error_comes_through():
    class Own(MLP):
        def forward(self, x, t):
            raise RuntimeError("the network's own words")

    with pytest.raises(RuntimeError, match=r"^the network's own words$"):
        check(Own(3).double())
