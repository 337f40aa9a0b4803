"""The private names of PyTorch that the engine needs and that could change in silence.

A test that fails after an upgrade of PyTorch names what to change in `taylor/_torch.py`. Names
that are gone are an AttributeError in many other tests.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.func import grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from hosm_losses.taylor import _torch
from tests.versions import tells_hooks

plain_checkpoint = partial(checkpoint, use_reentrant=False)
contexts = partial(create_selective_checkpoint_contexts, [])
selective = partial(plain_checkpoint, context_fn=contexts)


def leaf():
    return torch.ones(2, requires_grad=True)


def test_transforms_are_seen():
    """torch._C._functorch.peek_interpreter_stack: 2.13 and 2.15."""
    found = []

    def look(x):
        assert _torch.in_functorch() == _torch.is_traced()
        found.append(_torch.in_functorch())
        return x.sum()

    x = torch.ones(2, 2)
    look(x)
    jvp(look, (x,), (x,))
    vmap(look)(x[None])
    vjp(look, x)
    vmap(grad(look))(x[None])
    assert found == [False, True, True, True, True]


def test_the_text_of_the_error_for_an_operator_without_a_forward_derivative():
    """2.6 to 2.15; of an operator with a kernel for autograd, and of one without."""
    x = torch.ones(3, 2)
    for function in (F.pdist, lambda x: torch.heaviside(x, x)):
        with pytest.raises(NotImplementedError, match=_torch.NO_FORWARD):
            jvp(function, (x,), (x,))


def hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@tells_hooks
def test_the_hooks_of_a_checkpoint_are_told_from_others():
    """_top_saved_tensors_default_hooks, _checkpoint_hook and _recomputation_hook: 2.13 and 2.15.

    _CachingTorchDispatchMode, _CachedTorchDispatchMode and _get_dispatch_stack_at, of a selective
    one: 2.13 and 2.15.
    """
    found = []

    def look(x):
        kinds = "_checkpoint_hook", ("_checkpoint_hook", "_recomputation_hook")
        seen = [_torch.checkpoint_hook(kind) is not None for kind in kinds]
        found.append((*seen, _torch.selective_checkpoint()))
        return x * x

    plain_checkpoint(look, leaf()).sum().backward()
    for around in (nullcontext, hooks, partial(FlopCounterMode, display=False)):
        with around():
            look(leaf())
    selective(look, leaf()).sum().backward()
    none = (False, False, False)
    computed, again = (True, True, False), (False, True, False)
    selected, selected_again = (True, True, True), (False, True, True)
    assert found == [computed, again, none, none, none, selected, selected_again]
