"""Functions that are compiled once for each network, and kept for later calls.

Purpose:
    On a small network, most of a step's time is spent launching operators one by one. A compiled
    step fuses them. Compiling takes seconds, so the compiled functions are kept for as long as
    their network exists. Parameters are inputs of a compiled function, so changed weights are
    seen without compiling again.

    `torch.compile` allows only a few versions of a function that has the same code object. Each
    network and each key therefore get a code object of their own.
"""

import weakref
from collections.abc import Callable, Hashable
from itertools import count
from types import FunctionType
from typing import Any

import torch

from hosm_losses._checks import warn

_NUMBERS = count()
_PROGRAMS: "weakref.WeakKeyDictionary[Any, Programs]" = weakref.WeakKeyDictionary()


class Programs:
    """The compiled functions of a network."""

    def __init__(self) -> None:
        self.compiled: dict[Hashable, Callable[..., Any]] = {}
        self.refused = False

    @classmethod
    def of(cls, network: object) -> "Programs":
        """Return the compiled functions of a network, or none if it cannot be remembered."""
        try:
            return _PROGRAMS.setdefault(network, cls())
        except TypeError:
            return cls()

    def run(self, key: Hashable, function: Any, *arguments: Any) -> Any:
        """Return function(*arguments); the function is compiled for each key.

        If it cannot be compiled, warn once and call the function itself, now and later.
        """
        if not self.refused:
            key = function.__name__, key
            try:
                if key not in self.compiled:
                    self.compiled[key] = _compiled(function)
                return self.compiled[key](*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever Dynamo, Inductor or a C++ compiler raises
                self.refused = True
                lines = map(str.strip, f"{type(error).__name__}: {error}".splitlines())
                why = " ".join([line for line in lines if line][:3])
                warn(
                    "solver.compiled: expected a network that torch.compile can compile with "
                    f"fullgraph=True; got an error ({why}). The steps run without compiling. "
                    "Leave out compiled=True, or change what stops it."
                )
        return function(*arguments)


def _compiled(function: FunctionType) -> Callable[..., Any]:
    code = function.__code__
    code = code.replace(co_name=f"{code.co_name}_{next(_NUMBERS)}")
    copy = FunctionType(code, function.__globals__, function.__name__)
    return torch.compile(copy, fullgraph=True, dynamic=False)
