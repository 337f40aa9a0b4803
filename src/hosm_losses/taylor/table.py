r"""The table of rules: by which function of PyTorch each is found, and which calls it takes.

A rule is written with the arguments that networks give. A call with others, or one for which it
raises `NoRule`, goes to PyTorch's own function with exactly those arguments; see
`hosm_losses.taylor.jet`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.errors import NoRule

Function = Callable[..., Any]
# NumPy's names of arguments, which PyTorch takes too.
SPELLINGS = {"axis": "dim", "keepdims": "keepdim"}


def name_of(func: Function) -> str:
    """The name of a function of PyTorch, for a message."""
    return getattr(func, "__name__", str(func))


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule and the arguments it takes."""

    function: Function
    several: bool  # whether other arguments than the first may be Jets
    names: tuple[str, ...]  # of its arguments, first of those that may be given in their place
    most: int | None  # how many may be given in their place; None for any number
    needed: tuple[str, ...]  # the names of those without a default
    anything: bool  # whether it takes other names as well

    def bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments as the rule is called with them; None if it does not take them."""
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        if self.most is not None and len(args) > self.most:
            return None
        named: dict[str, Any] = {}
        for given, value in kwargs.items():
            name = SPELLINGS.get(given, given)
            known = self.anything or name in self.names
            if not known or name in named or name in self.names[: len(args)]:
                return None
            named[name] = value
        return (args, named) if all(name in named for name in self.needed[len(args) :]) else None


def WITHOUT_RULE(*_: Any) -> None:  # noqa: N802
    """In whose place stands the rule for all functions that have none."""


RULES: dict[Function, Rule] = {}
# Functions that are constant in x, or ask for a property: evaluated on the value. A dictionary,
# for torch.compile does not find functions in a set. "shares" is of those whose result shares the
# memory of the value, and "data" of the property that does.
CONSTANT: dict[Function, Any] = {}
# The methods that Tensor has in Python, with their rules: torch.compile does not find them in a
# dictionary.
IN_PYTHON: list[tuple[Function, Rule | None]] = []


def rule(*functions: Function, several: bool = False) -> Callable[[Function], Function]:
    """Register a rule for functions of PyTorch, with arguments as theirs, of which one is a Jet.

    The Jet is the first argument, unless `several` says that any may be one.
    """

    def register(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        places = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        named = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
        kinds = [each.kind for each in parameters]
        found = Rule(
            function,
            several,
            tuple(each.name for each in (*places, *named)),
            None if inspect.Parameter.VAR_POSITIONAL in kinds else len(places),
            tuple(each.name for each in places if each.default is each.empty),
            inspect.Parameter.VAR_KEYWORD in kinds,
        )
        RULES.update(dict.fromkeys(functions, found))
        return function

    return register


def rule_of_each(*functions: Function, several: bool = False) -> Callable[[Function], Function]:
    """Register a rule for each of some functions, which it is given before their arguments."""

    def register(function: Function) -> Function:
        for each in functions:
            rule(each, several=several)(partial(function, each))
        return function

    return register


def every(*names: str) -> tuple[Function, ...]:
    """The functions and methods of PyTorch with one of these names."""
    found = [getattr(home, name, None) for home in (torch, Tensor, F) for name in names]
    # A type such as torch.float is none, and some names are those of one function.
    return tuple(dict.fromkeys(each for each in found if callable(each)))


def axis(dim: Any, ndim: int) -> int:
    """A dimension of a value, counted from the back, where it is the stack's too."""
    if not isinstance(dim, int) or not -ndim <= dim < ndim:
        raise NoRule
    return dim - ndim if dim >= 0 else dim


def axes(dim: Any, ndim: int) -> tuple[int, ...]:
    """One or several dimensions of a value, at least one, or all for None; see `axis`."""
    if dim is None:
        dim = tuple(range(ndim))
    dims = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
    if not dims:  # which PyTorch reads in different ways
        raise NoRule
    return tuple(axis(each, ndim) for each in dims)
