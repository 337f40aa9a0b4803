"""The methods of Tensor that PyTorch has in Python.

torch.compile looks into them in place of asking `__torch_function__`, so Jet has its own. A rule
for such a method needs its name here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor.jet import Jet, call
from hosm_losses.taylor.table import IN_PYTHON, RULES

NAMES = ["__iter__", "__pow__", "__rdiv__", "__rsub__", "__rtruediv__"]
NAMES += ["norm", "split", "unflatten"]


def define() -> None:
    """Give Jet these methods, when every rule is registered."""
    for name in NAMES:
        function = getattr(Tensor, name)
        IN_PYTHON.append((function, RULES.get(function)))
        setattr(Jet, name, _method(function))


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Jet, *args: Any, **named: Any) -> Any:
        # Elsewhere by way of the modes that are on.
        ask = torch.compiler.is_compiling()
        return call(function, (self, *args), named) if ask else function(self, *args, **named)

    return method
