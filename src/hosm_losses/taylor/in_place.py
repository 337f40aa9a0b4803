r"""Rules for in-place methods; a rule computes its result out of place, then calls `write_jet`.

In PyTorch, a trailing underscore marks a method that changes its tensor in place. If the method
without the underscore exists and has a rule, that rule is used. Otherwise, PyTorch's own in-place
method is called on a copy and differentiated by torch.func.jvp; see `hosm_losses.taylor.jets`.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor.jets import Jet, call, differentiate, jet_among, write_jet
from hosm_losses.taylor.primitives import WRONG, wrong_in_forward_mode
from hosm_losses.taylor.registry import HOMES, RULES, Function, TaylorError, functions_named, rule
from hosm_losses.taylor.stacks import align, extend

# Methods that change more than the values of their tensor.
REFUSED = """
    apply_ detach_ map_ map2_ rename_ resize_ resize_as_ set_ share_memory_ squeeze_ swapaxes_
    swapdims_ t_ transpose_ unsqueeze_
"""
# Functions that change every tensor of a list.
LISTS = [name for name in dir(torch) if name.startswith("_foreach") and name.endswith("_")]
OPERATORS = "add sub mul div truediv floordiv mod pow and or xor lshift rshift"


def _change_in_place(
    change: Function, plain: Function | None, x: Any, *args: Any, **named: Any
) -> Tensor:
    """Change x in place, using the rule of the out-of-place function `plain` unless it is None."""
    start = _as_jet(x, *args, *named.values())
    # If the dtypes differ, PyTorch's own method computes the result, on a copy.
    if plain is None or start.dtype != x.dtype:
        return _change_a_copy(change, x, *args, **named)
    return write_jet(x, call(plain, (start, *args), named))


def _change_a_copy(change: Function, x: Tensor, *args: Any, **named: Any) -> Tensor:
    """Change and differentiate a copy of x, then write the result to x in place."""

    def changed(x: Tensor, *args: Any, **named: Any) -> Tensor:
        copy = x.clone()
        change(copy, *args, **named)
        return copy

    if wrong_in_forward_mode(change, args, named):
        raise TaylorError(f"{change.__name__}: {WRONG}")
    changed.__name__ = change.__name__
    start = _as_jet(x, *args, *named.values())
    return write_jet(x, differentiate(changed, (start, *args), named))


def _as_jet(x: Tensor, *others: Any) -> Jet:
    return x if isinstance(x, Jet) else jet_among(others).constant(x)


@rule(REFUSED, *LISTS, several=True, with_function=True)
def _refused(change: Function, *_args: Any, **_named: Any) -> Any:
    raise TaylorError(f"{change.__name__}: changes more than the values of a tensor in place.")


_METHODS = {
    name: name.removesuffix("_")
    for home in HOMES
    for name in dir(home)
    if name.endswith("_") and not name.startswith("_")
} | {f"__i{name}__": f"__{name}__" for name in OPERATORS.split()}


def register_changes() -> None:
    """Register a rule for every in-place method that has none.

    All other rules must be registered before this call.
    """
    for name, plain in _METHODS.items():
        functions = [function for function in functions_named(plain) if function in RULES]
        for change in functions_named(name):
            if change not in RULES:
                changed = partial(_change_in_place, change, functions[0] if functions else None)
                rule(change, several=True)(changed)


@rule("requires_grad_ retain_grad")
def _requires_grad(x: Jet, requires_grad: bool = True) -> Jet:
    """Return x, which already requires a gradient."""
    if not requires_grad:
        raise TaylorError("requires_grad_: False would cut the graph of tensors that depend on x.")
    return x


@rule(Tensor.copy_, several=True)
def _copy(x: Any, source: Any, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    if isinstance(source, Jet):
        stack = align(source.stack, x.ndim)
        return write_jet(x, source.like(stack.expand(len(stack), *x.shape)))
    return write_jet(x, source.to(x.device).expand(x.shape))


@rule(Tensor.__setitem__, several=True)
def _set_item(x: Any, index: Any, value: Any) -> None:
    start = _as_jet(x, value)
    values: list[Any] = list(value.stack) if isinstance(value, Jet) else [value]
    count = max(len(start.stack), len(values))
    values += [0] * (count - len(values))  # a constant has zero derivatives
    parts = [part.clone() for part in extend(start.stack, count)]
    for part, item in zip(parts, values, strict=True):
        part[index] = item
    write_jet(x, start.like(torch.stack(parts)))
