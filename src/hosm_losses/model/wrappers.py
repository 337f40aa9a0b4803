"""Wrappers around a network that its higher derivatives cannot pass, and what to wrap instead."""

__all__ = ["refuse_wrapped"]

import sys

from torch import nn

from hosm_losses._torch_internals import COMPILED_PART

_WRAP_THE_LOSS = (
    "Wrap the loss module as a whole, whose forward then holds every use of a parameter: "
    "{}(ThirdOrderDSM(ScoreModel(network, schedule))). Around the network, or parts of it, "
    "gradients fail or differ between ranks in silence."
)
_TAKE_IT_OUT = (
    "Give model.module, the network inside, in its place: ScoreModel(model.module, schedule) or "
    "from_score_sde(model.module, sde); its parameters are the same. For several devices: "
)
_COMPILE_THE_LOSS = (
    "What is compiled by itself has no second derivative. Compile the loss module in its place: "
    "torch.compile(ThirdOrderDSM(ScoreModel(network, schedule)))."
)
COMPILED_IN_PLACE = "a part compiled by its own .compile()"
# By name, so that nothing of torch.distributed is imported for it.
WRAPPERS = {
    "DistributedDataParallel": _WRAP_THE_LOSS.format("DistributedDataParallel"),
    "FullyShardedDataParallel": _WRAP_THE_LOSS.format("FullyShardedDataParallel"),
    "FSDPModule": _WRAP_THE_LOSS.format("fully_shard"),
    "DataParallel": _TAKE_IT_OUT + _WRAP_THE_LOSS.format("DistributedDataParallel"),
    "OptimizedModule": _COMPILE_THE_LOSS,
    COMPILED_IN_PLACE: _COMPILE_THE_LOSS,
}

WRAPPER_MODULES = {"torch.distributed.fsdp", "torch._dynamo"}


def refuse_wrapped(network: object, *, thoroughly: bool = False) -> None:
    """Raise where a wrapper in or around the network stands in the way of higher derivatives.

    Args:
        network: what a ScoreModel holds.
        thoroughly: whether to look at every part also where nothing suggests a wrapper: once, not
            at every step.

    Raises:
        TypeError: for a network wrapped by DDP, or with parts that are compiled or that FSDP
            shards by themselves.
    """
    types = {type(network)}
    found = set()
    # Nothing is sharded or compiled where the package that does it was never imported.
    if isinstance(network, nn.Module) and (thoroughly or sys.modules.keys() & WRAPPER_MODULES):
        for part in network.modules():
            types.add(type(part))
            if getattr(part, COMPILED_PART, None) is not None:
                found.add(COMPILED_IN_PLACE)
    found |= {base.__name__ for kind in types for base in kind.__mro__} & WRAPPERS.keys()
    for name in sorted(found):
        raise TypeError(
            f"network: expected a bare network for orders two and three; got {name}. "
            f"{WRAPPERS[name]}"
        )
