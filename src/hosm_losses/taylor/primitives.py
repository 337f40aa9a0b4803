r"""The few operators whose higher derivatives PyTorch gets wrong, written so that all are right.

What:
    PyTorch 2.6 to 2.13 do not differentiate layer norm, batch norm (in training) and instance norm
    rightly more than twice: the parameter gradient of a loss on a directional derivative, at order
    three sometimes the derivative's own value, is off by several to more than a hundred percent,
    in silence. Later versions may raise there, as the pull requests below do. Group norm,
    attention and the gated linear unit fail loudly on common inputs. Composed of means, products
    and softmax, each is right by every route. `primitive_mode` puts them in.

Source:
    PyTorch issues 175754, 186256, 196699 and 196700; pull requests 176234 and 186779.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor._torch import operators
from hosm_losses.taylor.errors import DerivativeError
from hosm_losses.taylor.registry import OF_ONE, PRIMITIVES, functions_named


def _add_in_place(counter: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """Batch norm's count of batches: torch.func forbids the in-place method, not out=."""
    if counter.is_floating_point():
        return counter.add_(other, alpha=alpha)
    return torch.add(counter, other, alpha=alpha, out=counter)


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:  # noqa: A002
    """As a slice of one: the gradient of PyTorch's own through a vmap is wrong."""
    place = range(input.shape[dim])[index]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, place, place + 1)


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:  # noqa: A002
    """By a mask: PyTorch's own through a vmap is wrong where the value alone differs."""
    mask = torch.zeros_like(input, dtype=torch.bool).index_fill(dim, index, True)
    return torch.where(mask, value, input).to(input.dtype)


def _refuse(told: str, *_: Any, **__: Any) -> Tensor:
    raise DerivativeError(told)


NORMS = (
    "network: expected F.layer_norm, F.group_norm, F.batch_norm or F.instance_norm; got one of "
    "the functions below them, such as torch.native_layer_norm, which PyTorch 2.6 to 2.13 "
    "differentiate wrongly."
)
NOT_A_NUMBER = (
    "network: expected no logcumsumexp, whose second derivative is NaN. Write torch.logsumexp."
)
_OTHERS: dict[Any, Any] = {
    Tensor.add_: _add_in_place,
    "logcumsumexp": partial(_refuse, NOT_A_NUMBER),
    Tensor.index_fill_: lambda x, *given, **named: x.copy_(_index_fill(x, *given, **named)),
    "select_scatter": _select_scatter,
    "index_fill": _index_fill,
    "native_layer_norm native_group_norm native_batch_norm": partial(_refuse, NORMS),
    torch.batch_norm: partial(_refuse, NORMS),
    torch.instance_norm: partial(_refuse, NORMS),
}
for _names, _other in _OTHERS.items():
    for _function in functions_named(_names):
        PRIMITIVES[_function] = _other
# As programs of torch.export call them, with the arguments of the functions of torch.
for _function, _primitive in list(PRIMITIVES.items()):
    if not _function.__name__.endswith("_"):
        PRIMITIVES.update(dict.fromkeys(operators(_function.__name__), _primitive))
PRIMITIVES.update(dict.fromkeys(operators("_native_batch_norm_legit"), partial(_refuse, NORMS)))


# What PyTorch gets wrong once already: of one sample, in channels_last on the CPU.
_INSTANCE_NORMS = *functions_named("instance_norm"), *operators("instance_norm")
OF_ONE.update({each: PRIMITIVES[each] for each in _INSTANCE_NORMS})
