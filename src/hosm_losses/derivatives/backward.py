r"""Passes back through a network, and what they say where the graph is lost.

What:
    A network may cut the graph: by .detach(), or by a custom autograd.Function whose backward
    returns gradients without one. Values computed by a second pass back would then be wrong, so
    every loss is noticed when it happens and is an error with its remedy.
"""

__all__ = ["LOST_TWICE", "DroppedGraphError", "explained", "pull_back", "refuse_dropped"]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from hosm_losses._checks import DerivativeError
from hosm_losses._torch_internals import (
    DOUBLE_BACKWARD_OF_COMPILED,
    HOOKS_IN_TRANSFORM,
    LOST_ATTRIBUTE,
    REENTRANT_CHECKPOINT,
    custom_function,
    has_graph,
)
from hosm_losses.derivatives.primitive_mode import CHECKPOINT_ADVICE, FORWARD_ADVICE

LOST_ONCE = (
    "network: expected an output that autograd can differentiate in x; got one whose graph does "
    "not lead to x. Remove .detach(), .data or torch.no_grad() from its forward."
)
LOST_TWICE = (
    "network: expected a derivative that autograd can differentiate again; got one without "
    "a graph. A custom autograd.Function in it has a backward that is once_differentiable or "
    "detaches: write it with differentiable operators, or use derivative='forward' if it has a "
    "jvp."
)
COMPILED = (
    "network: expected one that is not compiled by itself; got a compiled part, which cannot be "
    "differentiated twice. Compile the loss module as a whole in its place, with "
    "derivative='auto' or 'forward': torch.compile(ThirdOrderDSM(ScoreModel(network, schedule)))."
)
DROPPED = (
    "network: expected an autograd.Function whose backward keeps the graph; got {}, whose "
    "backward is once_differentiable or detaches, so that second derivatives through it would be "
    "lost in silence. Write its backward with differentiable operators. If it is a checkpoint, "
    "put hosm_losses.checkpoint in its place; in guided-diffusion, whose attention always calls "
    "it, set guided_diffusion.nn.checkpoint and guided_diffusion.unet.checkpoint to "
    "lambda f, i, p, flag: hosm_losses.checkpoint(f, *i) if flag else f(*i)."
)
EXPLAINED = {
    REENTRANT_CHECKPOINT: CHECKPOINT_ADVICE,
    HOOKS_IN_TRANSFORM: FORWARD_ADVICE,
    DOUBLE_BACKWARD_OF_COMPILED: COMPILED,
}


class DroppedGraphError(DerivativeError):
    """A custom autograd.Function whose backward drops the graph; forward mode may not call it."""


def refuse_dropped(value: Tensor, wanted: bool = True) -> None:
    """Make a pass back from `value` raise where a custom Function drops a graph that it was given.

    That is a node whose incoming gradient requires a gradient while no gradient that it returns
    does. `wanted` says whether that pass will have a graph at all.
    """
    if not wanted or torch.compiler.is_compiling():
        return
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = custom_function(node)
        if function is not None:
            node.register_hook(partial(_check_kept, function.__name__))
        nodes.extend(parent for parent, _ in node.next_functions)


def _check_kept(name: str, returned: Sequence[Any], incoming: Sequence[Any]) -> None:
    given = [each for each in returned if isinstance(each, Tensor)]
    lost = given and not any(map(has_graph, given))
    if (
        lost
        and torch.is_grad_enabled()
        and any(isinstance(each, Tensor) and each.requires_grad for each in incoming)
    ):
        raise DroppedGraphError(DROPPED.format(name))


@contextmanager
def explained() -> Iterator[None]:
    """Give the remedy with what is raised by parts that cannot be differentiated again."""
    try:
        yield
    except torch.utils.checkpoint.CheckpointError as error:
        raise DerivativeError(CHECKPOINT_ADVICE) from error
    except RuntimeError as error:
        for words, advice in EXPLAINED.items():
            if words in str(error):
                raise DerivativeError(advice) from error
        raise
    except AttributeError as error:
        # A custom Function that drops what it saved after its first backward.
        if LOST_ATTRIBUTE in str(error):
            raise DerivativeError(f"{LOST_TWICE} ({error})") from error
        raise


def pull_back(
    value: Tensor,
    x: Tensor,
    cotangents: Tensor,
    *,
    create_graph: bool = True,
    lost: str = LOST_ONCE,
) -> Tensor:
    """(∂f/∂x)ᵀ c for each of K cotangents (K, B, *): at once by vmap, or where that fails in turn.

    A custom autograd.Function whose backward vmap cannot follow can still be called K times.
    """
    if not value.requires_grad:
        raise DerivativeError(lost)

    def back(cotangent: Tensor, batched: bool = False) -> Tensor:
        (pulled,) = torch.autograd.grad(
            value,
            x,
            cotangent,
            create_graph=create_graph,
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
        )
        if pulled is None:
            raise DerivativeError(lost)
        return pulled

    if len(cotangents) == 1:
        return back(cotangents[0]).unsqueeze(0)
    try:
        return back(cotangents, batched=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # what is wrong without vmap as well is raised again
        pass
    return torch.stack([back(cotangent) for cotangent in cotangents])
