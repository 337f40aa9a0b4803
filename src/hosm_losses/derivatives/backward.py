r"""Backward passes through a network, and the errors raised if the graph is lost.

Purpose:
    A network may cut the graph, either through .detach() or through a custom autograd.Function
    whose backward returns gradients without a graph. A second backward pass would then give wrong
    values, so every cut immediately raises an error that names the remedy.

    The graph of a derivative with respect to x ends at the engine's own copy of x. If the graph
    has no other leaf, for example because all parameters are frozen, there is nothing to train.
    The engine then returns tensors without a graph, and PyTorch raises its usual error when a loss
    computed from these tensors is differentiated.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from hosm_losses import _torch_internals as internals
from hosm_losses._checks import DerivativeError
from hosm_losses.taylor import CHECKPOINT_ADVICE, ScriptedError, check_unchanged

PassBack = Callable[..., tuple[Tensor, ...]]  # maps a cotangent to one gradient per point
LOST_ONCE = (
    "network: expected a graph from the output to x; got none. Remove .detach(), .data and "
    "torch.no_grad() from its forward, and pass create_graph=True wherever it takes a gradient."
)
LOST_TWICE = (
    "network: expected a derivative with a graph; got a derivative without a graph. The backward "
    "of a custom autograd.Function is once_differentiable or detaches: write it with "
    "differentiable operators."
)
COMPILED = (
    "network: expected a network that is not compiled on its own; got a compiled part, which "
    "cannot be differentiated twice. Compile the loss module as a whole, with engine='auto'."
)
FOREIGN_CHECKPOINTS = (
    "Attention in guided-diffusion and latent-diffusion calls its own checkpoint even if "
    "use_checkpoint is False: set `checkpoint` in guided_diffusion.nn and guided_diffusion.unet, "
    "or in ldm.modules.attention, ldm.modules.diffusionmodules.util and "
    "ldm.modules.diffusionmodules.openaimodel, to lambda f, i, p, flag: "
    "hosm_losses.checkpoint(f, *i) if flag else f(*i)."
)
DROPPED = (
    "network: expected an autograd.Function whose backward keeps the graph; got {}, whose "
    "backward is once_differentiable or detaches, so that second derivatives through it would be "
    "silently lost. Write its backward with differentiable operators. If it is a checkpoint, "
    f"replace it with hosm_losses.checkpoint. {FOREIGN_CHECKPOINTS}"
)
CHANGED = (
    "network: expected the tensors that its forward reads to stay unchanged until the backward "
    "pass; got an in-place change, for example of a buffer that is read and then updated. "
    "Assign a new tensor to it, or read its .clone(). If the change is made by a custom "
    "autograd.Function, such as a fast scan or kernel, turn it off."
)
REENTRANT = (
    f"{CHECKPOINT_ADVICE} In a likelihood, torch's checkpoint works with use_reentrant=False."
)
SCRIPTED_FUNCTION = (
    "network: expected plain Python functions; got a torch.jit function, inside which PyTorch "
    "2.6, 2.13 and 2.15 silently get higher derivatives of norms wrong. Use the function that it "
    "was compiled from (PYTORCH_JIT=0 does so for all functions) or, if it contains no norm, "
    "engine='reverse'."
)
EXPLAINED = (CheckpointError, RuntimeError, AttributeError)
REMEDIES = {
    internals.REENTRANT_CHECKPOINT: REENTRANT,
    internals.DOUBLE_BACKWARD_OF_COMPILED: COMPILED,
    internals.CHANGED_SINCE: CHANGED,
    internals.LOST_ATTRIBUTE: LOST_TWICE,
}


class DroppedGraphError(DerivativeError):
    """Raised by either engine if the backward of a custom autograd.Function drops the graph."""


def explain(error: Exception) -> None:
    """Raise a DerivativeError that names the remedy, if this PyTorch error has a known remedy."""
    if isinstance(error, CheckpointError):
        raise DerivativeError(CHECKPOINT_ADVICE) from error
    for words, advice in REMEDIES.items():
        if words in str(error):
            raise DerivativeError(advice) from error


def refuse_scripted(engine: str, error: Exception) -> None:
    """Raise ScriptedError if a torch.jit function caused an error in the taylor engine."""
    if engine == "taylor" and internals.IN_SCRIPT in str(error):
        raise ScriptedError(SCRIPTED_FUNCTION) from error


def refuse_dropped(value: Tensor, wanted: bool = True, point: Tensor | None = None) -> bool:
    """Make the backward pass from `value` raise an error if a Function drops the graph.

    A Function that drops the graph receives a gradient that requires grad, but returns only
    gradients that do not require grad. Nodes beyond `point` are not checked; if `wanted` is False,
    no node is checked.

    Returns whether the graph contains a custom Function. If it does, vmap must be avoided, because
    the hooks cannot see what a Function does under vmap.
    """
    watched = False
    if not wanted or torch.compiler.is_compiling():
        return watched
    for node in internals.graph_nodes([value], point):
        function = internals.custom_function(node)
        if function is not None:
            watched = True
            node.register_hook(partial(_check_graph, function.__name__))
        if function is internals.MODULE_HOOK:
            node.register_hook(check_unchanged)
    return watched


def _check_graph(name: str, returned: Sequence[Any], incoming: Sequence[Any]) -> None:
    outgoing = [grad for grad in returned if isinstance(grad, Tensor)]
    wanted = any(isinstance(grad, Tensor) and grad.requires_grad for grad in incoming)
    if not (torch.is_grad_enabled() and wanted and outgoing):
        return
    if not any(map(internals.has_graph, outgoing)):
        raise DroppedGraphError(DROPPED.format(name))


def may_train(value: Tensor, x: Tensor, point: Tensor) -> bool:
    """Whether a value computed at `point`, the engine's copy of x, depends on another leaf."""
    if point is x:
        return True
    point_node = internals.gradient_node(point)
    seen, nodes = {point_node}, [] if value.grad_fn is None else [value.grad_fn]
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is None or node in seen:
                continue
            if type(node) is type(point_node):  # accumulates the gradient of another leaf
                return True
            seen.add(node)
            nodes.append(node)
    return False


def leaf(x: Tensor, wanted: bool = True) -> Tensor:
    """Return the point at which to differentiate: x if it may need a gradient, or else a copy."""
    own = internals.is_traced() or (wanted and x.requires_grad)
    return x if own else x.detach().requires_grad_()


def vjp(
    function: Callable[..., tuple[Tensor, Any]],
    *points: Tensor,
    graph: bool = True,
    lost: str | None = None,
) -> tuple[Tensor, Any, PassBack]:
    """Call a function that returns (value, more); return both and the value's backward pass.

    The backward pass maps a cotangent of the value's shape to one gradient per point; the
    gradients have a graph if `graph` is True. If the value does not depend on a point, the
    gradient with respect to that point is zero. If the value does not depend on the last point and
    `lost` is given, a DerivativeError with the text `lost` is raised instead. Under torch.compile
    and torch.func, the backward pass comes from `torch.func.vjp`.
    """
    if internals.is_traced():
        result: Any = torch.func.vjp(function, *points, has_aux=True)
        value, back, more = result
        return value, more, back
    try:
        with torch.enable_grad():
            value, more = function(*points)
    except EXPLAINED as error:
        explain(error)
        raise
    return value, more, pass_back(value, points, graph, lost)


def pass_back(
    value: Tensor, points: Sequence[Tensor], graph: bool = True, lost: str | None = None
) -> PassBack:
    """Return the backward pass of `vjp` in eager mode, for a value that is already computed."""

    def back(cotangent: Tensor | None, batched: bool = False) -> tuple[Tensor, ...]:
        if lost is not None and not value.requires_grad:
            raise DerivativeError(lost)
        options: Any = {"create_graph": graph, "is_grads_batched": batched}
        try:
            gradients = torch.autograd.grad(
                value, points, cotangent, retain_graph=True, allow_unused=True, **options
            )
        except EXPLAINED as error:
            explain(error)
            raise
        if lost is not None and gradients[-1] is None:
            raise DerivativeError(lost)
        if len(points) == 1 and gradients[0] is not None:
            return gradients
        return tuple(
            torch.zeros_like(point) if gradient is None else gradient
            for point, gradient in zip(points, gradients, strict=True)
        )

    return back


def pull_each(back: PassBack, cotangents: Tensor, in_turn: bool = False) -> Tensor:
    """Apply a backward pass with a single point to K cotangents; return K gradients (K, B, *).

    The backward pass is called under vmap. If vmap fails, as may happen in the backward of a
    custom autograd.Function, K separate calls are made instead.
    """
    in_turn = in_turn or len(cotangents) == 1 or internals.in_functorch()
    # A checkpoint around the loss recomputes the loss here, and vmap would forbid random draws.
    if not in_turn and internals.checkpoint_hook(internals.ANY_CHECKPOINT) is None:
        try:
            return back(cotangents, batched=True)[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an error that does not come from vmap is raised again below
            pass
    return torch.stack([back(cotangent)[0] for cotangent in cotangents])


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a scalar, which are zero for inputs that do not affect it."""
    if not (inputs and value.requires_grad):
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
