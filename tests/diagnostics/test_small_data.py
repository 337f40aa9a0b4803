"""Data that are small against what a network is curved over: their differences are rounding."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.diagnostics.test_check import Around, Custom, Detached, DropsGraph, DropsPart

VP = hosm.VPSchedule()
SIZES = [1e-1, 1e-2, 3e-3, 1e-3, 1e-5]


class Plain(nn.Module):
    """An MLP of x and t."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))


def check(make, size, width, seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = hosm.ScoreModel(make().to(dtype), VP)
    hosm.check_derivatives(model, size * torch.randn(2, width, dtype=dtype), **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", SIZES)
def test_a_smooth_network_is_no_alarm(size, seed):
    check(Plain, size, 6, seed)


@pytest.mark.parametrize("size", [1e-5, 1e-8])
def test_nor_is_it_in_float64(size):
    check(Plain, size, 6, dtype=torch.float64)


def test_nor_is_a_function_that_has_no_parameters():
    model = hosm.ScoreModel(lambda x, t: (x + 1).sin() * t[:, None], VP)
    hosm.check_derivatives(model, 1e-4 * torch.randn(2, 3, dtype=torch.float32))


FAULTS = {
    "a detach": (Detached, "auto"),
    "a lost graph": (lambda: Custom(DropsGraph), "reverse"),
    "a part of a graph lost": (lambda: Custom(DropsPart), "reverse"),
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_found_as_elsewhere(fault, size, order):
    layer, engine = FAULTS[fault]
    with pytest.raises(hosm.DerivativeError, match=r"the module 'blocks\.1'"):
        check(lambda: Around(layer()), size, 4, order=order, derivative=engine)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_small_fault_is_found_in_float64(size):
    class Slightly(nn.Module):
        def forward(self, x):
            return x.sin() + 1e-3 * x * x.detach()

    with pytest.raises(hosm.DerivativeError, match=r"off by 0.*\(Slightly\)"):
        check(lambda: Around(Slightly()), size, 4, dtype=torch.float64)
