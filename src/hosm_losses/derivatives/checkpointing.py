"""Activation checkpointing inside a network that a loss differentiates."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hosm_losses._checks import DerivativeError
from hosm_losses._torch_internals import pytree, versions
from hosm_losses.taylor import CHANGED_ARGUMENT, Jet, recomputable

# Arguments that are passed on to torch's checkpoint.
ITS_OWN = ("preserve_rng_state", "determinism_check", "debug", "early_stop")


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Activation checkpointing inside a network that is trained with a loss of order two or three.

    This function calls `torch.utils.checkpoint.checkpoint` with use_reentrant=False, and works
    with both engines. The reverse engine replaces some of PyTorch's operators with safe
    primitives, whose double backward is correct; the recomputation uses them too. With torch's own
    checkpoint it would not, so the reverse engine raises an error around such an operator.

    Args:
        function: a part of the network.
        args: the positional arguments of `function`.
        kwargs: the keyword arguments of `function`. In addition, `preserve_rng_state`,
            `determinism_check`, `debug` and `early_stop` are passed on to torch's checkpoint, and
            `use_reentrant` is accepted but has no effect.

    Returns:
        The result of `function`.

    Raises:
        DerivativeError: if `function` changes an argument in place, because the recomputation
            would start from the changed argument.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 3)
        >>> checkpoint(layer, torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    kwargs.pop("use_reentrant", None)
    own = {name: kwargs.pop(name) for name in ITS_OWN if name in kwargs}
    flat, form = pytree.tree_flatten((args, kwargs))
    jets = [place for place, entry in enumerate(flat) if isinstance(entry, Jet)]
    if not jets:
        tensors = [entry for entry in flat if isinstance(entry, Tensor)]
        before = versions(tensors)
        result = recomputable(function, *args, **kwargs, **own)
        if versions(tensors) != before:
            raise DerivativeError(CHANGED_ARGUMENT)
        return result
    # `like` holds no Jet, because Jets have become plain tensors by the time of the backward pass.
    like = partial(Jet.make, firsts=flat[jets[0]].firsts, pairs=flat[jets[0]].pairs)
    shape: list[Any] = []

    # A Jet is passed as its stack, so that another checkpoint around the loss, or an offload of
    # activations to the host, saves plain tensors.
    def on_stacks(*entries: Any) -> tuple[Any, ...]:
        inputs: list[Any] = list(entries)
        for place in jets:
            inputs[place] = like(entries[place])
        its_args, its_kwargs = pytree.tree_unflatten(inputs, form)
        leaves, tree = pytree.tree_flatten(function(*its_args, **its_kwargs))
        if any(inputs[place].stack is not entries[place] for place in jets):
            raise DerivativeError(CHANGED_ARGUMENT)
        shape[:] = tree, [isinstance(leaf, Jet) for leaf in leaves]
        return tuple(leaf.stack if isinstance(leaf, Jet) else leaf for leaf in leaves)

    stacks = [entry.stack if place in jets else entry for place, entry in enumerate(flat)]
    del flat, args, kwargs
    outputs = recomputable(on_stacks, *stacks, **own)
    tree, is_jet = shape
    leaves = [like(leaf) if jet else leaf for leaf, jet in zip(outputs, is_jet, strict=True)]
    return pytree.tree_unflatten(leaves, tree)
