"""Each private name and matched text of PyTorch, with the versions in which it was seen to hold.

A test that fails after an upgrade of PyTorch names what to change in `_torch_internals` or `_torch_errors`.
"""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from hosm_losses import _torch_errors
from hosm_losses import _torch_internals as internals
from hosm_losses._checks import may_look
from tests.oracles import OnceDifferentiable
from tests.versions import tells_hooks


def test_a_transform_is_seen():
    """torch._C._functorch.peek_interpreter_stack: 2.6 to 2.13."""
    seen = []

    def look(x):
        seen.append((internals.transformed(), internals.traced(), may_look(x)))
        return x.sum()

    x = torch.ones(2)
    look(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x[None])
    torch.func.jvp(look, (x,), (x,))
    torch.func.vjp(look, x)
    assert seen == [(False, False, True)] + [(True, True, False)] * 4


def test_which_transforms_surround_a_call_is_seen():
    """torch._C._functorch.get_interpreter_stack and TransformType: 2.13."""
    seen = []

    def look(x):
        seen.append((internals.vmapped(), internals.differentiated()))
        return x.sum()

    def unasked(x):
        with torch.no_grad():
            return look(x)

    x = torch.ones(2)
    look(x)
    torch.func.vmap(look)(x[None])
    torch.func.jvp(look, (x,), (x,))
    with torch.no_grad():
        torch.func.grad(look)(x)
    torch.func.vjp(look, x)
    torch.func.vmap(torch.func.grad(look))(x[None])
    torch.func.grad(unasked)(x)
    plain, inside_both = (False, False), (True, True)
    grads = [(False, True)] * 2
    assert seen == [plain, (True, False), plain, *grads, inside_both, plain]


@pytest.mark.parametrize(
    "look_up",
    [
        nn.Embedding(5, 3),
        lambda t: torch.ones(5, 3)[t],
        lambda t: torch.ones(5, 3).gather(0, t[:, None]),
        lambda t: torch.ones(5).index_select(0, t),
        lambda t: torch.ones(5).take(t),
        lambda t: torch.take_along_dim(torch.ones(5), t),
        lambda t: nn.functional.one_hot(t, 5),
        lambda t: [torch.ones(5)[each] for each in t.tolist()],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_for_indices_are_told(dtype, look_up):
    """2.13."""
    with pytest.raises((RuntimeError, IndexError)) as error:
        look_up(torch.tensor([1.5, 2.0], dtype=dtype))
    assert any(words in str(error.value) for words in _torch_errors.OF_INDICES)


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


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "around",
    [
        Functions,
        Operators,
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.param(
            lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
            marks=tells_hooks,
        ),
    ],
    ids=["functions", "operators", "profiler", "hooks"],
)
def test_what_surrounds_a_call_is_seen(around):
    """The stacks of modes and the profiler's flag: 2.6 to 2.13; the saved-tensor hooks: 2.13."""
    assert not internals.surrounded()
    with around():
        assert internals.surrounded()
    assert not internals.surrounded()


@tells_hooks
def test_the_hook_of_a_checkpoint_is_told_from_others():
    """_top_saved_tensors_default_hooks and _checkpoint_hook: 2.13, not in 2.6."""
    seen = []

    def look(x):
        seen.append(internals.checkpoint_hook())
        return x * x

    x = torch.ones(2, requires_grad=True)
    checkpoint(look, x, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        look(x)
    look(x)
    assert seen[0] is not None
    assert seen[1:] == [None, None]


def test_a_selective_checkpoint_is_told_from_others():
    """_CachingTorchDispatchMode and _get_dispatch_stack_at: 2.13."""
    seen = []

    def look(x):
        seen.append(internals.selective_checkpoint())
        return x * x

    x = torch.ones(2, requires_grad=True)
    checkpoint(look, x, use_reentrant=False)
    with FlopCounterMode(display=False):
        look(x)
        checkpoint(
            look,
            x,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, []),
        )
    assert seen == [False, False, True]


class Forgets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = x
        return x**2

    @staticmethod
    def backward(ctx, grad):
        kept = ctx.kept
        del ctx.kept
        return 2 * kept * grad


def twice(function):
    x = torch.ones(2, requires_grad=True)
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)


def test_a_custom_function_is_told_from_an_operator():
    """_forward_cls: 2.6 to 2.13."""
    x = torch.ones(2, requires_grad=True)
    assert internals.custom_function(OnceDifferentiable.apply(x).grad_fn) is OnceDifferentiable
    assert internals.custom_function(x.sin().grad_fn) is None


def test_what_cannot_be_differentiated_twice_says_so():
    """2.6 to 2.13."""
    heads = torch.ones(1, 1, 4, 2)
    for function in (
        lambda x: torch.cdist(x.sin()[None], torch.ones(3, 2)).sin(),
        lambda x: nn.functional.scaled_dot_product_attention(*[x.sin() * heads] * 3).sin(),
    ):
        with pytest.raises(RuntimeError) as error:
            twice(function)
        assert any(words in str(error.value) for words in _torch_errors.NOT_TWICE)


def test_what_has_no_forward_derivative_says_so():
    """2.6 to 2.13."""
    x = torch.randn(2, 1, 4, 2)
    with pytest.raises(NotImplementedError) as error:
        torch.func.jvp(lambda x: nn.functional.scaled_dot_product_attention(x, x, x), (x,), (x,))
    assert _torch_errors.NO_FORWARD in str(error.value)


def _doubled(x):
    return x * 2


def test_what_a_function_of_torch_jit_raises_says_so():
    """2.6 to 2.13."""

    class Refusing(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise ValueError("refused")

    x = torch.Tensor._make_wrapper_subclass(Refusing, (2,))
    with pytest.raises(RuntimeError) as error:
        torch.jit.script(_doubled)(x)
    assert _torch_errors.IN_SCRIPT in str(error.value)


def test_what_was_made_in_inference_mode_says_so():
    """2.6 to 2.13."""
    with torch.inference_mode():
        x = torch.ones(2)
    with pytest.raises(RuntimeError) as error:
        (x * torch.ones(2, requires_grad=True)).sum()
    assert _torch_errors.MADE_IN_INFERENCE in str(error.value)


def test_a_backward_marked_once_differentiable_is_passed_by():
    """torch::autograd::Error: 2.6 to 2.13."""
    x = torch.ones(2, requires_grad=True)
    twice(lambda x: OnceDifferentiable.apply(x.sin()).sin())
    kept, (lost,) = (
        x * 2,
        torch.autograd.grad(OnceDifferentiable.apply(x.sin()).sum(), x, create_graph=True),
    )
    (once,) = torch.autograd.grad(OnceDifferentiable.apply(x).sin().sum(), x, create_graph=True)
    assert internals.has_graph(kept)
    assert internals.has_graph(lost)
    assert not internals.has_graph(once)
    assert not internals.has_graph(x.detach())


def test_a_function_that_forgets_says_so():
    """2.6 to 2.13."""
    x = torch.ones(2, requires_grad=True)
    number = Forgets.apply(x).sum()
    torch.autograd.grad(number, x, retain_graph=True)
    with pytest.raises(AttributeError, match=_torch_errors.LOST_ATTRIBUTE):
        torch.autograd.grad(number, x)


@pytest.mark.filterwarnings("ignore")
def test_a_reentrant_checkpoint_says_so():
    """2.6 to 2.13."""
    x = torch.ones(2, requires_grad=True)
    value = checkpoint(torch.sin, x, use_reentrant=True)
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(value.sum(), x)
    assert _torch_errors.REENTRANT_CHECKPOINT in str(error.value)


def test_a_checkpoint_under_a_transform_says_so():
    """2.6 to 2.13."""
    with pytest.raises(RuntimeError) as error:
        torch.func.grad(lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum())(
            torch.ones(2)
        )
    assert _torch_errors.HOOKS_IN_TRANSFORM in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_part_compiled_by_itself_says_so():
    """`_compiled_call_impl`, and the words of its second backward pass: 2.6 to 2.13."""

    class Layer(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    layer = Layer(2, 2)
    assert getattr(layer, internals.COMPILED_PART) is None
    layer.compile(backend="aot_eager")
    assert getattr(layer, internals.COMPILED_PART) is not None
    with pytest.raises(RuntimeError) as error:
        twice(lambda x: layer(x * torch.ones(1, 2)))
    assert _torch_errors.DOUBLE_BACKWARD_OF_COMPILED in str(error.value)


def test_what_was_changed_since_says_so():
    """2.6 to 2.13."""
    x = torch.ones(2, requires_grad=True)
    kept = torch.ones(2)
    value = (x * kept).sum()
    kept += 1
    with pytest.raises(RuntimeError, match=_torch_errors.CHANGED_SINCE):
        torch.autograd.grad(value, x)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_part_that_gives_its_memory_away_says_so():
    """2.13."""
    compiled = torch.compile(lambda x: x.sin().exp().cos(), backend="aot_eager", dynamic=True)
    x = torch.ones(3, requires_grad=True)
    with functorch_config.patch(donated_buffer=True), pytest.raises(RuntimeError) as error:
        torch.autograd.grad(compiled(x).sum(), x, retain_graph=True)
    assert _torch_errors.DONATED_BY_COMPILED in str(error.value)


def test_forward_mode_is_one_threads_at_a_time_and_can_be_entered_again():
    order = []
    entered, leave = threading.Event(), threading.Event()

    def other():
        entered.wait()
        with internals.forward_mode():
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with internals.forward_mode(), internals.forward_mode():
        entered.set()
        leave.wait(0.1)
        order.append("mine")
    thread.join()
    assert order == ["mine", "other"]


class Kind(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise ArithmeticError("reached")


ASKED = []


class Asked(torch.autograd.Function):
    """The sum of two tensors, that tells of which the gradient is needed."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y

    @staticmethod
    def backward(ctx, cotangent):
        ASKED.append([internals.will_run(node) for node, _ in ctx.next_functions])
        return cotangent, cotangent


def test_what_a_backward_pass_needs_is_told():
    """torch._C._will_engine_execute_node: 2.6 to 2.13. A leaf that is asked for is an error."""
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    inner = x * 2
    total = Asked.apply(inner, y).sum()
    ASKED.clear()
    for inputs in ([x], [inner], [y], [x, y]):
        torch.autograd.grad(total, inputs, retain_graph=True)
    total.backward()
    Asked.apply(inner.detach(), y).sum().backward()
    assert ASKED == [[True, False]] * 2 + [
        [False, True],
        [True, True],
        [True, True],
        [False, True],
    ]


def test_autocast_is_followed():
    x = torch.ones(2, dtype=torch.float32)
    assert internals.in_autocast(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert internals.in_autocast(x).dtype == torch.bfloat16
        assert internals.in_autocast(x.double()).dtype == torch.float64
        assert internals.in_autocast(x.to("meta")).dtype == torch.float32


def test_a_shell_has_a_shape_and_no_data():
    """_make_wrapper_subclass: 2.6 to 2.13."""
    stack = torch.zeros(3, 2, 5, dtype=torch.float32).transpose(1, 2)
    found = internals.shell(Kind, stack)
    assert type(found) is Kind
    assert (found.shape, found.dtype, found.stride()) == ((5, 2), torch.float32, (1, 5))
    with pytest.raises(ArithmeticError, match="reached"):
        found.sin()


def test_a_change_in_place_is_counted():
    """_version: 2.6 to 2.13."""
    x = torch.zeros(2)
    before = internals.versions([x, x])
    x.add_(1)
    assert internals.versions([x, x]) == [each + 1 for each in before]


def test_nested_containers_are_flattened_and_built_again():
    """torch.utils._pytree: 2.6 to 2.13."""
    given = {"a": [1, (2, None)], "b": 3}
    flat, form = internals.pytree.tree_flatten(given)
    assert flat[:2] == [1, 2]
    assert internals.pytree.tree_unflatten(flat, form) == given
    assert internals.pytree.tree_map(lambda x: 2 * x, [1, (2,)]) == [2, (4,)]
    assert internals.pytree.tree_map_only(int, lambda x: 2 * x, [1, "a"]) == [2, "a"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.functional.linear(x, torch.ones(2, 2, dtype=torch.float32)),
        lambda x: torch.matmul(torch.ones(2, 2, dtype=torch.float16), x),
        lambda x: nn.functional.conv2d(x[None, None], torch.ones(1, 1, 1, 1, dtype=torch.float32)),
        lambda x: nn.functional.layer_norm(x, (2,), torch.ones(2, dtype=torch.float16)),
        lambda x: torch.einsum("ij,jk->ik", x, x.float()),
    ],
)
def test_dtypes_that_do_not_go_together_are_told(function):
    """2.6 to 2.13."""
    with pytest.raises(RuntimeError) as error:
        function(torch.ones(2, 2))
    assert any(words in str(error.value) for words in _torch_errors.OF_DTYPES)


def test_the_forward_of_a_custom_function_is_told_from_no_grad():
    """torch._C._is_fwd_grad_enabled: 2.13."""
    seen = []

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(internals.in_custom_function())
            return x * 2

    x = torch.ones(2, requires_grad=True)
    Own.apply(x)
    seen.append(internals.in_custom_function())
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            seen.append(internals.in_custom_function())
    with torch.no_grad():
        Own.apply(x)
    assert seen == [True, False, False, False, True]


def test_what_shares_memory_is_told():
    """_functorch.get_unwrapped, is_functorch_wrapped_tensor and storage()._cdata: 2.13."""
    seen, plain = [], torch.ones(2)

    def look(x):
        seen.append((internals.share_memory(x, x.mT), internals.share_memory(x, x + 1)))
        seen.append((internals.in_transform(x), internals.in_transform(plain)))
        return x.sum()

    x = torch.ones(2, 2)
    look(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.vmap(torch.func.grad(look))(x[None])
    look(torch.ones(2, 2, device="meta"))
    outside = [(True, False), (False, False)]
    inside = [(True, False), (True, False)]
    assert seen == outside + inside * 2 + outside
    assert not internals.in_transform(None)


def test_another_tensor_with_the_same_memory_is_seen():
    """torch._C._storage_Use_Count: 2.13."""
    x = torch.zeros(3)
    assert not internals.has_alias(x)
    seen = x.detach()
    assert internals.has_alias(x)
    del seen
    assert not internals.has_alias(x)
    product = x * torch.ones(3, requires_grad=True)
    assert not internals.has_alias(x)
    assert not internals.has_alias(product)


def test_the_node_of_a_modules_hook_is_known():
    """torch.nn.modules._functions.BackwardHookFunction: 2.13."""
    layer = nn.Linear(2, 2)
    layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    output = layer(torch.ones(1, 2, requires_grad=True))
    functions = [internals.custom_function(node) for node in internals.graph_nodes([output])]
    assert functions.count(internals.MODULE_HOOK) == 2


def test_no_function_of_a_subclass_is_asked():
    """torch._C.DisableTorchFunctionSubclass: 2.13."""

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError

    x = torch.ones(2).as_subclass(Loud)
    with internals.without_subclasses():
        assert torch.add(x, 1).sum() == 4
    with pytest.raises(AssertionError):
        torch.add(x, 1)
