"""Evaluations of a network of whose graph no activation stays.

What:
    torch's checkpoint of a function that takes a gradient itself keeps all that this gradient had
    no use for. Here nothing stays: what a pass back asks for is made again, for one evaluation of
    a call at a time. Values and gradients are the same.
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
from hosm_losses.derivatives import Snapshot


class RecomputedEvaluations:
    """The evaluations of one call, the latest of which has its saved tensors."""

    def __init__(self, network: object) -> None:
        self.network, self.refused, self.running = network, False, False
        self.latest: Callable[[], _Evaluation | None] = lambda: None

    def due(self) -> bool:
        """Whether an evaluation that begins here is to be made again in a pass back."""
        return torch.is_grad_enabled() and not (self.running or self.refused or is_traced())

    def __call__(self, function: Callable[[], Any], x: Tensor) -> Any:
        """Evaluate a function of nothing on the device of x."""
        evaluation = _Evaluation(self, function, x)
        try:
            return evaluation.first()
        except RuntimeError as error:
            if HOOKS_IN_TRANSFORM not in str(error):
                raise
            self.refused = True  # by torch.func inside of the network: all activations stay
            evaluation.before.restore()
            return function()


class _Evaluation:
    def __init__(
        self, checkpoints: RecomputedEvaluations, function: Callable[[], Any], x: Tensor
    ) -> None:
        self.checkpoints, self.function, self.x = checkpoints, function, x
        self.before, kind = Snapshot(None, x), x.device.type
        self.autocast: Any = nullcontext
        if torch.amp.is_autocast_available(kind):
            given: dict[str, Any] = {"enabled": torch.is_autocast_enabled(kind)}
            given["dtype"] = torch.get_autocast_dtype(kind)
            self.autocast = partial(torch.autocast, kind, **given)
        self.saved: dict[int, Tensor] = {}

    def first(self) -> Any:
        result, saved = self._run()
        self.count = len(saved)
        saved.clear()
        return result

    def _run(self) -> tuple[Any, dict[int, Tensor]]:
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> int:
            saved[len(saved)] = tensor.detach()
            return len(saved) - 1

        def unpack(index: int) -> Tensor:  # for a gradient in the function, or in a pass back
            return saved[index] if index in saved else self._unpack(index)

        self.checkpoints.running = True
        try:
            with saved_tensors_hooks(pack, unpack):
                return self.function(), saved
        finally:
            self.checkpoints.running = False

    def _unpack(self, index: int) -> Tensor:
        if index not in self.saved:
            latest = self.checkpoints.latest()
            if latest is not None:
                latest.saved = {}
            self.checkpoints.latest = weakref.ref(self)
            now = Snapshot(self.checkpoints.network, self.x)
            self.before.restore()
            with torch.enable_grad(), self.autocast():
                _, self.saved = self._run()
            now.restore()
            if len(self.saved) != self.count:
                raise DerivativeError(
                    "network: expected the same evaluation in a pass back as before; got one that "
                    f"saves {len(self.saved)} tensors in place of {self.count}. Leave the network "
                    "as it is between the likelihood and its gradient."
                )
        return self.saved.pop(index)
