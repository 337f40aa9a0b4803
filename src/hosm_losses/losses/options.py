"""What is chosen once for a loss."""

__all__ = ["ESTIMATORS", "LossOptions", "Probes", "Weights", "check_weights"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hosm_losses._checks import (
    check_choice,
    check_finite,
    check_number,
    check_whole,
    describe,
    may_look,
)
from hosm_losses.derivatives import ENGINES
from hosm_losses.losses.weighting import Weighting, check_weighting
from hosm_losses.probes import DISTRIBUTIONS

REDUCTIONS = ("mean", "sum", "none")
ESTIMATORS = ("exact", "laplacian", "sliced")
Probes = int | Literal["exact"]
Weights = Sequence[float | Tensor]
COUNTS = {1: (1,), 2: (3, 4), 3: (4,)}  # of weights, by order


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is chosen once for a loss, checked on construction; `third_order_dsm` explains each.

    Numbers of NumPy become those of Python.

    Raises:
        ValueError: for an unknown name or a number out of range.
    """

    order: int
    probes: Probes = 1
    distribution: str = "rademacher"
    weighting: Weighting = "noise"
    derivative: str = "auto"
    third: str = "exact"
    fraction: float = 1.0
    chunks: int = 1
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Check every option."""
        order = check_whole("order", self.order, 1)
        if order not in COUNTS:
            raise ValueError(f"order: expected 1, 2 or 3; got {order}.")
        self._keep("order", order)
        if not (isinstance(self.probes, str) and self.probes == "exact"):
            self._keep("probes", check_whole("probes (or 'exact')", self.probes, 1))
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        check_weighting(self.weighting)
        check_choice("derivative", self.derivative, ENGINES)
        check_choice("third", self.third, ESTIMATORS)
        if self.third != "exact" and self.derivative == "reverse":
            raise ValueError(
                "derivative: expected 'auto', 'taylor' or 'forward', which can take a second "
                f"derivative forward, with third={self.third!r}; got 'reverse'."
            )
        check_choice("reduction", self.reduction, REDUCTIONS)
        self._keep("chunks", check_whole("chunks", self.chunks, 1))
        part = "a number in (0, 1]"
        self._keep("fraction", check_number("fraction", self.fraction, part, above=0, at_most=1))
        if self.fraction < 1 and self.reduction == "none":
            raise ValueError(
                "fraction: expected 1 with reduction='none', as rows outside the fraction have no "
                f"higher terms; got {self.fraction!r}. Use reduction='mean' or 'sum'."
            )

    def _keep(self, name: str, value: object) -> None:
        # torch.compile need not see what changes nothing.
        if value is not getattr(self, name):
            object.__setattr__(self, name, value)


def check_weights(weights: object, order: int) -> Weights:
    """The weights of the terms as numbers and tensors without dimensions; all 1 for None.

    Args:
        weights: a list, a tuple, an array or a tensor of numbers, or a list with tensors of one
            element.
        order: 1, 2 or 3.

    Returns:
        (first, second, trace, third), as many as there are terms; at order 2 a fourth may follow.

    Raises:
        TypeError: for anything else, and for a tensor that is not of real numbers.
        ValueError: for another count, for one that is negative, NaN or infinite (in a tensor: on
            the CPU), and for all of them zero.
    """
    if weights is None:
        return (1.0,) * COUNTS[order][0]
    expected = (
        "weights: expected four numbers (first, second, trace, third), at order 2 three or four"
    )
    entries: Sequence[object] | None = None
    if isinstance(weights, np.ndarray | Tensor):
        entries = tuple(weights) if weights.ndim else None
    elif isinstance(weights, Sequence) and not isinstance(weights, str | bytes):
        entries = weights
    if entries is None:
        raise TypeError(f"{expected}; got {describe(weights)}.")
    if len(entries) not in COUNTS[order]:
        raise ValueError(f"{expected}; got {len(entries)} at order {order}.")
    given = tuple(_weight(weight) for weight in entries)
    if not any(isinstance(weight, Tensor) or weight != 0 for weight in given[: order + 1]):
        raise ValueError(f"weights: expected one at least that is not 0; got {weights!r}.")
    return given


def _weight(weight: object) -> float | Tensor:
    if not isinstance(weight, Tensor):
        number = check_number("weights", weight, "finite numbers of at least 0")
        if number < 0:
            raise ValueError(f"weights: expected numbers of at least 0; got {number}.")
        return number
    if weight.numel() != 1:
        raise ValueError(f"weights: expected numbers; got {describe(weight)}.")
    if weight.is_complex() or weight.dtype == torch.bool:
        raise TypeError(f"weights: expected real numbers; got {describe(weight)}.")
    check_finite("weights", weight)
    if may_look(weight) and bool((weight < 0).any()):
        raise ValueError(f"weights: expected numbers of at least 0; got {float(weight)}.")
    return weight.reshape(())
