"""Each private name and matched text of PyTorch, with the versions in which it was seen to hold.

A test that fails after an upgrade of PyTorch names what to change in `_torch_internals` or
`_torch_errors`.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._functorch import config as functorch_config
from torch.func import grad, jvp, vjp, vmap
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from hosm_losses import _torch_errors
from hosm_losses import _torch_internals as internals
from hosm_losses._checks import may_look
from tests.oracles import CountCalls, OnceDifferentiable
from tests.versions import tells_hooks

ONES = torch.ones(2)
ASKED = []
plain_checkpoint = partial(checkpoint, use_reentrant=False)
contexts = partial(create_selective_checkpoint_contexts, [])
selective = partial(plain_checkpoint, context_fn=contexts)


def leaf(*shape):
    return torch.ones(shape or 2, requires_grad=True)


class Forgets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, cotangent):
        return ctx.kept * cotangent


class Asked(torch.autograd.Function):
    """The sum of two tensors, that tells of which the gradient is needed."""

    @staticmethod
    def forward(ctx, x, y):
        ASKED.append(internals.in_custom_function())
        return x + y

    @staticmethod
    def backward(ctx, cotangent):
        ASKED.append([internals.will_run(node) for node, _ in ctx.next_functions])
        return cotangent, cotangent


class Kind(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise ArithmeticError("reached")


class Loud(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise ArithmeticError


# What PyTorch says. 2.6 to 2.13, but for donated memory and indices: 2.13.
def once_and_again(function, x=None):
    """Two backward passes through one graph."""
    x = leaf() if x is None else x
    value = function(x).sum()
    torch.autograd.grad(value, x, retain_graph=True)
    torch.autograd.grad(value, x)


def twice(function, x=None):
    x = leaf() if x is None else x
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


def attend(x):
    return F.scaled_dot_product_attention(*[x[:, None, None] * torch.ones(2, 1, 4, 2)] * 3).sin()


class Layer(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


def compiled_by_itself():
    layer = Layer(2, 2)
    assert getattr(layer, internals.COMPILED_PART) is None
    layer.compile(backend="aot_eager")
    assert getattr(layer, internals.COMPILED_PART) is not None
    twice(lambda x: layer(x * torch.ones(1, 2)))


def donated():
    compiled = torch.compile(lambda x: x.sin().exp().cos(), backend="aot_eager", dynamic=True)
    with functorch_config.patch(donated_buffer=True):
        once_and_again(compiled, leaf(3))


def doubled(x):
    return x * 2


def in_script():
    torch.jit.script(doubled)(torch.Tensor._make_wrapper_subclass(Kind, (2,)))


def changed_since():
    kept = torch.ones(2)
    value = (leaf() * kept).sum()
    kept += 1
    value.backward()


def made_in_inference():
    with torch.inference_mode():
        x = torch.ones(2)
    x * leaf()


HALF, SINGLE, AT = torch.float16, torch.float32, torch.tensor([1.5, 2.0])
SAID = {
    "NOT_TWICE": [
        lambda: twice(lambda x: torch.cdist(x.sin()[None, None], torch.ones(1, 3, 2)).sin()),
        lambda: twice(lambda x: attend(x.sin())),
    ],
    "NO_FORWARD": [lambda: jvp(attend, (ONES,), (ONES,))],
    "REENTRANT_CHECKPOINT": [
        lambda: once_and_again(lambda x: checkpoint(torch.sin, x, use_reentrant=True))
    ],
    "HOOKS_IN_TRANSFORM": [lambda: grad(lambda x: plain_checkpoint(torch.sin, x).sum())(ONES)],
    "DOUBLE_BACKWARD_OF_COMPILED": [compiled_by_itself],
    "DONATED_BY_COMPILED": [donated],
    "CHANGED_SINCE": [changed_since],
    "LOST_ATTRIBUTE": [lambda: once_and_again(Forgets.apply)],
    "IN_SCRIPT": [in_script],
    "MADE_IN_INFERENCE": [made_in_inference],
    "OF_DTYPES": [
        lambda: F.linear(torch.ones(2, 2), torch.ones(2, 2, dtype=SINGLE)),
        lambda: torch.matmul(torch.ones(2, 2, dtype=HALF), torch.ones(2, 2)),
        lambda: F.layer_norm(torch.ones(2, 2), (2,), torch.ones(2, dtype=HALF)),
        lambda: torch.einsum("ij,jk->ik", torch.ones(2, 2), torch.ones(2, 2, dtype=SINGLE)),
    ],
    "OF_INDICES": [
        lambda: nn.Embedding(5, 3)(AT),
        lambda: torch.ones(5, 3)[AT],
        lambda: torch.ones(5, 3).gather(0, AT[:, None]),
        lambda: F.one_hot(AT, 5),
        lambda: [torch.ones(5)[each] for each in AT.tolist()],
    ],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=pytest.mark.slow) if "COMPILED" in each else each for each in SAID],
)
def test_what_pytorch_says_is_known(name):
    words = getattr(_torch_errors, name)
    words = (words,) if isinstance(words, str) else words
    for function in SAID[name]:
        with pytest.raises((RuntimeError, IndexError, AttributeError)) as error:
            function()
        assert any(each in str(error.value) for each in words)


def test_transforms_are_seen_and_what_is_inside_them():
    """torch._C._functorch: peek_interpreter_stack, get_interpreter_stack, TransformType,

    get_unwrapped and is_functorch_wrapped_tensor; storage()._cdata: 2.13.
    """
    found, other = [], torch.ones(2)

    def look(x):
        assert internals.share_memory(x, x.mT)
        assert not internals.share_memory(x, x + 1)
        assert not internals.in_transform(other)
        assert internals.transformed() == internals.traced() == internals.in_transform(x)
        assert may_look(x) == (x.is_cpu and not internals.transformed())
        seen = internals.transformed(), internals.vmapped(), internals.differentiated()
        found.append("".join("-x"[each] for each in seen))
        return x.sum()

    x, unasked = torch.ones(2, 2), torch.no_grad()(look)
    look(x)
    look(torch.ones(2, 2, device="meta"))
    jvp(look, (x,), (x,))
    vmap(look)(x[None])
    vjp(look, x)
    torch.no_grad()(grad(look))(x)
    grad(unasked)(x)
    vmap(grad(look))(x[None])
    assert found == ["---", "---", "x--", "xx-", "x-x", "x-x", "x--", "xxx"]


def test_batches_of_gradients_are_seen():
    """torch._C._functorch.is_legacy_batchedtensor: 2.13."""
    x, seen = leaf(), []
    value = x * 2
    value.register_hook(lambda cotangent: seen.append(internals.batched([cotangent])))
    for batched in (False, True):
        ones = torch.ones(3, 2) if batched else torch.ones(2)
        torch.autograd.grad(value, x, ones, retain_graph=True, is_grads_batched=batched)
    assert seen == [False, True]


def test_operators_are_found_by_name_and_those_of_packages_told_apart():
    """torch.ops.aten, OpOverload.name, and _dispatch_has_kernel_for_dispatch_key: 2.13."""
    aten = torch.ops.aten
    assert {aten.linalg_det, aten.linalg_det.default} <= set(internals.operators("det"))
    assert internals.operators("no_such_operator") == []
    library = torch.library.Library("hosm_internals", "DEF")
    library.define("own(Tensor x) -> Tensor")
    library.define("composed(Tensor x) -> Tensor")
    library.impl("composed", torch.sin, "CompositeImplicitAutograd")
    own, composed = torch.ops.hosm_internals.own, torch.ops.hosm_internals.composed
    assert internals.of_a_package(own.default)
    assert internals.of_a_package(own)
    for other in (composed.default, aten.add.Tensor, aten.add, torch.sin, torch.Tensor.sin):
        assert not internals.of_a_package(other)


def profiler():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@pytest.mark.parametrize(
    "around",
    [BaseTorchFunctionMode, CountCalls, profiler, pytest.param(hooks, marks=tells_hooks)],
)
def test_what_surrounds_a_call_is_seen(around):
    """The stacks of modes and the profiler's flag: 2.6 to 2.13; the saved-tensor hooks: 2.13."""
    assert not internals.surrounded()
    with around():
        assert internals.surrounded()
    assert not internals.surrounded()


@tells_hooks
def test_the_hooks_of_a_checkpoint_are_told_from_others():
    """_top_saved_tensors_default_hooks, _checkpoint_hook and _recomputation_hook: 2.13.

    _CachingTorchDispatchMode and _get_dispatch_stack_at, of a selective one: 2.13.
    """
    found = []

    def look(x):
        kinds = "_checkpoint_hook", internals.ANY_CHECKPOINT
        seen = [internals.checkpoint_hook(kind) is not None for kind in kinds]
        found.append((*seen, internals.selective_checkpoint()))
        return x * x

    plain_checkpoint(look, leaf()).sum().backward()
    for around in (nullcontext, hooks, partial(FlopCounterMode, display=False)):
        with around():
            look(leaf())
    selective(look, leaf())
    none = (False, False, False)
    computed, again = (True, True, False), (False, True, False)
    assert found == [computed, again, none, none, none, (True, True, True)]


def test_custom_functions_are_told_from_operators_and_so_are_their_gradients():
    """_forward_cls, BackwardHookFunction, torch::autograd::Error: 2.6 to 2.13.

    torch.autograd.grad passes by the error of what is marked once_differentiable.
    """
    x = leaf()
    once = OnceDifferentiable.apply(x)
    assert internals.custom_function(once.grad_fn) is OnceDifferentiable
    assert internals.custom_function(x.sin().grad_fn) is None
    layer = nn.Linear(2, 2)
    layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    nodes = internals.graph_nodes([layer(leaf(1, 2))])
    assert [*map(internals.custom_function, nodes)].count(internals.MODULE_HOOK) == 2
    twice(lambda x: OnceDifferentiable.apply(x.sin()).sin())
    (lost,) = torch.autograd.grad(once.sin().sum(), x, create_graph=True)
    assert internals.has_graph(x * 2)
    assert not internals.has_graph(lost)
    assert not internals.has_graph(x.detach())


def test_what_a_backward_pass_needs_and_the_forward_of_a_custom_function_are_told():
    """torch._C._will_engine_execute_node: 2.6 to 2.13. A leaf that is asked for is an error.

    torch._C._is_fwd_grad_enabled and forward_ad._set_fwd_grad_enabled: 2.13.
    """
    x, y = leaf(), leaf()
    inner = x * 2
    total = Asked.apply(inner, y).sum()
    for inputs in ([x], [inner], [y], [x, y]):
        torch.autograd.grad(total, inputs, retain_graph=True)
    total.backward()
    with torch.no_grad():
        Asked.apply(inner, y)
    needed = [[True, False]] * 2 + [[False, True]] + [[True, True]] * 2
    assert [True, *needed, True] == ASKED
    ASKED.clear()
    for block in (nullcontext, torch.no_grad, torch.inference_mode):
        with block():
            assert not internals.in_custom_function()
    with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
        assert internals.in_custom_function()
        with internals.forward_mode_on():
            assert not internals.in_custom_function()


def test_a_shell_has_a_shape_and_no_data():
    """_make_wrapper_subclass: 2.6 to 2.13."""
    stack = torch.zeros(3, 2, 5, dtype=torch.float32).transpose(1, 2)
    found = internals.shell(Kind, stack)
    assert type(found) is Kind
    assert (found.shape, found.dtype, found.stride()) == ((5, 2), torch.float32, (1, 5))
    with pytest.raises(ArithmeticError):
        found.sin()


def test_changes_in_place_are_counted_and_other_tensors_with_the_memory_seen():
    """_version: 2.6 to 2.13; torch._C._storage_Use_Count: 2.13."""
    x = torch.zeros(2)
    before = internals.versions([x, x])
    x.add_(1)
    assert internals.versions([x, x]) == [each + 1 for each in before]
    seen = [x.detach()]
    assert internals.has_alias(x)
    seen.clear()
    product = x * leaf()
    assert not internals.has_alias(x)
    assert not internals.has_alias(product)


def test_nested_containers_are_flattened_and_built_again():
    """torch.utils._pytree: 2.6 to 2.13."""
    flat, form = internals.pytree.tree_flatten({"a": [1, (2, None)], "b": 3})
    assert internals.pytree.tree_unflatten(flat, form) == {"a": [1, (2, None)], "b": 3}
    assert internals.pytree.tree_map_only(int, lambda x: 2 * x, [1, ("a",)]) == [2, ("a",)]


def test_no_function_of_a_subclass_is_asked():
    """torch._C.DisableTorchFunctionSubclass, also around torch.utils.swap_tensors: 2.13."""
    x, y = torch.ones(2).as_subclass(Loud), torch.zeros(3)
    with internals.without_subclasses():
        assert torch.add(x, 1).sum() == 4
    with pytest.raises(ArithmeticError):
        torch.add(x, 1)
    internals.swapped(x, y)
    assert (type(x), type(y)) == (torch.Tensor, Loud)
