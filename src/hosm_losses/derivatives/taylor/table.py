r"""The table of rules: by which function of PyTorch each is found, and which calls it takes.

What:
    A rule is written with the arguments that networks give. A call with others, or one for which
    it raises `NoRule`, goes to PyTorch's own function with exactly those arguments; see
    `hosm_losses.derivatives.taylor.jet`.
"""

__all__ = [
    "CONSTANT",
    "RULES",
    "NoRule",
    "Rule",
    "axes",
    "axis",
    "bound",
    "every",
    "rule",
    "takes_as",
]

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Rule = Callable[..., Any]
RULES: dict[Callable[..., Any], Rule] = {}
# Functions that are constant in x, or ask for a property: evaluated on the value. Dictionaries
# throughout, for torch.compile does not find functions in a set.
CONSTANT: dict[Callable[..., Any], bool] = {}
# NumPy's names of arguments, which PyTorch takes too.
SPELLINGS = {"axis": "dim", "keepdims": "keepdim"}


class NoRule(Exception):  # noqa: N818 - it never reaches a user
    """A call that a rule does not know; PyTorch's own function is differentiated in its place."""


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for functions of PyTorch; it is given their arguments, Jets among them."""

    def register(found: Rule) -> Rule:
        if not hasattr(found, "takes"):
            takes_as(found, found)
        RULES.update(dict.fromkeys(functions, found))
        return found

    return register


def takes_as(found: Rule, model: Callable[..., Any], *more: str) -> None:
    """Note which arguments a rule takes: those of a model, and keywords besides."""
    parameters = inspect.signature(model).parameters.values()
    places = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    named = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    kinds = [each.kind for each in parameters]
    found.takes = (  # pyright: ignore[reportFunctionMemberAccess]
        tuple(each.name for each in (*places, *named)) + more,
        None if inspect.Parameter.VAR_POSITIONAL in kinds else len(places),
        tuple(each.name for each in places if each.default is each.empty),
        inspect.Parameter.VAR_KEYWORD in kinds,
    )


def bound(
    found: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments as a rule is called with them; None if it does not take them."""
    names, most, needed, anything = found.takes  # pyright: ignore[reportFunctionMemberAccess]
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    if most is not None and len(args) > most:
        return None
    named: dict[str, Any] = {}
    for given, value in kwargs.items():
        name = SPELLINGS.get(given, given)
        if name in named or name in names[: len(args)] or not (anything or name in names):
            return None
        named[name] = value
    return (args, named) if all(name in named for name in needed[len(args) :]) else None


def every(*names: str) -> tuple[Callable[..., Any], ...]:
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
