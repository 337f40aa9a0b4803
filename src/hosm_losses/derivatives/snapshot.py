"""What a failed attempt to differentiate a network may have changed, to be put back."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from hosm_losses._checks import DerivativeError
from hosm_losses._torch_internals import in_transform, versions


class _Kept(NamedTuple):
    """A buffer, and what it was."""

    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor
    version: list[int]

    @property
    def is_changed(self) -> bool:
        """Whether it was changed in place, or may have been: in inference mode none is told."""
        return not self.version or versions([self.buffer]) != self.version


class Snapshot:
    """The buffers of a network and the state of torch's generators, to be restored.

    Of a network that is no Module, nor a method of one, no buffers are seen. `x` are its inputs,
    for the devices.
    """

    def __init__(self, network: object, *x: Tensor) -> None:
        owner = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
        modules = owner.modules() if isinstance(owner, nn.Module) else ()
        with torch.no_grad():
            self.buffers = [
                _Kept(module, name, buffer, buffer.clone(), versions([buffer]))
                for module in modules
                for name, buffer in module.named_buffers(recurse=False)
            ]
        self.device_type = x[0].device.type
        # Inside a CUDA graph the state cannot be asked for.
        captured = x[0].is_cuda and torch.cuda.is_current_stream_capturing()
        self.generators = None if captured else (torch.get_rng_state(), get_device_states(*x))

    def changed(self) -> "Snapshot":
        """Keep of the buffers those that are others now, or have been changed."""
        self.buffers = [
            k for k in self.buffers if k.is_changed or getattr(k.module, k.name) is not k.buffer
        ]
        return self

    def refuse_escaped(self) -> None:
        """Raise where forward mode left a tensor of its own in a buffer, which is put back."""
        for each in self.buffers:
            if in_transform(getattr(each.module, each.name)):
                self.restore(generators=False)
                raise DerivativeError(
                    f"network: expected buffers that do not depend on x; got {each.name} of "
                    f"{type(each.module).__name__}, which is given a tensor that may, and forward "
                    "mode lets none out. Leave derivative at 'auto', or take 'reverse'."
                )

    def restore(self, *, generators: bool = True) -> None:
        """Put the buffers back, and the generators unless they are to stay where they are."""
        with torch.no_grad():
            for each in self.buffers:
                setattr(each.module, each.name, each.buffer)
                # A graph may have kept one that counts no change, as batch norm does of its own.
                (each.buffer if each.is_changed else each.buffer.data).copy_(each.value)
        if generators and self.generators is not None:
            state, (devices, states) = self.generators
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=self.device_type)
