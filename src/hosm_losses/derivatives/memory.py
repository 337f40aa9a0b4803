"""What is remembered of a network, as long as it lives."""

import weakref
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Memory:
    """What is remembered of a network.

    Attributes:
        refused: why an engine could not take a call, by the engine and the kind of call.
        said: of each warning that reverse mode takes over, whether third="laplacian" was asked.
        orders: those, of 2 and 3, at which nothing more is to be said of derivatives that jump.
    """

    refused: dict[tuple[str, tuple[Any, ...]], str] = field(default_factory=dict)
    said: set[bool] = field(default_factory=set)
    orders: set[int] = field(default_factory=set)


_MEMORIES: "weakref.WeakKeyDictionary[Any, Memory]" = weakref.WeakKeyDictionary()


def refusal(owner: object, order: int) -> str | None:
    """Why the taylor engine could not take a call of this order, None where none is remembered."""
    for (engine, kind), why in memory_of(owner).refused.items():
        if engine == "taylor" and kind[0] == order:
            return why
    return None


def memory_of(owner: object) -> Memory:
    """What is remembered of a network; nothing, if it cannot be referred to weakly, or hashed."""
    try:
        return _MEMORIES.setdefault(owner, Memory())
    except TypeError:
        return Memory()
