r"""Which Jets share memory, and what a change in place of one does to the others.

What:
    A Jet that is changed in place is given another stack, and no stack is ever written to. So
    autograd keeps what it saved, and a change costs what the function costs that is not in place.
    Where PyTorch's own result would be a view, the Jets share memory: a view remembers its root
    and how it is made of it, and a change of one is made in the stack of the root, of which all
    views are then made again. Whether a reshape or a cast copies depends on how the elements of a
    tensor lie, which need not be the same in a stack. After a change of one such Jet the others
    are stale: whoever reads one meets a TaylorError.

    A plain tensor that is given values that depend on x, as by `out[:, :2] = x`, becomes a Jet
    until the network returns.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses.taylor._torch import (
    TELLS_HOOKS,
    checkpoint_hook,
    has_alias,
    shell,
    swapped,
    versions,
)
from hosm_losses.taylor.along import Pairs, lengthened
from hosm_losses.taylor.errors import DerivativeError, TaylorError

Move = Callable[[Tensor], Tensor]  # from a stack to that of a view
CHANGED_ARGUMENT = (
    "checkpoint: expected a function that leaves its arguments as they are; got one that changes "
    "an argument in place, and would be evaluated again with the changed one. Put .clone() before "
    "the change."
)
UNPACKED = (
    "torch.compile unpacks a tensor, as in q, k, v = qkv, and one of such a shape was changed in "
    "place: whether before, or the same, is not known. Write q, k, v = qkv.unbind(0)."
)
# Functions without a rule that may return a view of their argument.
_VIEWS = """
    __get__ __pos__ atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to chunk conj
    diagonal dsplit expand flatten hsplit meshgrid movedim moveaxis narrow permute positive ravel
    reshape resolve_conj resolve_neg select slice split split_with_sizes squeeze swapaxes swapdims
    t tensor_split transpose unbind unflatten unfold unsqueeze view view_as view_as_real vsplit
"""
PERHAPS_VIEWS = _VIEWS.split()


class Carrying(NamedTuple):
    """What goes on while a function is carried."""

    firsts: int
    pairs: Pairs
    jets: "list[weakref.ref[Any]]"  # all that were made
    # What was detached from what may share memory with other Jets, and its version.
    copies: list[tuple[Tensor, int]]
    changed: list[tuple[int, ...]]  # under torch.compile, the shapes of rows of what was changed


class _Thread(threading.local):
    """What goes on in a thread."""

    def __init__(self) -> None:
        self.carrying: list[Carrying] = []
        # Plain tensors that became Jets, by weak references, and what they were.
        self.promoted: list[tuple[weakref.ref[Tensor], Tensor]] = []


class _Stale(Tensor):
    """In the place of a stack that may have been changed through another Jet."""

    @classmethod
    def __torch_function__(cls, *_args: Any, **_named: Any) -> Any:
        raise TaylorError(
            "a tensor that may share memory with one that was changed in place since: whether a "
            "reshape or a cast copies is not known here. Put .clone() before the change."
        )

    __torch_dispatch__ = __torch_function__  # pyright: ignore[reportAssignmentType]


THREAD = _Thread()


def _reference(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Weak, for what a network drops; torch.compile has no weak references."""
    return (lambda: tensor) if torch.compiler.is_compiling() else weakref.ref(tensor)


def living(references: Iterable[Callable[[], Any]]) -> list[Any]:
    """What weak references still refer to."""
    return [each for each in (reference() for reference in references) if each is not None]


def share(source: Any, result: Any, move: Move | None = None) -> Any:
    """Note that the Jet `result` is a view of the Jet `source`; without `move` that it may be."""
    share_value(source, result)
    result.memory = source.memory
    if move is None:
        # What was detached before, a change of which may be one of the result or not.
        _watch(each for each in living(source.memory) if not hasattr(each, "root"))
    else:
        before = source.move
        result.root = source if source.root is None else source.root
        result.move = move if before is None else lambda stack: move(before(stack))
    return result


def share_value(source: Any, value: Tensor) -> None:
    """Note that a tensor, such as the plain one of .detach(), may share memory with a Jet."""
    if source.memory is None:
        source.memory = [_reference(source)]
    source.memory.append(_reference(value))


def detached(source: Any, value: Tensor) -> Tensor:
    """Return the value that was detached from a Jet, which shares memory with both.

    It is a copy where a reshape or a copy that may be none lies between Jets of that memory: what
    a change of it would do to the others is not known.
    """
    jets = [each for each in living(source.memory or ()) if hasattr(each, "root")]
    roots = {id(each if each.root is None else each.root) for each in jets}
    if len(roots) > 1:
        value = value.clone()
        _watch([value])
    share_value(source, value)
    return value


def _watch(plain: Iterable[Tensor]) -> None:
    """Remember the versions of plain tensors, which show `end` a change in place."""
    for carrying in THREAD.carrying[-1:]:
        for each in plain:
            carrying.copies.extend((each, version) for version in versions([each]))


def write(jet: Any, stack: Tensor) -> Any:
    """Give a Jet, and all that share memory with it, the stack that a change in place leaves."""
    if checkpoint_hook("_recomputation_hook") is not None and jet.changed:
        raise DerivativeError(CHANGED_ARGUMENT)
    if checkpoint_hook() is not None:
        jet.changed = True
    others = [jet] if jet.memory is None else living(jet.memory)
    if torch.compiler.is_compiling():
        THREAD.carrying[-1].changed.extend([tuple(each.shape[1:]) for each in others])
    if jet.memory is None:
        jet.stack = stack
        return jet
    if any(not isinstance(each, type(jet)) for each in others):
        raise TaylorError(
            "a change in place of what shares its memory with a tensor that was detached before, "
            "or that torch.compile unpacked."
        )
    root = jet if jet.root is None else jet.root
    whole = stack
    if root is not jet:
        count = max(len(stack), len(root.stack))
        # A contiguous copy, of which what is a view in PyTorch is one nearly always.
        whole = lengthened(root.stack, count).clone(memory_format=torch.contiguous_format)
        place = jet.move(whole)
        if place._base is not whole:
            raise TaylorError("a change in place of a view whose elements lie far apart.")
        place.copy_(lengthened(stack, count))
    root.stack = whole
    for each in others:
        if each is not root:
            each.stack = each.move(whole) if each.root is root else _stale(whole)
    return jet


def _stale(stack: Tensor) -> Any:
    """What stands for a stack that is out of date; torch.compile says in its own words."""
    return None if torch.compiler.is_compiling() else shell(_Stale, stack)


def end(carrying: Carrying, jets: list[Any]) -> None:
    """Make what is left of Jets plain tensors, for they may be kept by the network.

    TaylorError where a copy of what was detached was changed in place.
    """
    # Tensors with weak references do not change places.
    shared = {id(jet.memory): jet.memory for jet in jets if jet.memory is not None}
    groups = [(memory, living(memory)) for memory in shared.values()]
    for memory, _ in groups:
        memory.clear()
    carrying.jets.clear()
    # An older PyTorch does not refuse what a checkpoint saved, and crashes in its recomputation.
    for jet in jets if TELLS_HOOKS else ():
        # One that is stale has no value, and one that a checkpoint saved will be needed as it is.
        with suppress(TaylorError, RuntimeError):
            swapped(jet, jet.stack[0])
    for memory, members in groups:
        memory.extend(_reference(each) for each in members if hasattr(each, "stack"))
    if versions([copy for copy, _ in carrying.copies]) != [each for _, each in carrying.copies]:
        raise TaylorError(
            "a change in place of what was detached from a tensor that may share memory with "
            "another: whether a reshape copies is not known here. Put .clone() before the change."
        )


def demote(count: int, finished: bool) -> None:
    """Make all but the first `count` promoted tensors plain again, with their new values.

    Without those where the call has not finished.
    """
    while len(THREAD.promoted) > count:
        reference, plain = THREAD.promoted.pop()
        jet: Any = reference()
        if jet is None:
            continue
        del reference
        if jet.memory is not None:
            jet.memory.clear()  # weak references, with which tensors do not change places
        value = jet.stack[0]
        swapped(jet, plain)
        if finished:
            jet.copy_(value)


def promote(tensor: Tensor, jet: Any) -> None:
    """Make a plain tensor the Jet that is given, in place."""
    refused = "a plain tensor that shares memory is given values that depend on x in place."
    leaf = tensor.requires_grad and tensor.is_leaf
    if torch.compiler.is_compiling() or leaf or tensor._base is not None:
        raise TaylorError(refused)
    for carrying in THREAD.carrying[-1:]:
        carrying.jets[:] = [each for each in carrying.jets if each() is not jet]
    try:
        if has_alias(tensor):  # which is not known under torch.func
            raise TaylorError(refused)
        swapped(tensor, jet)
    except RuntimeError as error:
        raise TaylorError(refused) from error
    THREAD.promoted.append((weakref.ref(tensor), jet))
