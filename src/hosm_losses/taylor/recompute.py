r"""A function of a few tensors whose backward passes keep its arguments and nothing else.

Autograd keeps what every operator of a composition needs. An elementwise rule of the Taylor engine
is a handful of operators on tensors as large as the activations; keeping all of that would cost
several times the memory of the network itself. Here the function is evaluated again when a
gradient is asked for. The gradient is such a function of the arguments and the cotangents, and so
on to any order.

Under torch.compile and the transforms of torch.func the function is evaluated as it stands: they
decide themselves what to keep.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor._torch import is_traced, will_run

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
    """The value of a function, of which only the arguments are kept for the backward passes.

    Args:
        function: of the tensors, without side effects; returns one tensor.
        tensors: its arguments.
        pullbacks: the first, of the tensors and a cotangent, returns the gradients of `function`
            in all of them, None for one that is None. It is told before them of which gradients
            are asked for, and may return None for the others. The second is that of the first
            result of the first, and so on. Where there is none, autograd finds the gradients.
        again: the same function, for where it is differentiated more than once, as a transform
            may do; `function` if None.
        by_result: whether the result is kept in place of the arguments, and given to the pullbacks
            in their place.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> with_recomputation(lambda x: x.sin().cos(), x).sum().backward()
        >>> x.grad.shape
        torch.Size([3])
    """
    again = again or function
    if is_traced():
        return _as_tuple(again(*tensors))[0]
    found: Any = _Recomputed.apply((function, again, pullbacks, by_result), *tensors)
    return found[0]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, functions: Sequence[Any], *tensors: Some) -> tuple[Tensor, ...]:
        function, *_, by_result = functions
        found = _as_tuple(function(*tensors))
        ctx.functions = functions
        ctx.save_for_backward(*(found if by_result else tensors))
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *cotangents: Some) -> tuple[Some, ...]:
        saved = ctx.saved_tensors  # once, as a checkpoint allows
        needed = needed_gradients(ctx, saved)
        results = [place for place, c in enumerate(cotangents) if c is not None]
        function, again, pullbacks, _ = ctx.functions
        further: Sequence[Function] = ()
        if pullbacks and results == [0]:
            gradients: Function = partial(_chosen, pullbacks[0], needed)
            further = pullbacks[1:] if needed[0] else ()
        else:
            gradients = partial(_by_autograd, function, again, needed, results)
        everything = (*saved, *[cotangents[place] for place in results])
        evaluate = gradients
        if torch.is_grad_enabled():
            evaluate = partial(_Recomputed.apply, (gradients, gradients, further, False))
        found: Any = evaluate(*everything)
        values = iter(found)
        return None, *[next(values) if need else None for need in needed]


def needed_gradients(ctx: Any, tensors: Sequence[Some]) -> list[bool]:
    """Of which tensors, the last arguments of a Function, this backward pass needs the gradient.

    A pass back to x alone needs none of the weights', which a Function is not told.
    """
    nodes = iter(ctx.next_functions)  # of those that are tensors
    needed: list[bool] = []
    for tensor, requires_grad in zip(tensors, ctx.needs_input_grad[-len(tensors) :], strict=True):
        node = None if tensor is None else next(nodes)[0]
        needed.append(requires_grad and will_run(node))
    return needed


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def _chosen(pullback: Function, needed: Needed, *everything: Some) -> tuple[Any, ...]:
    """The gradients that are needed, of those that a pullback returns."""
    return tuple(compress(_as_tuple(pullback(needed, *everything)), needed))


def _by_autograd(
    function: Function,
    again: Function,
    needed: Needed,
    results: Sequence[int],
    *everything: Some,
) -> tuple[Tensor, ...]:
    """The gradients that are needed, of tensors and the cotangents of some results."""
    tensors, cotangents = everything[: len(needed)], everything[len(needed) :]
    tracked = torch.is_grad_enabled()
    with torch.enable_grad():
        # Without a graph of their own: one of the tensors may be made of another.
        points: list[Any] = [
            tensor
            if tensor is None or (tracked and (tensor.requires_grad or not need))
            else tensor.detach().requires_grad_(need)
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        found = _as_tuple((again if tracked else function)(*points))
        wanted = list(compress(points, needed))
        outputs = [(found[place], c) for place, c in zip(results, cotangents, strict=True)]
        outputs = [(each, c) for each, c in outputs if each.requires_grad]  # as a bias's is not
        if not outputs:
            return tuple(map(torch.zeros_like, wanted))
        return torch.autograd.grad(
            [each for each, _ in outputs],
            wanted,
            [c for _, c in outputs],
            create_graph=tracked,
            materialize_grads=True,
        )
