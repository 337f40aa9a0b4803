"""Out of torch.inference_mode, which forbids all derivatives, and with it tensors made in it."""

__all__ = ["normal", "outside_inference_mode"]

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave torch.inference_mode, which forbids all derivatives, with gradients off as before."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def normal(tensor: Tensor) -> Tensor:
    """Copy a tensor made in inference mode, so that autograd can save it; return any other."""
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return tensor.clone()
    return tensor
