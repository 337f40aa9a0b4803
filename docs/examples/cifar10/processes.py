"""The processes that torchrun started, and the signal that asks them to stop."""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Processes:
    """This process, either alone or among the processes that torchrun started."""

    def __init__(self) -> None:
        self.many = "RANK" in os.environ
        cuda = torch.cuda.is_available()
        if self.many:
            dist.init_process_group("nccl" if cuda else "gloo")
        self.rank = dist.get_rank() if self.many else 0
        self.count = dist.get_world_size() if self.many else 1
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)

    def mean(self, values: torch.Tensor) -> list[float]:
        """Return the mean over all processes, as Python numbers."""
        values = values.double().to(self.device)
        if self.many:
            dist.all_reduce(values)
        return (values / self.count).tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return sum(self.mean(torch.tensor([float(flag)]))) > 0

    def merged(self, texts: dict[int, str]) -> dict[int, str]:
        """Return the dicts of all processes, merged into one."""
        if not self.many:
            return texts
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, texts)
        return {row: text for part in gathered for row, text in part.items()}

    def check_same_weights(self, network: nn.Module) -> None:
        """Raise RuntimeError if the networks of the processes have diverged."""
        total = sum(weight.detach().double().abs().sum() for weight in network.parameters())
        (mean,) = self.mean(total.reshape(1).clone())
        if self.many and abs(mean - float(total)) > 1e-9 * abs(mean):
            raise RuntimeError(
                f"expected the same weights in all processes; got a sum of {float(total)} in "
                f"process {self.rank} and of {mean} on average. Continue from the last checkpoint."
            )

    def close(self) -> None:
        """Leave the process group together."""
        if self.many:
            gc.collect()  # DDP holds the group in a reference cycle
            dist.barrier()
            dist.destroy_process_group()


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, instead of ending the process."""
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
