"""Checks for random network outputs, caused by training mode or by draws in the code."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states

from hosm_losses._checks import warn
from hosm_losses._torch_internals import is_traced
from hosm_losses.derivatives import NetworkState
from hosm_losses.taylor import refuse_constants

TRAINING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
TRAINING += (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TRAINING += (nn.FeatureAlphaDropout, nn.RReLU, nn.MultiheadAttention)


@contextmanager
def buffers_restored(modules: Mapping[str, nn.Module], x: Tensor) -> Iterator[None]:
    """Return a context manager that restores a network's buffers, such as running statistics."""
    may_change = any(part.training and part._buffers for part in modules.values())
    before = NetworkState(modules[""], x) if may_change and not is_traced() else None
    try:
        yield
    finally:
        if before is not None:
            before.restore(generators=False)


def warn_of_training_mode(modules: Mapping[str, nn.Module]) -> bool:
    """Warn if a module's training mode affects likelihoods, and return whether one does."""
    for name, part in modules.items():
        if not part.training or not isinstance(part, TRAINING):
            continue
        # The dropout probability of a dropout layer or of an attention layer.
        if getattr(part, "p", getattr(part, "dropout", 1)) > 0:
            warn(
                "network: expected evaluation mode, as after model.eval(); got "
                f"{name or 'the network'}, a {type(part).__name__} in training mode. Its results "
                "are random or mix samples."
            )
            return True
    return False


class FirstEvaluation:
    """Checks in a network's first evaluation, such as whether the network draws random numbers.

    No list of random layers can be complete, because a network may drop labels, layers or words in
    its own code. However, every random draw in torch advances one of torch's generators.

    Operators without a derivative are rejected only in the first evaluation with a divergence.
    Checking for such operators in every evaluation would take a quarter of a small network's run
    time.
    """

    def __init__(self, *, look_for_draws: bool, look_for_constants: bool) -> None:
        checks = {"draws": look_for_draws, "constants": look_for_constants}
        self.due = {check for check, wanted in checks.items() if wanted}

    def refusing_constants(self, differentiates: bool) -> AbstractContextManager[Any]:
        """Return a context manager that, once only, rejects operators without a derivative."""
        if not (differentiates and "constants" in self.due):
            return nullcontext()
        self.due.remove("constants")
        return refuse_constants()

    def before(self, x: Tensor) -> list[Tensor]:
        """Return generator states of the CPU and of x's device, or [] if no check is due."""
        # Inside a CUDA graph, the states cannot be read.
        if "draws" not in self.due or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return []
        return [torch.get_rng_state(), *get_device_states(x)[1]]

    def compare(self, before: list[Tensor], x: Tensor) -> None:
        """Warn if the first evaluation, at the points x, advanced a generator."""
        after = self.before(x)
        self.due.discard("draws")
        if not all(map(torch.equal, before, after)):
            warn(
                "network: expected an output that depends on its input alone; got one that draws "
                "random numbers, as dropout does in training mode. Call model.eval() first, and "
                "look for code that draws random numbers in any mode. If a divergence of your own "
                "draws, pass DivergenceFunction(function, is_random=True)."
            )
