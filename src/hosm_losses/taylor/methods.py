"""The methods of Tensor that PyTorch has in Python.

torch.compile looks into them in place of asking `__torch_function__`, so Jet has its own. A rule
for such a method needs its name here.
"""

from collections.abc import Callable
from typing import Any

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
    return lambda self, *args, **named: call(function, (self, *args), named)
