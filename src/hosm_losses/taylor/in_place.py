r"""Rules for what changes a tensor in place: the function that is not in place, and a `write`.

PyTorch names a method that changes its object by a last underscore. Where the method without it
has a rule, that is used. Where it has none, or there is no such method, a copy is changed in
PyTorch's own words and differentiated by torch.func.jvp; see `hosm_losses.taylor.jet`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses.taylor.along import aligned, lengthened
from hosm_losses.taylor.arguments import jet_among
from hosm_losses.taylor.derived import differentiated
from hosm_losses.taylor.errors import TaylorError
from hosm_losses.taylor.forward_mode import WRONG, wrong_in_forward_mode
from hosm_losses.taylor.jet import Jet, call, written
from hosm_losses.taylor.selection import picked, picks
from hosm_losses.taylor.table import RULES, Function, rule

# What changes more than the values of its object.
REFUSED = """
    apply_ detach_ map_ map2_ rename_ resize_ resize_as_ set_ share_memory_ squeeze_ swapaxes_
    swapdims_ t_ transpose_ unsqueeze_
"""
OPERATORS = "add sub mul div truediv floordiv mod pow and or xor lshift rshift"


def _register(change: Function, plain: Function | None) -> None:
    """Register the rule for a method in place, of which `plain` is the one that is not."""

    @rule(change, several=True)
    def changed(x: Any, *args: Any, **named: Any) -> Tensor:
        start = _started(x, *args, *named.values())
        # Of another type, what the copy says decides.
        if plain is None or start.dtype != x.dtype:
            return _by_a_copy(change, x, *args, **named)
        return written(x, call(plain, (start, *args), named))


def _by_a_copy(change: Function, x: Tensor, *args: Any, **named: Any) -> Tensor:
    """Change x as PyTorch changes a copy of it."""
    if wrong_in_forward_mode(change, args, named):
        raise TaylorError(f"{change.__name__}: {WRONG}")
    start = _started(x, *args, *named.values())
    return written(x, differentiated(_on_a_copy(change), (start, *args), named))


def _started(x: Tensor, *others: Any) -> Jet:
    """A Jet, or a plain tensor as the Jet of a constant."""
    return x if isinstance(x, Jet) else jet_among(others).constant(x)


def _on_a_copy(change: Function) -> Callable[..., Tensor]:
    """The method, on a copy of its object that is returned."""

    def changed(x: Tensor, *args: Any, **named: Any) -> Tensor:
        copy = x.clone()
        change(copy, *args, **named)
        return copy

    changed.__name__ = change.__name__
    return changed


def _refused(change: Function) -> Callable[..., Any]:
    def refused(*_args: Any, **_named: Any) -> Any:
        raise TaylorError(f"{change.__name__}: changes more in place than the values of a tensor.")

    return refused


def _homes(name: str) -> list[Function]:
    found = [getattr(home, name, None) for home in (Tensor, torch, F)]
    return [each for each in found if callable(each)]


_names = {
    name: name.removesuffix("_")
    for home in (Tensor, torch, F)
    for name in dir(home)
    if name.endswith("_") and not name.startswith("_")
} | {f"__i{name}__": f"__{name}__" for name in OPERATORS.split()}
for _name, _plain in _names.items():
    _with_rule = next((each for each in _homes(_plain) if each in RULES), None)
    for _change in _homes(_name):
        if _name in REFUSED.split():
            rule(_change, several=True)(_refused(_change))
        else:
            _register(_change, _with_rule)


@rule(*_homes("requires_grad_"), *_homes("retain_grad"))
def _requires_grad(x: Jet, requires_grad: bool = True) -> Jet:
    """Nothing to do, for what depends on x requires a gradient."""
    if not requires_grad:
        raise TaylorError("requires_grad_: False would cut the graph of what depends on x.")
    return x


@rule(Tensor.copy_, several=True)
def _copy(x: Any, source: Any, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    if isinstance(source, Jet):
        stack = aligned(source.stack, x.ndim)
        return written(x, source.like(stack.expand(len(stack), *x.shape)))
    return written(x, source.to(x.device).expand(x.shape))


@rule(Tensor.__setitem__, several=True)
def _set_item(x: Any, index: Any, value: Any) -> None:
    parts = picks(index)
    if parts is None or not isinstance(value, Tensor | float | int):
        _by_a_copy(Tensor.__setitem__, x, index, value)
        return
    start = _started(x, value)
    ndim = picked(start.stack, parts).ndim - 1
    if isinstance(value, Jet) and value.ndim > ndim:
        _by_a_copy(Tensor.__setitem__, x, index, value)
        return
    several = (slice(None), *parts)
    if isinstance(value, Jet):
        count = max(len(start.stack), len(value.stack))
        whole = lengthened(start.stack, count).clone()
        whole[several] = aligned(lengthened(value.stack, count), ndim).to(whole.dtype)
    else:
        whole = start.stack.clone()
        whole[0][parts] = value
        whole[1:][several] = 0
    written(x, start.like(whole))
