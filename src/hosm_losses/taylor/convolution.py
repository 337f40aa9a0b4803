r"""The rule for convolutions.

PyTorch finds the gradient of a weight in a gradient by a convolution with the cotangent, as large
as the image, for a kernel. It costs up to three times the gradient of the first pass, which the
parts of a bilinear form use for both.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor._torch import autocast_type, in_autocast, traced
from hosm_losses.taylor.arguments import like_samples
from hosm_losses.taylor.bilinear import Form, plain, product
from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.jet import Jet
from hosm_losses.taylor.layers import with_bias
from hosm_losses.taylor.table import Function, every, rule_of_each

PLAIN = ("stride", "padding", "dilation", "groups")
TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")


@rule_of_each(
    *every("conv1d", "conv2d", "conv3d"),
    *every("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
def _convolution(
    function: Function, x: Any, weight: Any, bias: Any = None, *args: Any, **named: Any
) -> Jet:
    if x.ndim != weight.ndim:  # as of one sample
        raise NoRule
    bias = None if bias is None else bias.reshape(-1, *(1,) * (x.ndim - 2))

    def biased(samples: Tensor) -> Tensor:
        form = None
        if not traced() and plain(samples, weight):
            names = TRANSPOSED if "transpose" in function.__name__ else PLAIN
            options = dict(zip(names, args, strict=False)) | named
            form = _form(function, samples, weight, **options)
        if form is None:
            convolved = function(samples, weight, None, *args, **named)
        else:
            convolved = product(form, in_autocast(samples), weight)
        return with_bias(convolved, bias, x.shape[0])

    return like_samples(biased, x)


def _form(
    function: Function,
    samples: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    output_padding: Any = 0,
) -> Form | None:
    """The gradients of a convolution, None where its padding differs from side to side.

    The weight is kept in its own type, and multiplied in that of autocast, if it is on now.
    """
    sizes, transposed = weight.shape[2:], "transpose" in function.__name__
    each = partial(_for_each, len(sizes))
    stride, dilation, output_padding = map(each, (stride, dilation, output_padding))
    if padding == "same" and set(stride) == {1}:
        total = [reach * (size - 1) for reach, size in zip(dilation, sizes, strict=True)]
        if any(both % 2 for both in total):
            return None
        padding = [both // 2 for both in total]
    padding = 0 if padding == "valid" else padding
    if isinstance(padding, str):
        return None  # about which PyTorch has something to say
    padding = each(padding)
    options = stride, padding, dilation, transposed, output_padding, groups
    backward = torch.ops.aten.convolution_backward
    shapes, dtype = (samples.shape, weight.shape), weight.dtype
    cast = autocast_type(weight)

    def of_samples(weight: Tensor, cotangent: Tensor) -> Tensor:
        # Of what is expanded only the shape is used.
        samples, weight = cotangent.new_empty(1).expand(shapes[0]), weight.to(cast)
        return backward(cotangent, samples, weight, None, *options, (True, False, False))[0]

    def of_weight(samples: Tensor, cotangent: Tensor) -> Tensor:
        weight = cotangent.new_empty(1).expand(shapes[1])
        found = backward(cotangent, samples, weight, None, *options, (False, True, False))[1]
        return found.to(dtype)

    named = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    named |= {"output_padding": output_padding} if transposed else {}
    return Form(of_samples, of_weight, lambda a, b: function(a, b.to(cast), **named))


def _for_each(count: int, option: Any) -> list[int]:
    """An option as a number for each axis."""
    numbers = list(option) if isinstance(option, Sequence) else [option]
    return numbers * count if len(numbers) == 1 else numbers
