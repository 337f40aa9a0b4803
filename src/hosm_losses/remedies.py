r"""What to do about a network whose derivatives are wrong: the well-known causes and their cures.

What:
    A custom autograd.Function is looked for in the graph of the network's output and among the
    names of the module at fault; each known one has its remedy, any other a general one.
"""

__all__ = ["custom_functions", "remedy"]

from torch import Tensor

GENERAL = (
    "Write what it does with differentiable operators of PyTorch, without .detach(), .data or "
    "torch.no_grad(), and check again."
)
CUSTOM = (
    "Its custom autograd.Function has a backward, or a jvp, that cannot be differentiated again: "
    "write it with differentiable operators, or use the package's plain implementation."
)
# By a part of the name of a Function, a module or its package, in lower case.
REMEDIES = {
    "checkpoint": (
        "This activation checkpoint recomputes outside the graph, so that second derivatives are "
        "lost. Use hosm_losses.checkpoint in its place, or turn it off; guided-diffusion's "
        "attention blocks call their own checkpoint even when use_checkpoint is False, so replace "
        "that call as well."
    ),
    "attentionop": (
        "EDM's attention operator has a backward of its own: compute the same weights with "
        "torch.softmax(q.transpose(-2, -1) @ k, -1) in its place."
    ),
    "upfirdn2d": (
        "The compiled upfirdn2d drops higher derivatives: choose its reference implementation "
        "(impl='ref'), which is made of PyTorch operators."
    ),
    "flash": (
        "Fused attention kernels have no second derivative: switch to the package's plain "
        "attention, or to torch's scaled_dot_product_attention, which is then taken over."
    ),
    "xformers": (
        "Fused attention kernels have no second derivative: switch to the package's plain "
        "attention, or to torch's scaled_dot_product_attention, which is then taken over."
    ),
}


def custom_functions(value: Tensor) -> list[str]:
    """Names of the Python autograd.Functions in the graph of a tensor, without 'Backward'."""
    names: list[str] = []
    seen: set[object] = set()
    nodes = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        forward = getattr(type(node), "_forward_cls", None)
        if forward is not None and forward.__name__ not in names:
            names.append(forward.__name__)
        nodes.extend(parent for parent, _ in node.next_functions)
    return names


def remedy(module: object, value: Tensor) -> str:
    """The advice for a module at fault, given the network's output with its graph.

    Args:
        module: the module, or the callable, whose derivative is wrong.
        value: the network's output, with its graph.

    Returns:
        A sentence or two.

    Example:
        >>> import torch
        >>> remedy(torch.nn.Identity(), torch.zeros(1))[:26]
        'Write what it does with di'
    """
    functions = custom_functions(value)
    names = [*functions, type(module).__name__, type(module).__module__]
    for name in names:
        for part, advice in REMEDIES.items():
            if part in name.lower():
                return advice
    if functions:
        return f"In its graph: {', '.join(functions)}. {CUSTOM}"
    return GENERAL
