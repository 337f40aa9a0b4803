r"""Tensors that may share the memory of a Jet, and tensors kept for a backward pass.

Changes in place:
    A Jet that is changed in place receives a new stack, and no stack is ever written to. Tensors
    that autograd saved therefore stay valid. Changing a Jet in place saves neither time nor
    memory compared with calling the out-of-place function. In PyTorch, the change also appears in
    every tensor that shares the changed memory, such as a view. With Jets, the change would not
    appear in any other tensor. The change is therefore rejected while any tensor that may share
    the memory (a view, the result of a reshape or a detached tensor) is in use. Under
    torch.compile, which does not support weak references, every tensor that was ever recorded as
    possibly sharing a Jet's memory counts as being in use.

    A detached tensor shares the memory of a stack and must not be changed in place. Such a
    change would appear in a Jet made by a reshape only if the reshape did not copy the stack. When
    the function returns, the engine checks that no detached tensor was changed.

    A plain tensor that receives values depending on x, as in `out[:, :2] = x`, becomes a Jet until
    the function returns.

Recomputation:
    When a rule is composed of operators, autograd keeps every tensor that any of the operators
    needs for its gradient. An elementwise rule consists of a handful of operators on tensors as
    large as the activations. All of these tensors together would occupy several times as much
    memory as the network's own activations. `with_recomputation` keeps only the arguments or only
    the result of a rule, and recomputes everything else when a gradient is needed. The gradient is
    itself evaluated in this way, as a function of the kept tensors and the cotangents, and so are
    all derivatives of higher order.

    Under torch.compile and the transforms of torch.func, which decide for themselves what to keep,
    the function is evaluated directly.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses.taylor._torch import (
    TELLS_HOOKS,
    checkpoint_hook,
    has_alias,
    is_traced,
    swap,
    versions,
    will_run,
)
from hosm_losses.taylor.registry import DerivativeError, TaylorError
from hosm_losses.taylor.stacks import Pairs

# ----------------------------------------------------------------------- tensors that share memory
CHANGED_ARGUMENT = (
    "checkpoint: expected a function that leaves its arguments as they are; got one that "
    "changes an argument in place. Put .clone() before the change."
)
IN_USE = "a change in place of memory that a view in use may share. Put .clone() before it."
UNPACKED = (
    "torch.compile unpacks a tensor, as in q, k, v = qkv, and a tensor of such a shape was "
    "changed in place. Write q, k, v = qkv.unbind(0)."
)
# Functions without a rule that may return their argument, or a view of it.
_VIEWS = """
    __get__ __pos__ adjoint alpha_dropout atleast_1d atleast_2d atleast_3d broadcast_tensors
    broadcast_to chunk conj diagonal dsplit expand feature_alpha_dropout feature_dropout flatten
    hsplit linalg_diagonal meshgrid movedim moveaxis narrow permute positive ravel real reshape
    resolve_conj resolve_neg select slice split split_with_sizes squeeze sum_to_size swapaxes
    swapdims t tensor_split to_dense transpose unbind unflatten unfold unsafe_chunk unsafe_split
    unsqueeze view view_as view_as_real vsplit
"""
MAY_RETURN_VIEW = _VIEWS.split()


class Propagation(NamedTuple):
    """The state of one propagation of derivatives through a function."""

    firsts: int
    pairs: Pairs
    jets: "list[weakref.ref[Any]]"  # all Jets that were made
    detached: list[tuple[Tensor, int]]  # tensors detached from Jets, with their versions
    changed: list[tuple[int, ...]]  # under torch.compile, the row shapes of changed tensors


class _Thread(threading.local):
    def __init__(self) -> None:
        self.propagations: list[Propagation] = []
        # Weak references to plain tensors that became Jets, and their former values.
        self.became_jets: list[tuple[weakref.ref[Tensor], Tensor]] = []


THREAD = _Thread()


def alive(references: Iterable[Callable[[], Any]]) -> list[Any]:
    """The referents that are still alive."""
    referents: list[Any] = []
    for reference in references:
        referent = reference()
        if referent is not None:
            referents.append(referent)
    return referents


def _reference(tensor: Tensor) -> Callable[[], Tensor | None]:
    return (lambda: tensor) if torch.compiler.is_compiling() else weakref.ref(tensor)


def share(source: Any, result: Any) -> Any:
    """Record that the Jet `result` may share memory with the Jet `source`; return `result`."""
    share_value(source, result)
    result.memory = source.memory
    return result


def share_value(source: Any, value: Tensor) -> None:
    """Record that a tensor, such as the result of .detach(), may share memory with a Jet."""
    if source.memory is None:
        source.memory = [_reference(source)]
    source.memory.append(_reference(value))


def detached(source: Any, value: Tensor) -> Tensor:
    """Record a value that was detached from a Jet, with its version; return the value."""
    share_value(source, value)
    for propagation in THREAD.propagations[-1:]:
        propagation.detached.extend((value, version) for version in versions([value]))
    return value


def write(jet: Any, stack: Tensor) -> Any:
    """Replace a Jet's stack; raise an error if another tensor may share the Jet's memory."""
    if checkpoint_hook("_recomputation_hook") is not None and jet.changed:
        raise DerivativeError(CHANGED_ARGUMENT)
    if checkpoint_hook() is not None:
        jet.changed = True
    if jet.memory is not None and len(alive(jet.memory)) > 1:
        raise TaylorError(IN_USE)
    if torch.compiler.is_compiling():
        THREAD.propagations[-1].changed.append(tuple(stack.shape[2:]))
    jet.stack, jet.memory = stack, None
    return jet


def end(propagation: Propagation) -> None:
    """Turn each Jet that the function kept into a plain tensor.

    Raises TaylorError if a detached tensor was changed in place.
    """
    jets = alive(propagation.jets)
    for jet in jets:
        jet.memory = None  # weak references would prevent a swap of tensors
    propagation.jets.clear()
    # Older PyTorch would swap even a tensor that a checkpoint saved, and crash on recomputation.
    for jet in jets if TELLS_HOOKS else ():
        with suppress(RuntimeError):  # a Jet that a checkpoint saved is still needed as a Jet
            swap(jet, jet.stack[0])
    for value, version in propagation.detached:
        if versions([value]) != [version]:
            raise TaylorError("an in-place change of a detached tensor. Put .clone() before it.")


def to_tensor(count: int, finished: bool) -> None:
    """Turn tensors that became Jets, except the first `count`, back into plain tensors.

    The plain tensors receive the new values only if the call finished without an error.
    """
    while len(THREAD.became_jets) > count:
        reference, plain = THREAD.became_jets.pop()
        jet: Any = reference()
        if jet is None:
            continue
        del reference
        jet.memory = None
        value = jet.stack[0]
        swap(jet, plain)
        if finished:
            jet.copy_(value)


def to_jet(tensor: Tensor, jet: Any) -> None:
    """Turn a plain tensor into a Jet in place."""
    refused = "values that depend on x are written in place to a plain tensor that shares memory."
    leaf = tensor.requires_grad and tensor.is_leaf
    if torch.compiler.is_compiling() or leaf or tensor._base is not None:
        raise TaylorError(refused)
    for propagation in THREAD.propagations[-1:]:
        propagation.jets[:] = [made for made in propagation.jets if made() is not jet]
    try:
        if has_alias(tensor):  # under torch.func, this cannot be known
            raise TaylorError(refused)
        swap(tensor, jet)
    except RuntimeError as error:
        raise TaylorError(refused) from error
    THREAD.became_jets.append((weakref.ref(tensor), jet))


# ----------------------------------------------------------------------------------- recomputation
Some = Tensor | None
Function = Callable[..., Any]
Needed = Sequence[bool]


def with_recomputation(
    function: Function,
    *tensors: Some,
    pullbacks: Sequence[Function] = (),
    again: Function | None = None,
    by_result: bool = False,
) -> Tensor:
    """Evaluate a function, keeping either its arguments or its result for the backward passes.

    Args:
        function: a function of the tensors, without side effects, that returns one tensor.
        tensors: its arguments.
        pullbacks: the first argument of every pullback specifies which gradients are needed; any
            other gradient may be None. The first pullback is also passed the tensors and a
            cotangent. It returns the gradients of `function` with respect to all tensors; for
            an argument that is None, the gradient is None. Each further pullback differentiates
            the first result of the pullback before it. Beyond the last pullback, autograd computes
            the gradients.
        again: a version of the function for repeated differentiation, for example under
            torch.func. If None, `function` is used.
        by_result: whether the result, instead of the arguments, is kept and passed to the
            pullbacks.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> with_recomputation(lambda x: x.sin().cos(), x).sum().backward()
        >>> x.grad.shape
        torch.Size([3])
    """
    again = again or function
    if is_traced():
        return _as_tuple(again(*tensors))[0]
    results: Any = _Recomputed.apply((function, again, pullbacks, by_result), *tensors)
    return results[0]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, functions: Sequence[Any], *tensors: Some) -> tuple[Tensor, ...]:
        function, *_, by_result = functions
        results = _as_tuple(function(*tensors))
        ctx.functions = functions
        ctx.save_for_backward(*(results if by_result else tensors))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Some) -> tuple[Some, ...]:
        saved = ctx.saved_tensors  # a checkpoint allows reading them only once
        needed = needed_gradients(ctx, saved)
        places = [place for place, c in enumerate(cotangents) if c is not None]
        function, again, pullbacks, _ = ctx.functions
        further: Sequence[Function] = ()
        if pullbacks and places == [0]:
            pull_back: Function = partial(_pull_back_needed, pullbacks[0], needed)
            further = pullbacks[1:] if needed[0] else ()
        else:
            pull_back = partial(_by_autograd, function, again, needed, places)
        everything = (*saved, *[cotangents[place] for place in places])
        evaluate = pull_back
        if torch.is_grad_enabled():
            evaluate = partial(_Recomputed.apply, (pull_back, pull_back, further, False))
        gradients: Any = evaluate(*everything)
        values = iter(gradients)
        return None, *[next(values) if need else None for need in needed]


def needed_gradients(ctx: Any, tensors: Sequence[Some]) -> list[bool]:
    """Return, for each of `tensors`, whether this backward pass needs its gradient.

    `tensors` correspond to the last arguments of the autograd.Function. `ctx.needs_input_grad`
    does not suffice: it is True for weights even if the pass differentiates with respect to x
    only.
    """
    nodes = iter(ctx.next_functions)  # one for each argument that is a tensor
    needed: list[bool] = []
    for tensor, requires_grad in zip(tensors, ctx.needs_input_grad[-len(tensors) :], strict=True):
        node = None if tensor is None else next(nodes)[0]
        needed.append(requires_grad and will_run(node))
    return needed


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _pull_back_needed(pullback: Function, needed: Needed, *everything: Some) -> tuple[Any, ...]:
    return tuple(compress(_as_tuple(pullback(needed, *everything)), needed))


def _by_autograd(
    function: Function,
    again: Function,
    needed: Needed,
    places: Sequence[int],
    *everything: Some,
) -> tuple[Tensor, ...]:
    """Return the needed gradients of a function; the results in `places` have cotangents."""
    tensors, cotangents = everything[: len(needed)], everything[len(needed) :]
    tracked = torch.is_grad_enabled()
    with torch.enable_grad():
        # Detached, because one of the tensors may have been computed from another.
        points: list[Any] = [
            tensor
            if tensor is None or (tracked and (tensor.requires_grad or not need))
            else tensor.detach().requires_grad_(need)
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        results = _as_tuple((again if tracked else function)(*points))
        wanted = list(compress(points, needed))
        outputs = [(results[place], c) for place, c in zip(places, cotangents, strict=True)]
        # Leave out results that depend on no tensor, such as the gradient with respect to a bias.
        outputs = [(output, c) for output, c in outputs if output.requires_grad]
        if not outputs:
            return tuple(map(torch.zeros_like, wanted))
        return torch.autograd.grad(
            [output for output, _ in outputs],
            wanted,
            [c for _, c in outputs],
            create_graph=tracked,
            materialize_grads=True,
        )
