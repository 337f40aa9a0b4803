"""What to do about a network whose derivatives are wrong: the known causes and their cures."""

__all__ = ["SMOOTH", "remedy"]

from collections.abc import Iterable

GENERAL = (
    "Write what it does with differentiable operators of PyTorch, without .detach(), .data or "
    "torch.no_grad(), and check again."
)
SMOOTH = (
    "Derivatives miss what happens in the jumps, so that a loss trains nothing of it. Use a "
    "smooth activation, such as nn.SiLU, nn.GELU, nn.Softplus or nn.Tanh, and average in place of "
    "max pooling. Or train with order two, for which a first derivative may jump, as a ReLU's "
    "does."
)
CUSTOM = (
    "Its custom autograd.Function has a backward, or a jvp, that cannot be differentiated again: "
    "write it with differentiable operators, or use the package's plain implementation."
)
# By a part of the name of a Function, in lower case.
REMEDIES = {
    "checkpoint": (
        "This activation checkpoint recomputes outside the graph, so that second derivatives are "
        "lost. Use hosm_losses.checkpoint in its place. guided-diffusion's attention calls its "
        "own checkpoint even when use_checkpoint is False: set guided_diffusion.nn.checkpoint and "
        "guided_diffusion.unet.checkpoint to "
        "lambda f, i, p, flag: hosm_losses.checkpoint(f, *i) if flag else f(*i)."
    ),
    "attentionop": (
        "EDM's attention operator is right in reverse mode at orders two and three, with "
        "derivative='auto' or 'reverse' and third='exact'. What goes forward cannot follow it: "
        "derivative='taylor' and 'forward', and third='laplacian' and 'sliced' (which 'auto' "
        "replaces by 'exact'). For these, and for ode_nll to take several probes at once, compute "
        "the same weights with torch.softmax in its place."
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


def remedy(functions: Iterable[str]) -> str:
    """The advice for what has a wrong derivative.

    Args:
        functions: names of the custom autograd.Functions that are at fault.

    Returns:
        A sentence or two.

    Example:
        >>> remedy(())[:26]
        'Write what it does with di'
    """
    names = list(functions)
    if not names:
        return GENERAL
    known = [advice for part, advice in REMEDIES.items() for name in names if part in name.lower()]
    return known[0] if known else f"In its graph: {', '.join(names)}. {CUSTOM}"
