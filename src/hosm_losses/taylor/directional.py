r"""The public face: a function with its derivatives along directions, and its Laplacian."""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from hosm_losses.taylor._torch import leave_inference_mode, outside_inference_mode
from hosm_losses.taylor.stacks import Pairs, components
from hosm_losses.taylor.tensor import propagate

Function = Callable[[Tensor], Tensor]
PAIRS = get_args(Pairs)


def _check_floats(name: str, value: object) -> None:
    """Raise TypeError unless this is a tensor in floating point."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{name}: expected a tensor in floating point; got {came}. Convert it with "
            f"torch.as_tensor({name}, dtype=torch.float32)."
        )


def _check_batch(x: Tensor) -> None:
    """Raise unless this is a batch (B, *) in floating point."""
    _check_floats("x", x)
    if x.ndim == 0:
        raise ValueError("x: expected a batch (B, *); got no axes. Give it one by x.reshape(1).")


def jet(
    function: Function, x: Tensor, directions: Tensor, pairs: Pairs = "none"
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Return f(x), its first derivatives along directions, and second ones if asked for.

    One call of the function gives all of them, differentiable in x, the directions and what the
    function trains, and by hand where those of PyTorch 2.6 to 2.13 are wrong, as of norms.

    Args:
        function: of x (B, \*), every sample alone; such as a network with its conditions bound.
        x: a batch (B, \*), in floating point.
        directions: K directions for every sample, (K, B, \*), taken in the dtype of x.
        pairs: which second derivatives there are: "none"; "squares", ∂²f[v, v] of every direction;
            "sum", the sum of those.

    Returns:
        f (B, \*), first derivatives (K, B, \*), and second ones, which are None for "none",
        (K, B, \*) for "squares" and (B, \*) for "sum".

    Raises:
        TaylorError: what the function does cannot be followed, and why.
        DerivativeError: an operator inside it has no derivative in PyTorch, or a hook changes a
            gradient.
        TypeError: x or directions that are no tensors in floating point.
        ValueError: x without axes, directions of another shape, or pairs of another name.

    Example:
        >>> x, v = torch.tensor([[0.0], [1.0]]), torch.ones(1, 2, 1)
        >>> f, first, second = jet(lambda x: x**3, x, v, "squares")
        >>> first.flatten().tolist(), second.flatten().tolist()
        ([0.0, 3.0], [0.0, 6.0])
    """
    _check_batch(x)
    _check_floats("directions", directions)
    if directions.shape[1:] != x.shape or not len(directions):
        shape = ", ".join(map(str, x.shape))
        raise ValueError(
            f"directions: expected the shape (K, {shape}); got {tuple(directions.shape)}."
        )
    if pairs not in PAIRS:
        raise (ValueError if isinstance(pairs, str) else TypeError)(
            f"pairs: expected one of {PAIRS}; got {pairs!r}."
        )
    with outside_inference_mode():
        stack = propagate(
            function, leave_inference_mode(x), leave_inference_mode(directions).to(x.dtype), pairs
        )
    stack = stack if torch.is_grad_enabled() else stack.detach()
    value, first, second = components(stack, len(directions))
    if pairs == "none":
        return value[0], first, None
    return value[0], first, second[0] if pairs == "sum" else second


def laplacian(function: Function, x: Tensor) -> Tensor:
    r"""Return Δf, the sum over the elements of a sample of the second derivatives ∂²f/∂x_i².

    It takes a direction for each of the d elements of a sample, and so d + 2 times the memory of
    the function's value. See `jet` for what the function may be.

    Args:
        function: of x (B, \*), every sample alone.
        x: a batch (B, \*), in floating point.

    Returns:
        Δf, of the shape of f(x).

    Example:
        >>> laplacian(lambda x: (x**3).sum(1), torch.tensor([[1.0, 2.0]]))
        tensor([18.])
    """
    _check_batch(x)
    units = torch.eye(x.shape[1:].numel(), dtype=x.dtype, device=x.device)
    directions = units.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    found = jet(function, x, directions, "sum")[2]
    assert found is not None
    return found
