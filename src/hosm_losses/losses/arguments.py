"""The arguments of a loss, checked: options, chosen once, and what a call is given.

`third_order_dsm` says what each does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from hosm_losses._checks import (
    check_choice,
    check_finite,
    check_number,
    check_whole,
    complaint,
    may_look,
)
from hosm_losses.derivatives import ENGINES, Engine
from hosm_losses.losses.targets import Targets
from hosm_losses.losses.weighting import TimeSampler, Weighting, check_weighting
from hosm_losses.probes import Hutchinson, Paired

Reduction = Literal["mean", "sum", "none"]
Third = Literal["exact", "laplacian"]
Probes = int | Literal["exact"] | Hutchinson | Paired
Weights = Sequence[float | Tensor] | np.ndarray | Tensor
Recipe = Literal["paper", "paper-toy"]
ModuleRecipe = Recipe | Literal["balanced"]
STEIN = ("likelihood", None)  # the weighting and the sampler of `stein_dsm`
COUNTS = {1: (1,), 2: (3, 4), 3: (4,)}  # of weights, by order


@dataclass(frozen=True)
class Options:
    """What is chosen once for a loss, checked; numbers of NumPy become Python's."""

    order: int
    probes: Any = 1  # Hutchinson, Paired or "exact"
    engine: Engine = "auto"
    third: Third = "exact"
    fraction: float = 1.0
    weighting: Weighting = "noise"
    time_sampler: TimeSampler = None
    reduction: Reduction = "mean"
    stein: bool = False  # whether the terms are those of `stein_dsm`

    def __post_init__(self) -> None:
        """Check every option."""
        order = check_whole("order", self.order, 1)
        if order not in COUNTS:
            raise ValueError(f"order: expected 1, 2 or 3; got {order}.")
        part = check_number("fraction", self.fraction, "a number in (0, 1]", above=0, at_most=1)
        probes = _check_probes(self.probes, stein=self.stein)
        for name, value in (("order", order), ("fraction", part), ("probes", probes)):
            if value is not getattr(self, name):  # torch.compile need not see what changes nothing
                object.__setattr__(self, name, value)
        check_weighting(self.weighting, self.time_sampler)
        check_choice("engine", self.engine, ENGINES)
        check_choice("third", self.third, get_args(Third))
        if self.third != "exact" and self.engine == "reverse":
            raise ValueError(
                "engine: expected 'auto' or 'taylor', which can carry a second derivative, with "
                f"third={self.third!r}; got 'reverse'."
            )
        check_choice("reduction", self.reduction, get_args(Reduction))
        if part < 1 and self.reduction == "none":
            raise ValueError(
                "fraction: expected 1 with reduction='none', as rows outside the fraction have no "
                f"higher terms; got {part!r}."
            )

    @property
    def exact(self) -> bool:
        """Whether the probes are all unit vectors, over which is summed."""
        return isinstance(self.probes, str)

    @property
    def fewest(self) -> int:
        """The fewest probes."""
        return 2 if self.stein or isinstance(self.probes, Paired) else 1

    def for_weights(self, weights: Weights) -> "Options":
        """The options of the lowest order that has every term whose weight counts."""
        order = self.order
        if order == 3 and not counts(weights[3]):
            order = 2
        if order == 2 and not (self.stein or counts(weights[1]) or counts(weights[2])):
            order = 1
        if order == self.order:
            return self
        chosen = self.probes, self.engine, self.third, self.fraction
        return Options(order, *chosen, self.weighting, self.time_sampler, self.reduction)

    @property
    def derivatives(self) -> dict[str, Any]:
        """What `NoiseField.derive` is told; the Laplacian form is one of order three alone."""
        laplacian = self.order == 3 and self.third == "laplacian"
        return {"order": self.order, "engine": self.engine, "laplacian": laplacian}


class Given(NamedTuple):
    """What a loss is given with the data."""

    t: Tensor | None
    noise: Tensor | None
    probe: Tensor | None
    targets: Targets
    weights: Any
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None


def _check_probes(probes: object, *, stein: bool) -> Any:
    """The probes as a value; of `stein_dsm`, which pairs what it draws, two or more."""
    fewest, kinds = (2, "or Hutchinson(2)") if stein else (1, "'exact', Hutchinson() or Paired()")
    if isinstance(probes, Integral) and not isinstance(probes, bool) and int(probes) >= fewest:
        return Hutchinson(int(probes))
    exact = isinstance(probes, str) and probes == "exact"
    if not stein and (exact or isinstance(probes, Paired)):
        return probes
    if isinstance(probes, Hutchinson) and probes.count >= fewest:
        if probes.mode != "reverse":
            expected = "probes without a mode, which is for the divergence of a likelihood"
            remedy = "Losses have engine='taylor' and engine='reverse' in its place."
            raise ValueError(complaint("probes", expected, probes, remedy, got=repr(probes)))
        return probes
    expected = f"a whole number of at least {fewest}, {kinds}"
    raise ValueError(complaint("probes", expected, probes, got=repr(probes)))


def check_weights(weights: object, order: int, elements: int = 1) -> Weights:
    """The weights (first, second, trace, third) as numbers and 0-dim tensors.

    There are as many as the order has terms; at order 2 a fourth may follow. One at least is not
    zero. The values of tensors are looked at on the CPU only. `elements` is d, on which the fourth
    of None and of "paper-toy" depend.
    """
    toy = 0.1 * elements**2
    if weights is None:
        # Each term is divided by its power of d already: above 1, the images', 0.1 d² is too much.
        return (1.0, 0.5, 0.0, min(1.0, toy))
    recipes = {"paper": (1.0,) * 4, "paper-toy": (1.0, 0.5, 0.0, toy)}
    if isinstance(weights, str) and weights in recipes:
        return recipes[weights]
    expected = (
        "four numbers (first, second, trace, third), at order 2 three or four, 'paper', "
        "'paper-toy' or, given to the constructor of SecondOrderDSM or ThirdOrderDSM, 'balanced'"
    )
    one = isinstance(weights, str | bytes) or getattr(weights, "ndim", 1) == 0
    if one or not isinstance(weights, Sequence | np.ndarray | Tensor):
        kind = ValueError if isinstance(weights, str) else TypeError
        raise kind(complaint("weights", expected, weights))
    if len(weights) not in COUNTS[order]:
        got = f"{len(weights)} at order {order}"
        raise ValueError(complaint("weights", expected, weights, got=got))
    given = tuple(check_weight("weights", weight) for weight in weights)
    if not any(map(counts, given[: order + 1])):
        raise ValueError(f"weights: expected one at least that is not 0; got {weights!r}.")
    return given


def counts(weight: float | Tensor) -> bool:
    """Whether a term of this weight is needed: not where it is the number 0."""
    return isinstance(weight, Tensor) or weight != 0


def check_weight(name: str, weight: object) -> float | Tensor:
    """Return a weight as a number of at least 0, or as a 0-dim tensor."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(complaint(name, "numbers", weight))
        check_finite(name, weight)
        number = weight.reshape(())
    else:
        number = check_number(name, weight, "finite numbers of at least 0")
    if (not isinstance(number, Tensor) or may_look(number)) and number < 0:
        raise ValueError(f"{name}: expected numbers of at least 0; got {float(number)}.")
    return number
