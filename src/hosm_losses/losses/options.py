"""The options of a loss: types, defaults and checks. `third_order_dsm` says what each does."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from hosm_losses._checks import (
    check_choice,
    check_finite,
    check_idle,
    check_number,
    check_whole,
    complaint,
    may_look,
)
from hosm_losses.derivatives import ENGINES, Engine
from hosm_losses.losses.targets import Targets
from hosm_losses.losses.weighting import TimeSampler, Weighting, check_weighting
from hosm_losses.probes import DISTRIBUTIONS, Distribution

Reduction = Literal["mean", "sum", "none"]
Third = Literal["exact", "laplacian"]
Estimator = Literal["hutchinson", "paired"]
Probes = int | Literal["exact"]
Weights = Sequence[float | Tensor] | np.ndarray | Tensor
Recipe = Literal["paper", "balanced"]
PROBES = {"hutchinson": 1, "paired": 2}  # the fewest, and those of probes=None, by estimator
COUNTS = {1: (1,), 2: (3, 4), 3: (4,)}  # of weights, by order


class FirstOrderOptions(TypedDict, total=False):
    """Options of a loss of order one."""

    weighting: Weighting
    time_sampler: TimeSampler
    targets: Targets
    reduction: Reduction


class _Engine(TypedDict, total=False):
    distribution: Distribution
    engine: Engine


class _Second(_Engine, total=False):
    probes: Probes | None
    estimator: Estimator


class TermsOptions(_Second, total=False):
    """Options of the terms of order three."""

    third: Third


class SecondOrderOptions(FirstOrderOptions, _Second, total=False):
    """Options of a loss of order two."""

    fraction: float
    weights: Weights | Recipe | None


class ThirdOrderOptions(SecondOrderOptions, TermsOptions, total=False):
    """Options of a loss of order three."""


class FirstOrderInputs(TypedDict, total=False):
    """What a loss of order one may be given with the data."""

    t: Tensor | None
    noise: Tensor | None
    targets: Targets
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None


class _Probed(FirstOrderInputs, total=False):
    probe: Tensor | None


class HigherOrderInputs(_Probed, total=False):
    """What a loss of order two or three may be given with the data."""

    weights: Weights | Recipe | None


class SteinChoices(_Engine, total=False):
    """Options of `SteinDSM`."""

    fraction: float
    weight: float | Tensor | None
    probes: int
    targets: Targets
    reduction: Reduction


class SteinInputs(_Probed, total=False):
    """What `SteinDSM` may be given with the data."""

    weight: float | Tensor | None


class SteinArguments(SteinInputs, SteinChoices, total=False):
    """Arguments of `stein_dsm` after the model and the data."""


class FirstOrderArguments(FirstOrderInputs, FirstOrderOptions, total=False):
    """Arguments of `first_order_dsm` after the model and the data."""


class SecondOrderArguments(HigherOrderInputs, SecondOrderOptions, total=False):
    """Arguments of `second_order_dsm` after the model and the data."""


class ThirdOrderArguments(HigherOrderInputs, ThirdOrderOptions, total=False):
    """Arguments of `third_order_dsm` after the model and the data."""


class TermsArguments(_Probed, TermsOptions, total=False):
    """Arguments of `dsm_terms` after the model, the data and the order."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is chosen once for a loss, checked; numbers of NumPy become Python's."""

    weights_name: ClassVar[str] = "weights"
    x_apart: ClassVar[bool] = True  # whether ε and the field come without q x; see `terms`
    order: int
    probes: Probes | None = None
    estimator: Estimator = "hutchinson"
    distribution: Distribution = "rademacher"
    weighting: Weighting = "noise"
    time_sampler: TimeSampler = None
    engine: Engine = "auto"
    third: Third = "exact"
    fraction: float = 1.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check every option."""
        order = check_whole("order", self.order, 1)
        if order not in COUNTS:
            raise ValueError(f"order: expected 1, 2 or 3; got {order}.")
        self._keep("order", order)
        self._check_estimator()
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        check_weighting(self.weighting, self.time_sampler)
        check_choice("engine", self.engine, ENGINES)
        check_choice("third", self.third, get_args(Third))
        if self.third != "exact" and self.engine == "reverse":
            raise ValueError(
                "engine: expected 'auto' or 'taylor', which can carry a second derivative, "
                f"with third={self.third!r}; got 'reverse'. Take third='exact' with it."
            )
        check_choice("reduction", self.reduction, get_args(Reduction))
        part = "a number in (0, 1]"
        self._keep("fraction", check_number("fraction", self.fraction, part, above=0, at_most=1))
        if self.fraction < 1 and self.reduction == "none":
            raise ValueError(
                "fraction: expected 1 with reduction='none', as rows outside the fraction have no "
                f"higher terms; got {self.fraction!r}. Use reduction='mean' or 'sum'."
            )

    def _check_estimator(self) -> None:
        check_choice("estimator", self.estimator, get_args(Estimator))
        if self.probes is None:
            self._keep("probes", self.default_probes)
        if not (isinstance(self.probes, str) and self.probes == "exact"):
            self._keep("probes", check_whole("probes (or 'exact')", self.probes, 1))
        elif self.order > 1:
            check_idle("distribution", self.distribution, "rademacher", "probes='exact'")
        if self.default_probes == 1:
            return
        if self.probes in (1, "exact"):
            why = (
                "whose sums over all unit vectors have no noise to take away"
                if self.probes == "exact"
                else "of which no two estimates can be multiplied"
            )
            raise ValueError(
                "probes: expected 2 or more random ones, the estimates of which are multiplied "
                f"with each other; got {self.probes!r}, {why}."
            )

    @property
    def default_probes(self) -> int:
        """The fewest probes, which are those of probes=None."""
        return PROBES[self.estimator]

    def checked(self, weights: object, elements: int) -> Weights:
        """The weights of the terms as numbers and 0-dim tensors, for samples of so many elements.

        By default they are the paper's for few dimensions. Its 0.1 d² of the third term goes up to
        1, which the paper has for images: each term is divided by its power of d already.
        """
        if weights is None and self.order > 1 and self.weighting == "likelihood":
            raise ValueError(
                "weights: expected numbers, 'paper' or, in a module, 'balanced' with "
                "weighting='likelihood', which puts the first term in nats, often thousands of "
                "times as large, and leaves the others; got None."
            )
        if weights is None:
            return (1.0, 0.5, 0.0, min(1.0, 0.1 * elements**2))
        return check_weights(weights, self.order)

    def _keep(self, name: str, value: object) -> None:
        # torch.compile need not see what changes nothing.
        if value is not getattr(self, name):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class SteinOptions(LossOptions):
    """What is chosen once for `stein_dsm`, checked."""

    weights_name: ClassVar[str] = "weight"
    x_apart: ClassVar[bool] = False  # the rate multiplies by the noise that was drawn
    order: int = 2
    probes: Probes | None = 2
    weighting: Weighting = "likelihood"

    @property
    def default_probes(self) -> int:
        """The fewest probes, which are those of probes=None."""
        return 2

    def checked(self, weights: object, elements: int) -> Weights:  # noqa: ARG002
        """The weights of the terms, for the weight of the second, 1 for None."""
        return (1.0, 1.0 if weights is None else _weight(weights, "weight"))


def _defaults(options: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(options)}


DEFAULTS, STEIN_DEFAULTS = _defaults(LossOptions), {**_defaults(SteinOptions), "weight": 1.0}
Function = TypeVar("Function", bound=Callable[..., Any])


def spelled_out(function: Function, defaults: Mapping[str, Any] = DEFAULTS) -> Function:
    """Show the arguments behind ** one by one in the function's signature, with their defaults.

    So help(), notebooks and the documentation show what type checkers read from the TypedDict. An
    option is a key of that and a field of `LossOptions`, which has its default and its check.
    """
    signature = inspect.signature(function)
    *shown, rest = signature.parameters.values()
    (arguments,) = get_args(rest.annotation)
    kind = inspect.Parameter.KEYWORD_ONLY
    for name, hint in get_type_hints(arguments).items():
        default = defaults.get(name)
        shown.append(inspect.Parameter(name, kind, default=default, annotation=hint))
    function.__signature__ = signature.replace(parameters=shown)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def refuse_unknown(name: str, arguments: type, given: Mapping[str, Any]) -> None:
    """Raise TypeError where the function `name` was given what is no key of the TypedDict."""
    expected: frozenset[str] = arguments.__optional_keys__  # pyright: ignore[reportAttributeAccessIssue]
    for unknown in [each for each in given if each not in expected]:  # for torch.compile of 2.6
        raise TypeError(
            f"{name}: got an unexpected keyword argument {unknown!r}; expected some of "
            f"{', '.join(sorted(expected))}."
        )


def check_weights(weights: object, order: int) -> Weights:
    """The weights (first, second, trace, third) as numbers and 0-dim tensors; 1 where not given.

    There are as many as the order has terms; at order 2 a fourth may follow. One at least is not
    zero. The values of tensors are looked at on the CPU only.
    """
    if weights is None or (isinstance(weights, str) and weights == "paper"):
        return (1.0,) * COUNTS[order][0]
    if isinstance(weights, str) and weights == "balanced":
        raise ValueError(
            "weights: expected numbers or 'paper' in a function; got 'balanced', which follows "
            "the sizes of the terms from step to step. Give it to the constructor of "
            "SecondOrderDSM or ThirdOrderDSM, which keep them."
        )
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
    if not any(map(counts, given[: order + 1])):
        raise ValueError(f"weights: expected one at least that is not 0; got {weights!r}.")
    return given


def counts(weight: float | Tensor) -> bool:
    """Whether a term of this weight is needed: not where it is the number 0."""
    return isinstance(weight, Tensor) or weight != 0


def _weight(weight: object, name: str = "weights") -> float | Tensor:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(complaint(name, "numbers", weight))
        if weight.is_complex() or weight.dtype == torch.bool:
            raise TypeError(complaint(name, "real numbers", weight))
        check_finite(name, weight)
        number = weight.reshape(())
    else:
        number = check_number(name, weight, "finite numbers of at least 0")
    if (not isinstance(number, Tensor) or may_look(number)) and number < 0:
        raise ValueError(f"{name}: expected numbers of at least 0; got {float(number)}.")
    return number
