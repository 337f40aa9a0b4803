"""The rule for all functions that have none: torch.func.jvp, with the safe primitives in place."""

from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor import aliases
from hosm_losses.taylor._torch import pytree, share_memory, versions
from hosm_losses.taylor.along import along
from hosm_losses.taylor.errors import TaylorError
from hosm_losses.taylor.forward_mode import WRONG, wrong_in_forward_mode
from hosm_losses.taylor.hooks import GIVE_THE_SOURCE, ScriptedError
from hosm_losses.taylor.jet import CHANGES, COMPLEX, Jet
from hosm_losses.taylor.primitive_mode import safe_primitives
from hosm_losses.taylor.primitives import PRIMITIVES
from hosm_losses.taylor.table import WITHOUT_RULE, name_of, rule

SCRIPTED = "network: expected modules that Python calls; got one of torch.jit. " + GIVE_THE_SOURCE


@rule(WITHOUT_RULE, several=True)
def differentiated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Differentiate a function without a rule by torch.func.jvp, in one evaluation of it."""
    if isinstance(func, torch.ScriptMethod):
        raise ScriptedError(SCRIPTED)
    flat, form = pytree.tree_flatten((args, kwargs))
    places = [place for place, entry in enumerate(flat) if isinstance(entry, Jet)]
    jets: list[Jet] = [flat[place] for place in places]
    if wrong_in_forward_mode(func, args, kwargs):
        raise TaylorError(f"{name_of(func)}: {WRONG}")
    seen: list[Any] = []
    sources: dict[int, Jet] = {}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(flat)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        given, named = pytree.tree_unflatten(filled, form)
        with safe_primitives():
            seen[:] = pytree.tree_flatten(func(*given, **named))
        for place, leaf in enumerate(seen[0]):
            for jet, value in zip(jets, values, strict=True):
                if isinstance(leaf, Tensor) and share_memory(leaf, value):
                    sources[place] = jet
        if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in seen[0]):
            raise TaylorError(f"{name_of(func)}: {COMPLEX}")
        # One result at least, where the function returns no tensor.
        found = tuple(leaf for leaf in seen[0] if isinstance(leaf, Tensor))
        return found or (values[0].new_zeros(()),)

    # Copies, whose versions show a change in place.
    values = tuple(jet.stack[0].clone() for jet in jets)
    # A primitive changes statistics in place.
    plain = [each for each in flat if isinstance(each, Tensor) and not isinstance(each, Jet)]
    watched = (*values, *([] if func in PRIMITIVES else plain))
    before = versions(watched)
    # torch.func writes to what it is given, which elements in one place do not allow.
    derivatives = tuple(
        jet.stack[1:].contiguous() if 0 in jet.stack.stride() else jet.stack[1:] for jet in jets
    )
    stacks = iter(along(function, values, derivatives, jets[0].firsts, jets[0].pairs))
    if versions(watched) != before:
        raise TaylorError(f"{name_of(func)}: {CHANGES}")
    leaves, tree = seen
    found = [jets[0].of(next(stacks)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    if name_of(func) in aliases.PERHAPS_VIEWS:
        sources = dict.fromkeys(range(len(found)), jets[0])
    for place, jet in sources.items():
        aliases.share(jet, found[place])
    return pytree.tree_unflatten(found, tree)
