"""Out of torch.inference_mode, which forbids all derivatives, and with it tensors made in it."""

__all__ = ["normal", "outside_inference_mode"]

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def outside_inference_mode() -> AbstractContextManager[None]:
    """Leave torch.inference_mode, which forbids all derivatives, with gradients off as before."""
    # torch.compile of PyTorch 2.6 follows no generator in a with statement.
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return _left()


@contextmanager
def _left() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def normal(tensor: Tensor) -> Tensor:
    """Copy a tensor made in inference mode, so that autograd can save it; return any other."""
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return tensor.clone()
    return tensor
