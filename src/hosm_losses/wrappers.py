"""Wrappers around a network that its higher derivatives cannot pass, and what to wrap instead."""

__all__ = ["refuse_wrapped"]

import sys

from torch import nn

_WRAP_THE_LOSS = (
    "Wrap the loss module as a whole, whose forward then holds every use of a parameter: "
    "{}(ThirdOrderDSM(ScoreModel(network, schedule))). Around the network, or parts of it, "
    "gradients fail or differ between ranks in silence."
)
# By name, so that nothing of torch.distributed is imported for it.
WRAPPERS = {
    "DistributedDataParallel": _WRAP_THE_LOSS.format("DistributedDataParallel"),
    "FullyShardedDataParallel": _WRAP_THE_LOSS.format("FullyShardedDataParallel"),
    "FSDPModule": _WRAP_THE_LOSS.format("fully_shard"),
    "DataParallel": _WRAP_THE_LOSS.format("DistributedDataParallel"),
    "OptimizedModule": (
        "A compiled network has no second derivative. Compile the loss module in its place: "
        "torch.compile(ThirdOrderDSM(ScoreModel(network, schedule)))."
    ),
}


def refuse_wrapped(network: object) -> None:
    """Raise where a wrapper in or around the network stands in the way of higher derivatives.

    Args:
        network: what a ScoreModel holds.

    Raises:
        TypeError: for a network wrapped by DDP, compiled by itself, or with parts that FSDP shards
            by themselves.
    """
    kinds = {kind.__name__ for kind in type(network).__mro__}
    # Nothing is sharded where the package that does it was never imported.
    if "torch.distributed.fsdp" in sys.modules and isinstance(network, nn.Module):
        kinds |= {kind.__name__ for part in network.modules() for kind in type(part).__mro__}
    for name in sorted(kinds & WRAPPERS.keys()):
        raise TypeError(
            f"network: expected a bare network for orders two and three; got {name}. "
            f"{WRAPPERS[name]}"
        )
