"""Casts: every component follows to a floating type; integers and masks carry nothing."""

import pytest
import torch

from hosm_losses.derivatives.taylor import Jet, TaylorError, carried
from tests.derivatives.taylor.checks import BATCH, check

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
