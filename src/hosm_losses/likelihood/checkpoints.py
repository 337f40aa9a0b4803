"""Network evaluations that are repeated in the backward pass.

Purpose:
    If `torch.utils.checkpoint` is applied to a function that itself computes a gradient, every
    saved tensor that this gradient does not use stays in memory. This module keeps no activations
    after an evaluation, unless the network uses `torch.func`. Instead, the backward pass
    recomputes the activations of one evaluation at a time. Values and gradients are unchanged.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hosm_losses._checks import DerivativeError
from hosm_losses._torch_internals import HOOKS_IN_TRANSFORM, is_traced
from hosm_losses.derivatives import NetworkState


class RecomputedEvaluations:
    """The evaluations in one `Job`; only the most recently recomputed one keeps activations."""

    def __init__(self, network: object) -> None:
        self.network, self.refused, self.is_inside = network, False, False
        self.latest: Callable[[], RecomputedEvaluation | None] = lambda: None

    def applies(self) -> bool:
        """Return whether a new evaluation will be recomputed; nested evaluations never are."""
        return torch.is_grad_enabled() and not (self.is_inside or self.refused or is_traced())

    def evaluate(self, function: Callable[[], Any], x: Tensor) -> Any:
        """Return the result of function(), which runs on the device of x; keep no activations."""
        evaluation = RecomputedEvaluation(self, function, x)
        try:
            result, saved = evaluation.run()
        except RuntimeError as error:
            if HOOKS_IN_TRANSFORM not in str(error):
                raise
            # The network uses torch.func, which rejects hooks, so all activations are kept.
            self.refused = True
            evaluation.before.restore()
            return function()
        evaluation.saved_count = len(saved)
        saved.clear()
        return result


class RecomputedEvaluation:
    """One evaluation, the state needed to repeat it, and the tensors saved when it is repeated."""

    def __init__(
        self, evaluations: RecomputedEvaluations, function: Callable[[], Any], x: Tensor
    ) -> None:
        self.evaluations, self.function, self.x = evaluations, function, x
        self.before, device = NetworkState(None, x), x.device.type
        self.autocast: Any = nullcontext
        if torch.amp.is_autocast_available(device):
            options: dict[str, Any] = {"enabled": torch.is_autocast_enabled(device)}
            options["dtype"] = torch.get_autocast_dtype(device)
            self.autocast = partial(torch.autocast, device, **options)
        self.saved_count = 0
        self.recomputed: dict[int, Tensor] = {}

    def run(self) -> tuple[Any, dict[int, Tensor]]:
        """Return the result of function(), and a dict of the tensors that autograd saved."""
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> int:
            saved[len(saved)] = tensor.detach()
            return len(saved) - 1

        def unpack(index: int) -> Tensor:
            # A gradient computed inside the function finds the tensors; a later backward pass
            # has to recompute them.
            return saved[index] if index in saved else self.recompute(index)

        self.evaluations.is_inside = True
        try:
            with saved_tensors_hooks(pack, unpack):
                return self.function(), saved
        finally:
            self.evaluations.is_inside = False

    def recompute(self, index: int) -> Tensor:
        """Return a saved tensor and remove it from `recomputed`; it is needed only once."""
        if index not in self.recomputed:
            latest = self.evaluations.latest()
            if latest is not None:
                latest.recomputed = {}
            self.evaluations.latest = weakref.ref(self)
            now = NetworkState(self.evaluations.network, self.x)
            self.before.restore()
            with torch.enable_grad(), self.autocast():
                _, self.recomputed = self.run()
            now.restore()
            if len(self.recomputed) != self.saved_count:
                raise DerivativeError(
                    "network: expected the backward pass to repeat the evaluation; got one that "
                    f"saves {len(self.recomputed)} tensors instead of {self.saved_count}. Do not "
                    "change the network between the likelihood and its gradient."
                )
        return self.recomputed.pop(index)
