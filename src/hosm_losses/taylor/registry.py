r"""The table of rules for PyTorch functions, the engine's errors, and checks of hooks.

Kinds of rules:
    linear      one function, applied to every component of a stack: `linear(function, name, …)`
    bilinear    a product of two factors: `product_rule(a, b, product, ndim)`
    pointwise   an elementwise function, with its first three derivatives; see `pointwise`
    composite   a combination of other functions, written once for Jets and plain tensors
    stack       a function that computes directly with the stacks of its Jets
    other       a property of a tensor, an in-place change, or an error

A rule accepts the arguments that networks usually pass. If a call passes other arguments, or if
the rule raises `NoRule`, PyTorch's own function is called instead, with exactly the same
arguments; see `hosm_losses.taylor.jets`.

Hooks on tensors and modules inside a network may read gradients but must not change them.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor._torch import versions


# ------------------------------------------------------------------------------------------ errors
class DerivativeError(ValueError):
    """A derivative cannot be computed, or would be wrong; the message says what to do instead."""


class ConstantError(DerivativeError):
    """Raised if PyTorch cannot differentiate an operator.

    Without this error, both engines would treat the operator's result as constant.
    """


class TaylorError(RuntimeError):
    """The Taylor engine cannot differentiate a function, although reverse mode may be able to."""


class NoRule(Exception):  # noqa: N818 - it never reaches a user
    """A rule does not support a call; PyTorch's own function is differentiated instead."""


# ------------------------------------------------------------------------------------------- rules
Function = Callable[..., Any]
Kind = Literal["linear", "bilinear", "pointwise", "composite", "stack", "other"]
Call = tuple[tuple[Any, ...], dict[str, Any]]
# Synonyms of argument names: NumPy's, which PyTorch also accepts, and the `ord` of norms.
SPELLINGS = {"axis": "dim", "keepdims": "keepdim", "ord": "p"}
HOMES = (torch, Tensor, F, torch.linalg)


def name_of(func: Function) -> str:
    """The name of a PyTorch function, for use in messages."""
    return getattr(func, "__name__", str(func))


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule and the arguments it accepts."""

    function: Function
    kind: Kind
    several: bool  # whether arguments other than the first may be Jets
    names: tuple[str, ...]  # the names of its arguments, positional ones first
    most: int | None  # how many arguments may be positional; None for any number
    needed: tuple[str, ...]  # the names of arguments without a default
    anything: bool  # whether it accepts other keyword arguments as well

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Return the arguments to pass to the rule, or None if the rule does not accept them."""
        named: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name not in ("inplace", "out"):
                named[SPELLINGS.get(name, name)] = value
        if not args and "input" in named:
            args = (named.pop("input"),)
        count = len(args)
        if self.most is not None and count > self.most:
            return None
        for name in named:
            if not self.anything and name not in self.names[count:]:
                return None
        for name in self.needed[count:]:
            if name not in named:
                return None
        return args, named


RULES: dict[Function, Rule] = {}
# Replacements of operators in reverse mode (see `primitives`): for derivatives in general, and for
# the first derivative of a single sample.
PRIMITIVES: dict[Function, Function] = {}
OF_ONE: dict[Function, Function] = {}
# Functions that are constant in x or read a property, and so are evaluated on the value. This is a
# dictionary because torch.compile does not find functions in a set. An entry is True if the
# function detaches, so that its result shares memory.
CONSTANT: dict[Function, bool] = {}
# Functions that accept a Jet of complex numbers together with constants; filled in `linear`.
OF_COMPLEX: dict[Function, None] = {}


def functions_named(*names: str | Function) -> list[Function]:
    """Return the functions in `names`; each string stands for all the functions that it names."""
    functions = [name for name in names if not isinstance(name, str)]
    for name in " ".join(name for name in names if isinstance(name, str)).split():
        functions += [getattr(home, name, None) for home in HOMES]
    # A dtype such as torch.float is not a function, and several names may mean the same function.
    return list(dict.fromkeys(function for function in functions if callable(function)))


def rule(
    *names: str | Function,
    several: bool = False,
    kind: Kind = "other",
    with_function: bool = False,
) -> Callable[[Function], Function]:
    """Register a rule for PyTorch functions; the rule takes the same arguments as the functions.

    Only the first argument may be a Jet, unless `several` is true; then any argument may be a Jet.
    If `with_function` is true, the rule receives the called function as an extra first argument.
    """

    def register(function: Function) -> Function:
        if not (operators := functions_named(*names)):
            homes = "torch, torch.Tensor, torch.nn.functional and torch.linalg"
            raise LookupError(f"rule: expected names in {homes}, or functions; got {names}.")
        for operator in operators:
            called = partial(function, operator) if with_function else function
            parameters = inspect.signature(called).parameters.values()
            places = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
            kinds = [p.kind for p in parameters]
            RULES[operator] = Rule(
                called,
                kind,
                several,
                tuple(p.name for p in (*places, *named)),
                None if inspect.Parameter.VAR_POSITIONAL in kinds else len(places),
                tuple(p.name for p in places if p.default is p.empty),
                inspect.Parameter.VAR_KEYWORD in kinds,
            )
        return function

    return register


def swapped(function: Function) -> Function:
    """Return a function that calls `function` with its two operands swapped."""
    return lambda a, b, **named: function(b, a, **named)


def axis(dim: Any, ndim: int) -> int:
    """Convert an axis of a value to the negative index of the same axis in the stack."""
    if not isinstance(dim, int) or not -ndim <= dim < ndim:
        raise NoRule
    return dim - ndim if dim >= 0 else dim


def axes(dim: Any, ndim: int) -> tuple[int, ...]:
    """Apply `axis` to one or more axes of a value, or to all of them if `dim` is None."""
    if dim is None:
        dim = tuple(range(ndim))
    dims = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
    if not dims:  # PyTorch's functions differ in what an empty tuple means
        raise NoRule
    return tuple(axis(dim, ndim) for dim in dims)


# ------------------------------------------------------------------------------------------- hooks
CHANGING_HOOK = (
    "network: expected hooks that only look at gradients; got a hook that changes gradients "
    "inside the network, and so the loss. Change parameter gradients after loss.backward()."
)


class ChangedGradientError(DerivativeError):
    """A hook changes a gradient, so the loss would depend on the engine."""


class ScriptedError(DerivativeError):
    """Neither engine can detect norms in a part of the network that torch.jit compiled."""


GIVE_THE_SOURCE = (
    "Inside it, PyTorch 2.6, 2.13 and 2.15 silently get higher derivatives of norms wrong. "
    "Use the module that it was compiled from."
)
# Errors that no other engine can avoid.
FINAL = (ChangedGradientError, ScriptedError, ConstantError)


def check_unchanged(returned: Sequence[Any], incoming: Sequence[Any]) -> None:
    """Raise an error if a module's hooks returned gradients other than the ones they received."""
    for after, before in zip(returned, incoming, strict=True):
        if isinstance(after, Tensor) and isinstance(before, Tensor) and after is not before:
            raise ChangedGradientError(CHANGING_HOOK)


def guard_hook(hook: Callable[[Any], Any]) -> Callable[[Tensor | None], None]:
    """Return a hook that raises an error if `hook` changes a gradient."""

    def guarded(gradient: Tensor | None) -> None:
        incoming = [] if gradient is None else [gradient]  # None if the output is not used
        before = versions(incoming)
        returned = hook(gradient)
        same = returned is None or returned is gradient
        if not same or versions(incoming) != before:
            raise ChangedGradientError(CHANGING_HOOK)

    return guarded
