r"""Value and derivatives of a function along directions, carried through it in one batch.

- `jet`: the tensor that carries them; what happens to a function that is called on one.
- `table`: by which function of PyTorch a rule is found, and which calls it takes.
- `arithmetic`, `layers`, `norms`, `pointwise`, `properties`, `selection`, `shapes`: the rules, by
  kind. Importing this package registers them.
- `along`: functions without a rule.
- `recompute`: formulas of which only the arguments are kept for the backward passes.
"""

__all__ = ["Jet", "TaylorError", "carried"]

from collections.abc import Callable

import torch
from torch import Tensor

from hosm_losses.derivatives.taylor import (  # noqa: F401
    arithmetic,
    layers,
    norms,
    pointwise,
    properties,
    selection,
    shapes,
)
from hosm_losses.derivatives.taylor.along import Pairs
from hosm_losses.derivatives.taylor.jet import Jet, TaylorError, define_methods

define_methods()


def carried(
    function: Callable[[Tensor], object], x: Tensor, directions: Tensor, pairs: Pairs = "none"
) -> Tensor:
    """The stack of value, first and second derivatives of a function at x.

    Args:
        function: of x (B, *); returns one tensor.
        x: the point (B, *).
        directions: (K, B, *).
        pairs: "none"; "squares" for ∂²f[w, w] of every direction; "halves" for ∂²f[v, u] of each v
            of the first half and its u of the second.

    Returns:
        (C, B, *): f, the K derivatives ∂f w, and what `pairs` asks for.

    Raises:
        TaylorError: for a function whose derivatives cannot be carried.

    Example:
        >>> x = torch.tensor([[0.5]])
        >>> carried(torch.square, x, torch.ones(1, 1, 1), "squares").flatten()
        tensor([0.2500, 1.0000, 2.0000])
    """
    count = len(directions)
    # Joined along the batch, which keeps a channels-last layout.
    stack = torch.cat([x, *directions]).unflatten(0, (1 + count, len(x)))
    # Gradients are off in the forward of a custom autograd.Function, which is how one is found.
    with torch.enable_grad():
        result = function(Jet.make(stack, count, pairs))
    if not isinstance(result, Jet):
        raise TaylorError(
            f"its output does not carry derivatives in x; got {type(result).__name__}."
        )
    seconds = {"none": 0, "squares": count, "halves": count // 2}[pairs]
    missing = 1 + count + seconds - len(result.stack)
    if not missing:
        return result.stack
    # Second derivatives that are zero everywhere, as of a linear network.
    return torch.cat([result.stack, result.stack.new_zeros(missing, *result.stack.shape[1:])])
