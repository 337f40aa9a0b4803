r"""Rules for softplus and mish, and for what is held between two numbers.

Formula, with s = 1/(1 + e⁻ˣ) and c = 1 − s:
    softplus   log(1 + eᵝˣ)/β, whose first derivative is s(βx)
    mish       x T, where T = tanh(log(1 + eˣ)) = s (1 + c)/(1 + c²)
               T' = s U, where U = 1 − T² = (2c/(1 + c²))²

Neither T nor U is a difference of numbers that are nearly equal.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.pointwise import Operators, pointwise, straight
from hosm_losses.taylor.table import every


def _slope_of_softplus(along: Tensor, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    # Either may be a tensor of one number.
    return torch.ops.aten.softplus_backward.default(along, x, float(beta), float(threshold))


@pointwise(*every("softplus"), operators=Operators(F.softplus, _slope_of_softplus))
def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Iterator[Tensor]:
    scaled = beta * x
    s = torch.sigmoid(scaled)
    straight_on = scaled > threshold  # where PyTorch takes x itself
    yield s.masked_fill(straight_on, 1.0)
    q = (beta * s * torch.sigmoid(-scaled)).masked_fill(straight_on, 0.0)
    yield q
    yield beta * q * (1 - 2 * s)


@pointwise(*every("mish"))
def _mish(x: Tensor) -> Iterator[Tensor]:
    s, c = torch.sigmoid(x), torch.sigmoid(-x)
    below = 1 + c * c
    share = s * (1 + c) / below  # T
    yield x * share
    u = (2 * c / below).square()
    t1 = s * u
    yield torch.addcmul(share, x, t1)
    bent = torch.addcmul(c, share, s, value=-2)
    t2 = t1 * bent
    yield torch.addcmul(2 * t1, x, t2)
    t3 = t2 * bent - t1 * s * (c * (1 + 2 * share) + 2 * u * s)
    yield torch.addcmul(3 * t2, x, t3)


@pointwise(*every("clamp", "clip"))
def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Iterator[Tensor]:  # noqa: A002
    inside = torch.ones_like(x, dtype=torch.bool)
    for bound, holds in ((min, torch.ge), (max, torch.le)):
        if isinstance(bound, Tensor):
            raise NoRule
        if bound is not None:
            inside = inside & holds(x, bound)
    return straight(torch.clamp(x, min, max), inside.to(x.dtype))


@pointwise(*every("clamp_min"))
def _clamp_min(x: Tensor, min: Any) -> Iterator[Tensor]:  # noqa: A002
    return _clamp(x, min)


@pointwise(*every("clamp_max"))
def _clamp_max(x: Tensor, max: Any) -> Iterator[Tensor]:  # noqa: A002
    return _clamp(x, None, max)
