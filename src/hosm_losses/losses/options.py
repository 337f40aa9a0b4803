"""Validation of the options and weights that are documented in `third_order_dsm`."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from hosm_losses._checks import (
    can_read_values,
    check_choice,
    check_finite,
    check_flag,
    check_number,
    check_whole,
    error_message,
)
from hosm_losses.derivatives import ENGINES, Engine
from hosm_losses.losses.weighting import Weighting, check_weighting
from hosm_losses.probes import Hutchinson, Paired

Reduction = Literal["mean", "sum", "none"]
Probes = int | Literal["exact"] | Hutchinson | Paired
"""The number of probes per sample; the type also determines how estimates are combined."""
Weights = Sequence[float | Tensor] | np.ndarray | Tensor
TermWeights = Weights | Literal["paper", "paper-toy"]
"""Weights of the terms (first, second, trace, third), or the name of a set of weights."""
ORDERS = {"first": 1, "second": 2, "trace": 2, "third": 3}  # of each term, in the order of weights
NamedWeights = dict[str, float | Tensor]  # by term


@dataclass(frozen=True)
class LossOptions:
    """Validated options of a loss, with NumPy numbers converted to Python numbers."""

    order: int
    probes: Any = 1  # Hutchinson, Paired or "exact"
    engine: Engine = "auto"
    fraction: float = 1.0
    weighting: Weighting = "noise"
    antithetic: bool = False
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        order = check_whole("order", self.order, 1)
        if order not in ORDERS.values():
            raise ValueError(error_message("order", "1, 2 or 3", order))
        part = check_number("fraction", self.fraction, "a number in (0, 1]", above=0, at_most=1)
        probes = _check_probes(self.probes)
        for name, value in (("order", order), ("fraction", part), ("probes", probes)):
            if value is not getattr(self, name):  # torch.compile would trace a no-op write
                object.__setattr__(self, name, value)
        check_weighting(self.weighting)
        check_flag("antithetic", self.antithetic)
        check_choice("engine", self.engine, ENGINES)
        check_choice("reduction", self.reduction, get_args(Reduction))
        if part < 1 and self.reduction == "none":
            raise ValueError(
                "fraction: expected 1 with reduction='none': rows outside the fraction have no "
                f"higher-order terms; got {part!r}."
            )

    @property
    def is_uniform(self) -> bool:
        """Whether the objective weights all values of log σ̂ equally.

        Otherwise, it weights them by the schedule's density of t.
        """
        return self.weighting == "likelihood"


def _check_probes(probes: object) -> Any:
    if isinstance(probes, Integral) and not isinstance(probes, bool) and int(probes) >= 1:
        return Hutchinson(int(probes))
    if isinstance(probes, Hutchinson | Paired) or (isinstance(probes, str) and probes == "exact"):
        return probes
    expected = "a whole number of at least 1, 'exact', Hutchinson() or Paired()"
    right = isinstance(probes, str | Integral) and not isinstance(probes, bool)
    raise (ValueError if right else TypeError)(
        error_message("probes", expected, probes, got=repr(probes))
    )


def check_weights(weights: object, order: int, elements: int = 1) -> NamedWeights:
    """Return the weights of the terms, by name, as numbers and 0-dim tensors.

    The number of weights must equal the number of terms, except that a fourth weight is accepted
    and ignored at order 2. The weight of at least one term must be a tensor or a nonzero number.
    The values of tensors are checked only if they are on the CPU. `elements` is d, from which the
    third-order weight is computed if `weights` is None or "paper-toy".
    """
    toy = 0.1 * elements**2
    if weights is None:
        # Each term is already divided by its power of d, so a weight of 0.1 d² is too large once
        # it exceeds 1, the weight for images.
        return {"first": 1.0, "second": 0.5, "trace": 0.0, "third": min(1.0, toy)}
    if isinstance(weights, str) and weights == "paper":
        return dict.fromkeys(ORDERS, 1.0)
    if isinstance(weights, str) and weights == "paper-toy":
        return {"first": 1.0, "second": 0.5, "trace": 0.0, "third": toy}
    expected = (
        "four numbers (first, second, trace, third), or three or four at order 2, or 'paper' or "
        "'paper-toy'"
    )
    is_scalar = isinstance(weights, str | bytes) or getattr(weights, "ndim", 1) == 0
    if is_scalar or not isinstance(weights, Sequence | np.ndarray | Tensor):
        kind = ValueError if isinstance(weights, str) else TypeError
        raise kind(error_message("weights", expected, weights))
    own = [term for term, of_term in ORDERS.items() if of_term <= order]
    if len(weights) not in (len(own), len(ORDERS)):
        got = f"{len(weights)} at order {order}"
        raise ValueError(error_message("weights", expected, weights, got=got))
    checked = {
        term: check_weight("weights", weight)
        for term, weight in zip(ORDERS, weights, strict=False)
    }
    if not any(is_used(checked[term]) for term in own):
        raise ValueError(f"weights: expected at least one that is not 0; got {weights!r}.")
    return checked


def needed_order(order: int, weights: NamedWeights) -> int:
    """Return the lowest order that includes every term whose weight is a tensor or not 0."""
    used = [ORDERS[term] for term, weight in weights.items() if is_used(weight)]
    return max([1, *(of_term for of_term in used if of_term <= order)])


def is_used(weight: float | Tensor) -> bool:
    """Return whether the weight is a tensor or a nonzero number, so that its term is needed."""
    return isinstance(weight, Tensor) or weight != 0


def check_weight(name: str, weight: object) -> float | Tensor:
    """Return a weight as a nonnegative number, or as a 0-dim tensor."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(error_message(name, "numbers", weight))
        check_finite(name, weight)
        number = weight.reshape(())
    else:
        number = check_number(name, weight, "finite numbers of at least 0")
    if (not isinstance(number, Tensor) or can_read_values(number)) and number < 0:
        raise ValueError(error_message(name, "numbers of at least 0", weight, got=f"{number:g}"))
    return number
