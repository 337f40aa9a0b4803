"""PyTorch's private names and error messages that this library uses outside the taylor engine.

Those that the taylor engine uses are in `taylor._torch`.

PyTorch may change these names and messages without notice. `tests/test_torch_internals.py` tests
the names and messages that could change silently. It also lists the PyTorch versions in which they
exist. If a test in that file fails, update this module.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules._functions import BackwardHookFunction
from torch.overrides import _get_current_function_mode_stack

from hosm_losses.taylor import _torch

pytree, is_traced, in_functorch = _torch.pytree, _torch.is_traced, _torch.in_functorch
checkpoint_hook, forward_mode = _torch.checkpoint_hook, _torch.forward_mode
versions = _torch.versions
outside_inference_mode = _torch.outside_inference_mode
leave_inference_mode = _torch.leave_inference_mode
without_autocast = _torch.without_autocast

# The node behind the result of a once_differentiable backward; autograd.grad never reaches it.
DELAYED_ERROR = "torch::autograd::Error"
MODULE_HOOK = BackwardHookFunction  # wraps the inputs and outputs of a module with a backward hook
COMPILED_PART = "_compiled_call_impl"  # the attribute of a module that .compile() sets
ANY_CHECKPOINT = ("_checkpoint_hook", "_recomputation_hook")  # saved-tensor hooks of checkpoints

# Substrings that identify PyTorch errors. NOT_TWICE identifies an operator without a second
# derivative in reverse mode.
NOT_TWICE = ("derivative for aten::", "derivative for '", "@once_diff", "not differentiable with")
NO_GRAPH = (
    "does not require grad and does not have a grad_fn"  # a gradient taken inside the network
)
REENTRANT_CHECKPOINT = "compatible with .grad()"
HOOKS_IN_TRANSFORM = "saved tensor hooks"  # hooks such as a checkpoint's, under torch.func
DOUBLE_BACKWARD_OF_COMPILED = "does not currently support double backward"
CHANGED_SINCE = "modified by an inplace operation"
LOST_ATTRIBUTE = "Backward' object has no attribute"  # a custom Function dropped the attribute
IN_SCRIPT = "TorchScript interpreter"  # raised inside a function of torch.jit
DEVICE_ERROR_TEXT = ("CUDA", "CUBLAS", "cuDNN", "CUDNN", "HIP error", "out of memory")

_C: Any = torch._C
_autograd: Any = torch.autograd


def differentiated() -> bool:
    """Return whether this code runs in torch.func.grad, vjp or jacrev, with gradients enabled."""
    return torch.is_grad_enabled() and _C._functorch.TransformType.Grad in _transforms()


def _transforms() -> list[Any]:
    """Return the types of the torch.func transforms around this call."""
    stack = _C._functorch.get_interpreter_stack() if in_functorch() else None
    return [interpreter.key() for interpreter in stack or ()]


def surroundings() -> tuple[Any, ...]:
    """Describe the transforms, modes, saved-tensor hooks and profiler that are active here."""
    return (
        tuple(_transforms()),
        tuple(map(type, _get_current_function_mode_stack())),
        _torch.dispatch_depth(),
        _torch.saving_hooks() is not None,
        _autograd._profiler_enabled(),
    )


def graph_nodes(tensors: Iterable[Tensor], point: Tensor | None = None) -> Iterator[Any]:
    """Yield each node of the tensors' autograd graphs once.

    The search stops at the node of `point`, which is not yielded.
    """
    nodes = [tensor.grad_fn for tensor in tensors]
    seen = set() if point is None else {gradient_node(point)}
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(parent for parent, _ in node.next_functions)


def gradient_node(tensor: Tensor) -> Any:
    """Return the autograd node that receives the gradient of a tensor."""
    return _autograd.graph.get_gradient_edge(tensor).node


def custom_function(node: object) -> type | None:
    """Return the torch.autograd.Function that created a node, or None for a built-in operator."""
    return getattr(type(node), "_forward_cls", None)


def has_graph(gradient: Tensor) -> bool:
    """Return whether a gradient can be differentiated again.

    A gradient computed by a once_differentiable backward cannot be differentiated again.
    """
    node = gradient.grad_fn
    return gradient.requires_grad and (node is None or node.name() != DELAYED_ERROR)
