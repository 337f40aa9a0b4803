"""The batch in parts, each computed again when its gradient is asked for.

What:
    The forward pass evaluates one part of the batch after the other and keeps no graph; the
    backward pass evaluates each part again, with its graph, and adds up the gradients. So the
    memory is that of one part, and the cost one more evaluation of the loss without its gradient.
    The gradients go to the parameters of the network and to the given tensors, once each, so that
    DistributedDataParallel sees what it sees without parts.

Source:
    Chen et al., "Training deep nets with sublinear memory cost" (2016).
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hosm_losses._checks import DerivativeError, complaint
from hosm_losses._torch_internals import autocast_of_now, graph_nodes, transformed
from hosm_losses.derivatives import Snapshot

Terms = tuple[Tensor, ...]
# Networks of which every parameter that they use is their own.
_WHOLE: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def in_chunks(
    function: Callable[..., Terms],
    chunks: int,
    network: object,
    tensors: Sequence[Tensor],
    batch: int,
) -> Terms:
    """Evaluate function(slice, *tensors) in `chunks` parts of the batch, put together to (B,).

    `tensors` and the parameters of the network are all that may need a gradient: a parameter that
    is neither raises DerivativeError in the backward pass.
    """
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
    return _Chunked.apply(call, *tensors, *network.parameters())  # pyright: ignore[reportReturnType]


class _Call:
    """A function of parts, and the state in which each part was evaluated."""

    def __init__(
        self, function: Callable[..., Terms], parts: list[slice], network: nn.Module, given: int
    ) -> None:
        self.function, self.parts, self.network, self.given = function, parts, network, given
        # Of each part, before it was evaluated: what puts autocast back, and all else.
        self.states: list[tuple[Callable[[], AbstractContextManager[object]], Snapshot]] = []

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
        found = [call.first(part, leaves[: call.given]) for part in call.parts]
        return tuple(torch.cat(terms) for terms in zip(*found, strict=True))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        leaves: tuple[Tensor, ...] = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        totals: list[Tensor | None] = [None] * len(leaves)
        places = [place for place, need in enumerate(needed) if need]
        for number, part in enumerate(call.parts):
            # A parameter is used by the network itself; a tensor is given, as a leaf of its own.
            points = [
                leaf.detach().requires_grad_(need) if place < call.given else leaf
                for place, (leaf, need) in enumerate(zip(leaves, needed, strict=True))
            ]
            with call.again(number, points) as terms:
                _check_leaves(call.network, terms, points)
                found = torch.autograd.grad(
                    terms,
                    [points[place] for place in places],
                    [cotangent[part] for cotangent in cotangents],
                    allow_unused=True,
                )
            for place, gradient in zip(places, found, strict=True):
                if gradient is not None:
                    total = totals[place]
                    totals[place] = gradient if total is None else total + gradient
        return None, *totals


def _check_leaves(network: nn.Module, terms: Terms, points: list[Tensor]) -> None:
    """Stop where a parameter would be left without its gradient; looked for once."""
    if network in _WHOLE:
        return
    known = {id(point) for point in points}
    for node in graph_nodes(terms):
        variable = getattr(node, "variable", None)
        # Other leaves are the engines' own.
        if isinstance(variable, nn.Parameter) and id(variable) not in known:
            raise DerivativeError(
                "chunks: expected every trained parameter to be one of the network or among the "
                f"arguments of the loss; got another, of shape {tuple(variable.shape)}. Register "
                "it, pass it in model_kwargs, or leave chunks at 1."
            )
    _WHOLE.add(network)
