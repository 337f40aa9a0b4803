"""What is chosen once for a loss."""

__all__ = ["ESTIMATORS", "LossOptions", "Probes", "Weights"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from torch import Tensor

from hosm_losses._checks import check_choice, describe
from hosm_losses.derivatives import ENGINES
from hosm_losses.probes import DISTRIBUTIONS
from hosm_losses.weighting import Weighting, check_weighting

REDUCTIONS = ("mean", "sum", "none")
ESTIMATORS = ("exact", "laplacian", "sliced")
Probes = int | Literal["exact"]
Weights = Sequence[float | Tensor]


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is chosen once for a loss, checked on construction; `third_order_dsm` explains each.

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
        if self.order not in (1, 2, 3):
            raise ValueError(f"order: expected 1, 2 or 3; got {describe(self.order)}.")
        if self.probes != "exact" and not (_is_whole(self.probes) and self.probes >= 1):
            raise ValueError(
                f"probes: expected a number above 0, or 'exact'; got {describe(self.probes)}."
            )
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
        if not (_is_whole(self.chunks) and self.chunks >= 1):
            raise ValueError(f"chunks: expected a number above 0; got {describe(self.chunks)}.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1]; got {self.fraction!r}.")
        if self.fraction < 1 and self.reduction == "none":
            raise ValueError(
                "fraction: expected 1 with reduction='none', as rows outside the fraction have no "
                f"higher terms; got {self.fraction!r}. Use reduction='mean' or 'sum'."
            )


def _is_whole(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)
