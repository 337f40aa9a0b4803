"""The options of a loss: types, defaults and checks. `third_order_dsm` says what each does."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, get_args, get_type_hints

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
from hosm_losses.losses.weighting import TimeSampler, Weighting, check_weighting
from hosm_losses.probes import DISTRIBUTIONS, Distribution

Reduction = Literal["mean", "sum", "none"]
Estimator = Literal["exact", "laplacian", "sliced"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
Probes = int | Literal["exact"]
Weights = Sequence[float | Tensor] | np.ndarray | Tensor
COUNTS = {1: (1,), 2: (3, 4), 3: (4,)}  # of weights, by order


class FirstOrderOptions(TypedDict, total=False):
    """Options of a loss of order one."""

    weighting: Weighting
    time_sampler: TimeSampler
    reduction: Reduction


class _Second(TypedDict, total=False):
    probes: Probes
    distribution: Distribution
    derivative: Engine


class _Third(_Second, total=False):
    third: Estimator


class SecondOrderOptions(FirstOrderOptions, _Second, total=False):
    """Options of a loss of order two."""

    weights: Weights | None
    fraction: float
    chunks: int


class ThirdOrderOptions(SecondOrderOptions, _Third, total=False):
    """Options of a loss of order three."""


class FirstOrderInputs(TypedDict, total=False):
    """What a loss of order one may be given with the data."""

    t: Tensor | None
    noise: Tensor | None
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None


class _Probed(FirstOrderInputs, total=False):
    probe: Tensor | None


class HigherOrderInputs(_Probed, total=False):
    """What a loss of order two or three may be given with the data."""

    weights: Weights | None


class FirstOrderArguments(FirstOrderInputs, FirstOrderOptions, total=False):
    """Arguments of `first_order_dsm` after the model and the data."""


class SecondOrderArguments(HigherOrderInputs, SecondOrderOptions, total=False):
    """Arguments of `second_order_dsm` after the model and the data."""


class ThirdOrderArguments(HigherOrderInputs, ThirdOrderOptions, total=False):
    """Arguments of `third_order_dsm` after the model and the data."""


class TermsArguments(_Probed, _Third, total=False):
    """Arguments of `dsm_terms` after the model, the data and the order."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is chosen once for a loss, checked; numbers of NumPy become Python's."""

    order: int
    probes: Probes = 1
    distribution: Distribution = "rademacher"
    weighting: Weighting = "noise"
    time_sampler: TimeSampler = None
    derivative: Engine = "auto"
    third: Estimator = "exact"
    fraction: float = 1.0
    chunks: int = 1
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check every option."""
        order = check_whole("order", self.order, 1)
        if order not in COUNTS:
            raise ValueError(f"order: expected 1, 2 or 3; got {order}.")
        self._keep("order", order)
        if not (isinstance(self.probes, str) and self.probes == "exact"):
            self._keep("probes", check_whole("probes (or 'exact')", self.probes, 1))
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        check_weighting(self.weighting, self.time_sampler)
        check_choice("derivative", self.derivative, ENGINES)
        check_choice("third", self.third, ESTIMATORS)
        if self.third != "exact" and self.derivative == "reverse":
            raise ValueError(
                "derivative: expected 'auto', 'taylor' or 'forward', which can take a second "
                f"derivative forward, with third={self.third!r}; got 'reverse'."
            )
        check_choice("reduction", self.reduction, get_args(Reduction))
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


DEFAULTS = {field.name: field.default for field in dataclasses.fields(LossOptions)}
Function = TypeVar("Function", bound=Callable[..., Any])


def spelled_out(function: Function) -> Function:
    """Show the arguments behind ** one by one in the function's signature, with their defaults.

    So help(), notebooks and the documentation show what type checkers read from the TypedDict. An
    option is a key of that and a field of `LossOptions`, which has its default and its check.
    """
    signature = inspect.signature(function)
    *shown, rest = signature.parameters.values()
    (arguments,) = get_args(rest.annotation)
    for name, hint in get_type_hints(arguments).items():
        shown.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=DEFAULTS.get(name),
                annotation=hint,
            )
        )
    function.__signature__ = signature.replace(parameters=shown)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def refuse_unknown(name: str, arguments: type, given: Mapping[str, Any]) -> None:
    """Raise TypeError where the function `name` was given what is no key of the TypedDict."""
    expected: frozenset[str] = arguments.__optional_keys__  # pyright: ignore[reportAttributeAccessIssue]
    for unknown in given.keys() - expected:
        raise TypeError(
            f"{name}: got an unexpected keyword argument {unknown!r}; expected some of "
            f"{', '.join(sorted(expected))}."
        )


def check_weights(weights: object, order: int) -> Weights:
    """The weights (first, second, trace, third) as numbers and 0-dim tensors; all 1 for None.

    There are as many as the order has terms; at order 2 a fourth may follow. One at least is not
    zero. The values of tensors are looked at on the CPU only.
    """
    if weights is None:
        return (1.0,) * COUNTS[order][0]
    expected = "four numbers (first, second, trace, third), at order 2 three or four"
    entries: Sequence[object] | None = None
    if isinstance(weights, np.ndarray | Tensor):
        entries = tuple(weights) if weights.ndim else None
    elif isinstance(weights, Sequence) and not isinstance(weights, str | bytes):
        entries = weights
    if entries is None:
        raise TypeError(complaint("weights", expected, weights))
    if len(entries) not in COUNTS[order]:
        got = f"{len(entries)} at order {order}"
        raise ValueError(complaint("weights", expected, weights, got=got))
    given = tuple(_weight(weight) for weight in entries)
    if not any(isinstance(weight, Tensor) or weight != 0 for weight in given[: order + 1]):
        raise ValueError(f"weights: expected one at least that is not 0; got {weights!r}.")
    return given


def _weight(weight: object) -> float | Tensor:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(complaint("weights", "numbers", weight))
        if weight.is_complex() or weight.dtype == torch.bool:
            raise TypeError(complaint("weights", "real numbers", weight))
        check_finite("weights", weight)
        number = weight.reshape(())
    else:
        number = check_number("weights", weight, "finite numbers of at least 0")
    if (not isinstance(number, Tensor) or may_look(number)) and number < 0:
        raise ValueError(f"weights: expected numbers of at least 0; got {float(number)}.")
    return number
