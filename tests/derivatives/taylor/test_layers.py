"""Layers of weights: with and without a bias, of every dimension, one call on the whole stack."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hosm_losses.derivatives.taylor import carried, layers
from hosm_losses.derivatives.taylor.jet import call
from tests.derivatives.taylor.checks import check

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (2, 4)),
    "linear of tokens": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 5, 4)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 4)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1),
        (2, 3, 3),
    ),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_between_curved_functions(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    check(lambda x: layer(x.sin()).sin(), shape, *layer.parameters())


def test_a_weight_that_depends_on_x():
    check(lambda x: F.linear(x.sin(), x.cos()).sin(), (4,))
    kernel = torch.randn(1, 1, 3, requires_grad=True)
    check(lambda x: F.conv1d(x.sin(), kernel * x.mean()).sin(), (1, 5), kernel)


def test_an_unbatched_convolution():
    layer = nn.Conv1d(3, 2, 3, padding=1)
    check(lambda x: layer(x.sin()).sin(), (4,), *layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_every_component_as_it_rounds_the_value(dtype):
    layer, x = nn.Linear(8, 8).float(), torch.randn(2, 3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = carried(lambda x: layer(x), x[0], x[1:])
        assert found.dtype == dtype
        torch.testing.assert_close(found[0], layer(x[0]), rtol=1e-2, atol=1e-2)
    found.float().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 3.0, dtype=torch.float32))


def test_one_call_on_the_whole_stack(monkeypatch):
    seen = []
    convolve = torch.conv2d

    def counted(x, *args, **kwargs):
        seen.append(len(x))
        return convolve(x, *args, **kwargs)

    layers._convolution(counted, 2)
    weight, x = torch.randn(2, 1, 3, 3), torch.randn(3, 1, 5, 5)
    carried(lambda x: call(counted, (x, weight), {}), x, torch.randn(2, *x.shape))
    assert seen == [9]
