"""The batch in parts, each computed again when its gradient is asked for.

What:
    The forward pass evaluates one part of the batch after the other and keeps no graph; the
    backward pass evaluates each part again, with its graph, and adds up the gradients. So the
    memory is that of one part, and the cost one more evaluation of the loss without its gradient.
    The gradients go to the parameters of the network, to the given tensors and to all other leaves
    in the graph of the first part, once each, so that DistributedDataParallel and hooks see what
    they see without parts.

Source:
    Chen et al., "Training deep nets with sublinear memory cost" (2016).
"""

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses._checks import DerivativeError, complaint, living
from hosm_losses._torch_internals import (
    autocast_of_now,
    gradient_node,
    graph_nodes,
    transformed,
    without_hooks,
)
from hosm_losses.derivatives import Snapshot

Terms = tuple[Tensor, ...]


def in_chunks(
    function: Callable[..., Terms],
    chunks: int,
    network: object,
    tensors: Sequence[Tensor],
    batch: int,
) -> Terms:
    """Evaluate function(slice, *tensors) in `chunks` parts of the batch, put together to (B,)."""
    captured = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or captured or transformed():
        where = "in a CUDA graph" if captured else "under torch.compile and torch.func"
        raise ValueError(
            f"chunks: expected 1 {where}, where the state of a generator cannot be kept; got "
            f"{chunks}. Split the batch and accumulate gradients instead."
        )
    if not isinstance(network, nn.Module):
        expected = "a network that is an nn.Module, whose parameters are known"
        raise TypeError(complaint("chunks", expected, network))
    size = -(-batch // min(chunks, batch))
    parts = [slice(start, min(start + size, batch)) for start in range(0, batch, size)]
    call = _Call(function, parts, network, len(tensors))
    others = call.begin(tensors)
    return _Chunked.apply(call, *tensors, *call.leaves, *others)  # pyright: ignore[reportReturnType]


class _Call:
    """A function of parts, and the state in which each part was evaluated."""

    def __init__(
        self, function: Callable[..., Terms], parts: list[slice], network: nn.Module, given: int
    ) -> None:
        self.function, self.parts, self.network, self.given = function, parts, network, given
        self.own = list(network.parameters())
        # What FSDP puts in the place of parameters are views of a leaf, which is found in a graph.
        self.leaves = [each for each in self.own if each.is_leaf]
        # Of each part, before it was evaluated: what puts autocast back, and all else.
        self.states: list[tuple[Callable[[], AbstractContextManager[object]], Snapshot]] = []

    def begin(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the first part; returns the leaves in its graph that are not known yet.

        As of a schedule that is learned, or a module that the network refers to.
        """
        points = [each.detach().requires_grad_(each.requires_grad) for each in tensors]
        terms = self.first(self.parts[0], points)
        self.begun = tuple(term.detach() for term in terms)
        leaves = [weakref.ref(leaf) for leaf in _unknown(terms, [*points, *self.leaves])]
        del terms  # and with it the leaves that the part made
        return living(leaves)

    def first(self, part: slice, tensors: Sequence[Tensor]) -> Terms:
        """Evaluate a part, and keep the state of generators, autocast and buffers before it."""
        autocast = autocast_of_now(tensors[0].device.type)
        before = Snapshot(self.network, *tensors)
        terms = self.function(part, *tensors)
        self.states.append((autocast, before.changed()))
        return terms

    @contextmanager
    def again(self, number: int, points: Sequence[Tensor]) -> Iterator[Terms]:
        """A part with its graph, evaluated in its first state; then that of now returns.

        Not sooner than the graph is used, which may have kept the buffers.
        """
        autocast, first = self.states[number]
        if not all(map(operator.is_, self.own, self.network.parameters())):
            raise DerivativeError(
                "chunks: expected the network to have the parameters of the forward pass in the "
                "backward pass, which evaluates it again; got others, as of functional_call. "
                "Leave chunks at 1."
            )
        before = Snapshot(self.network, *points)
        try:
            first.restore()
            with torch.enable_grad(), autocast():
                terms = self.function(self.parts[number], *points[: self.given])
            yield terms
        finally:
            before.restore()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *leaves: Tensor) -> Terms:
        ctx.call = call
        ctx.save_for_backward(*leaves)
        rest = [call.first(part, leaves[: call.given]) for part in call.parts[1:]]
        found = [call.begun, *rest]
        return tuple(torch.cat(terms) for terms in zip(*found, strict=True))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # By once_differentiable it would be an error where a cotangent has a graph, alone.
            raise DerivativeError(
                "chunks: expected a gradient that is not differentiated again; got "
                "create_graph=True, for which no graph is kept. Leave chunks at 1."
            )
        call: _Call = ctx.call
        leaves: tuple[Tensor, ...] = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        totals: list[Tensor | None] = [None] * len(leaves)
        places = [place for place, need in enumerate(needed) if need]
        for number, part in enumerate(call.parts):
            # A leaf is used by the network itself; a tensor is given, as a leaf of its own.
            points = [
                leaf.detach().requires_grad_(need) if place < call.given else leaf
                for place, (leaf, need) in enumerate(zip(leaves, needed, strict=True))
            ]
            with call.again(number, points) as terms, without_hooks(points[call.given :]):
                missed = [
                    weakref.ref(leaf)
                    for leaf in _unknown(terms, points)
                    if isinstance(leaf, nn.Parameter)  # others are the engines' own
                ]
                # Others are constant, as the third of a network that is linear in x.
                moved = [place for place, term in enumerate(terms) if term.requires_grad]
                found: Sequence[Tensor | None] = [None] * len(places)
                if moved:
                    _refuse_frozen([points[place] for place in places])
                    found = torch.autograd.grad(
                        [terms[place] for place in moved],
                        [points[place] for place in places],
                        [cotangents[place][part] for place in moved],
                        # Other leaves may be behind a graph that all parts go through.
                        retain_graph=len(points) > call.given + len(call.leaves),
                        allow_unused=True,
                    )
            del terms  # and with them the parameters that the part made
            _refuse(living(missed))
            for place, gradient in zip(places, found, strict=True):
                if gradient is not None:
                    total = totals[place]
                    totals[place] = gradient if total is None else total + gradient
        return None, *totals


def _unknown(terms: Terms, known: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves in the graph of a part that are none of those known."""
    # By their nodes: of a leaf that a checkpoint has kept there is another tensor.
    nodes = {gradient_node(each) for each in known if each.requires_grad}
    for node in graph_nodes(terms):
        if node not in nodes and hasattr(node, "variable"):
            yield node.variable


def _refuse_frozen(leaves: Sequence[Tensor]) -> None:
    """Raise where a parameter was trained in the forward pass and is not now."""
    for leaf in leaves:
        if not leaf.requires_grad:
            raise DerivativeError(
                "chunks: expected parameters that require a gradient as they did in the forward "
                "pass, which is evaluated again; got one of shape "
                f"{tuple(leaf.shape)} that no longer does. Freeze it after loss.backward()."
            )


def _refuse(missed: Sequence[Tensor]) -> None:
    """Raise where a parameter would be left without its gradient."""
    for leaf in missed:
        raise DerivativeError(
            "chunks: expected parameters outside the network to be used by every part of the "
            f"batch; got one of shape {tuple(leaf.shape)} that the first part does not use. "
            "Register it in the network, or leave chunks at 1."
        )
