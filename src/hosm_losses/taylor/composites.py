r"""Operators composed of a few others: one body serves Jets and plain tensors.

A body takes `ops` before the arguments of its operator. `ops.softmax(x, -1)` calls a function of
torch, of torch.nn.functional or a method of Tensor: as it is on plain tensors, by its rule on
Jets. Written as `torch.softmax(x, -1)` torch.compile would take a Jet for a plain tensor.

With `primitive=True` the body also takes the operator's place where reverse mode differentiates a
network: see `primitives`.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.errors import NoRule
from hosm_losses.taylor.registry import PRIMITIVES, RULES, Function, functions_named, rule
from hosm_losses.taylor.tensor import Jet, call


def _on_jets(function: Function) -> Function:
    """A function by its rule, where an argument is a Jet or has one in a list."""

    def called(*args: Any, **named: Any) -> Any:
        for each in args:
            for one in each if isinstance(each, list) else (each,):
                if isinstance(one, Jet):
                    return call(function, args, named)
        return function(*args, **named)

    return called


_FUNCTIONS = {
    name: function
    for home in (Tensor, F, torch)
    for name, function in ((name, getattr(home, name)) for name in dir(home))
    if callable(function) and not name.startswith("_")
}
ON_TENSORS: Any = SimpleNamespace(**_FUNCTIONS)
ON_JETS: Any = SimpleNamespace(**{name: _on_jets(each) for name, each in _FUNCTIONS.items()})
ON_TENSORS.value = Tensor.detach  # the plain value of what may be a Jet
ON_JETS.value = lambda x: (x.stack[0] if isinstance(x, Jet) else x).detach()


def composite(
    *names: str | Function, several: bool = True, primitive: bool = False
) -> Callable[[Function], Function]:
    """Register a body for functions of PyTorch.

    Args:
        names: of the functions, or these.
        several: whether other arguments than the first may be Jets.
        primitive: whether it takes their place in reverse mode as well.
    """

    def register(body: Function) -> Function:
        rule(*names, several=several, kind="composite")(partial(body, ON_JETS))
        for each in functions_named(*names) if primitive else ():
            PRIMITIVES[each] = partial(_primitive, each, body)
        return body

    return register


def _primitive(function: Function, body: Function, *args: Any, **named: Any) -> Any:
    taken = RULES[function].takes(args, named)
    if taken is not None:
        try:
            found = body(ON_TENSORS, *taken[0], **taken[1])
        except NoRule:
            pass
        else:
            return taken[0][0].copy_(found) if named.get("inplace") else found
    return function(*args, **named)


@composite(F.glu, primitive=True)
def _glu(ops: Any, input: Any, dim: int = -1) -> Any:  # noqa: A002
    if input.shape[dim] % 2:
        raise NoRule  # for PyTorch to refuse
    value, gate = ops.chunk(input, 2, dim)
    return ops.mul(value, ops.sigmoid(gate))


@composite(F.mish, primitive=True)
def _mish(ops: Any, input: Any) -> Any:  # noqa: A002
    """By softplus: the second derivative of PyTorch's own is NaN above 88 in float32."""
    return ops.mul(input, ops.tanh(ops.softplus(input)))


@composite("logaddexp", primitive=True)
def _logaddexp(ops: Any, input: Any, other: Any) -> Any:  # noqa: A002
    """By softplus: the second derivative of PyTorch's own is NaN 88 apart in float32."""
    larger = ops.ge(input, other)
    high, low = ops.where(larger, input, other), ops.where(larger, other, input)
    infinite = ops.eq(high, low) & ops.isinf(high)
    return ops.add(high, ops.softplus(ops.masked_fill(ops.sub(low, high), infinite, 0.0)))
