"""Private PyTorch names that the engine needs, and queries about the context of a call.

PyTorch may change private names without notice. `tests/taylor/test_torch.py` tests the names that
could change silently, and lists the PyTorch versions that define each name. If one of these tests
fails, this is the file to change.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # noqa: F401

_C: Any = torch._C
_lock = threading.RLock()
_look: Any = getattr(getattr(_C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
TELLS_HOOKS = _look is not None
dispatch_depth: Any = _C._len_torch_dispatch_stack  # how many dispatch modes surround a call
NO_FORWARD = "use forward AD with"  # in the error for an operator without a forward derivative


def in_functorch() -> bool:
    """Whether this call is inside a transform of torch.func (grad, vmap, jvp, …)."""
    return not torch.compiler.is_compiling() and _C._functorch.peek_interpreter_stack() is not None


def is_traced() -> bool:
    """Whether torch.compile or a torch.func transform prevents values from being read."""
    return torch.compiler.is_compiling() or _C._functorch.peek_interpreter_stack() is not None


def carries_gradient(x: object) -> bool:
    """Whether x is a tensor that requires grad (inside torch.func, at the innermost level)."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return False
    innermost = _C._functorch.peek_interpreter_stack()
    return innermost is None or _C._functorch.maybe_get_level(x) == innermost.level()


def saving_hooks() -> Any:
    """The innermost saved-tensor hooks; None if there are none or PyTorch cannot report them."""
    return None if _look is None or torch.compiler.is_compiling() else _look(True)


def checkpoint_hook(kind: str | tuple[str, ...] = "_checkpoint_hook") -> object:
    """The innermost saved-tensor hook if its name starts with `kind`, and None otherwise.

    The default `kind` matches the hook of a checkpoint.
    """
    if _look is None or torch.compiler.is_compiling():
        return None
    hook, _ = _look(True) or (None, None)
    return hook if getattr(hook, "__qualname__", "").startswith(kind) else None


def selective_checkpoint() -> bool:
    """Whether this call is inside a selective checkpoint or its recomputation."""
    for depth in range(dispatch_depth()):
        name = type(_C._get_dispatch_stack_at(depth)).__name__
        if name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode"):
            return True
    return False


def autocast_type(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast uses for matrix products and convolutions of x.

    This is x.dtype if x is in float64 or autocast is off.
    """
    kind = x.device.type
    short = x.dtype != torch.float64 and _autocast(kind)
    return torch.get_autocast_dtype(kind) if short else x.dtype


def in_autocast(x: Tensor) -> Tensor:
    """Cast a tensor to its `autocast_type`."""
    return x.to(autocast_type(x))


def _autocast(kind: str) -> bool:
    """Whether autocast is on for a device type; some types, such as meta, do not support it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[object]:
    return torch.autocast(kind, enabled=False) if _autocast(kind) else nullcontext()


def in_custom_function() -> bool:
    """Whether this call is inside the forward of a torch.autograd.Function."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False  # such a forward also turns off forward mode, unlike torch.no_grad
    return not (_C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def forward_mode_on() -> AbstractContextManager[object]:
    """Return a context manager in which `in_custom_function` ignores any enclosing Function."""
    if torch.compiler.is_compiling() or _C._is_fwd_grad_enabled():
        return nullcontext()
    return torch.autograd.forward_ad._set_fwd_grad_enabled(True)


def operators(name: str) -> list[Any]:
    """The operators in torch.ops.aten, and their overloads, that implement the function `name`."""
    overloads: list[Any] = []
    for aten_name in (name, f"linalg_{name}", f"_linalg_{name}"):
        packet = getattr(torch.ops.aten, aten_name, None)
        if packet is not None:
            overloads += [packet, *(getattr(packet, kind) for kind in packet.overloads())]
    return overloads


def of_a_package(function: object) -> bool:
    """Whether this is a torch.library operator that is not composed of PyTorch's own operators."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        function = getattr(function, function.overloads()[0])
    if not isinstance(function, torch._ops.OpOverload) or function.namespace == "aten":
        return False
    composed = "CompositeImplicitAutograd"
    return not _C._dispatch_has_kernel_for_dispatch_key(function.name(), composed)


# torch.compiler.assume_constant_result does the same, but imports all of torch.compile.
of_a_package._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def will_run(node: object) -> bool:
    """Whether the current backward pass will run an autograd node; False if the node is None."""
    if node is None:
        return False
    try:
        return _C._will_engine_execute_node(node)
    except RuntimeError:  # for example for a parameter passed to torch.autograd.grad
        return True


def shell(kind: type[Tensor], stack: Tensor) -> Any:
    """Return a tensor of type `kind` with the metadata, not the data, of a stack's value."""
    make: Any = Tensor._make_wrapper_subclass
    shape, strides = stack.shape[1:], stack.stride()[1:]
    return make(kind, shape, strides, dtype=stack.dtype, device=stack.device)


def without_subclasses() -> AbstractContextManager[None]:
    """Return a context manager in which no subclass's __torch_function__ is called."""
    return _C.DisableTorchFunctionSubclass()


def has_alias(x: Tensor) -> bool:
    """Whether another tensor, such as the result of x.detach(), shares the memory of x."""
    uses, fresh = (
        _C._storage_Use_Count(tensor.untyped_storage()._cdata)
        for tensor in (x, torch.empty(0, device=x.device))
    )
    return uses > fresh


def swap(a: Tensor, b: Tensor) -> None:
    """Swap two tensors in place.

    Raises RuntimeError if a weak reference, a view or an autograd graph refers to either tensor.
    """
    with without_subclasses():
        torch.utils.swap_tensors(a, b)


def outside_inference_mode() -> AbstractContextManager[None]:
    """Return a context manager that leaves torch.inference_mode but keeps gradients disabled.

    Inference mode forbids all derivatives.
    """
    # In PyTorch 2.6, torch.compile cannot trace generator-based context managers.
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return _left()


@contextmanager
def _left() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def leave_inference_mode(tensor: Tensor) -> Tensor:
    """Clone an inference-mode tensor so that autograd can save it; return other tensors as is."""
    made_in_it = not torch.compiler.is_compiling() and tensor.is_inference()
    return tensor.clone() if made_in_it else tensor


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return how many times each tensor was changed in place.

    Inference tensors, which have no such count, are skipped. Under torch.compile, the list is
    empty.
    """
    if torch.compiler.is_compiling():
        return []
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _mark(context: Any) -> None:
    context.get_local("x").as_proxy().node.meta["watched"] = True


def _refuse_written(context: Any) -> None:
    for node in context.graph().nodes:
        if "watched" in node.meta and node.meta["example_value"]._version:
            context.graph_break(
                "network: expected no assignment such as x[:, 0] = y, of which torch.compile of "
                "PyTorch 2.14 and 2.15 does not tell the engine. Join tensors with torch.cat or "
                "torch.where, or compile without fullgraph=True."
            )


def watch_traced(x: Tensor) -> None:  # noqa: ARG001 - read by its name
    """Under torch.compile, remember a tensor for `refuse_written`."""
    torch._dynamo.comptime.comptime(_mark)  # pyright: ignore[reportAttributeAccessIssue]


def refuse_written() -> None:
    """Under torch.compile, break the graph if a watched tensor was changed in place."""
    torch._dynamo.comptime.comptime(_refuse_written)  # pyright: ignore[reportAttributeAccessIssue]


def forward_mode() -> AbstractContextManager[object]:
    """Return a lock for calls to torch.func.jvp, whose nesting levels all threads share."""
    return nullcontext() if torch.compiler.is_compiling() else _lock
