"""What an evaluation of a network leaves behind, and how it is taken back.

A network in training may update its buffers (statistics and counters of batch norm) and draws
random numbers. An attempt that came to nothing, or a second evaluation of the same samples, must
leave neither trace.
"""

__all__ = ["Snapshot"]

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class Snapshot:
    """The buffers of a network and the state of torch's generators, to be restored.

    A network that is no Module, nor a method of one, has no buffers to be seen.

    Args:
        network: the network.
        x: its input, for the device.
    """

    def __init__(self, network: object, x: Tensor) -> None:
        owner = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
        modules = owner.modules() if isinstance(owner, nn.Module) else ()
        with torch.no_grad():
            self.buffers = [
                (module, name, buffer, buffer.clone())
                for module in modules
                for name, buffer in module.named_buffers(recurse=False)
            ]
        self.device_type = x.device.type
        # Inside a CUDA graph the state cannot be asked for.
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        self.generators = None if captured else (torch.get_rng_state(), get_device_states(x))

    def restore(self, *, generators: bool = True) -> None:
        """Put the buffers back, and the generators unless they are to stay where they are."""
        with torch.no_grad():
            for module, name, buffer, value in self.buffers:
                setattr(module, name, buffer)
                buffer.copy_(value)
        if generators and self.generators is not None:
            state, (devices, states) = self.generators
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=self.device_type)
