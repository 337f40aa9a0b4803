"""What is asked of a tensor, or made after its pattern, and does not depend on x.

A property that says how a tensor hangs in the graph is answered for the stack. So tools that
watch modules, such as PyTorch's counter of operations, find what they find on an ordinary tensor.
"""

__all__: list[str] = []

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hosm_losses.derivatives.taylor.jet import CHANGES, Jet, TaylorError
from hosm_losses.derivatives.taylor.table import CONSTANT, every, rule

_PROPERTIES = """
    size dim ndimension numel nelement stride __len__ element_size is_contiguous is_floating_point
    is_complex is_same_size get_device __hash__ __repr__ result_type
"""
_WITHOUT_SLOPE = """
    detach zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones
    new_empty new_full new_tensor lt le gt ge eq ne __lt__ __le__ __gt__ __ge__ __eq__ __ne__ isnan
    isinf isfinite argmax argmin argsort sign logical_and logical_or logical_not allclose equal all
    any is_nonzero floor ceil round
"""
CONSTANT.update(dict.fromkeys(every(*(_PROPERTIES + _WITHOUT_SLOPE).split()), True))
CONSTANT[Tensor.data.__get__] = True  # pyright: ignore[reportAttributeAccessIssue]


@rule(Tensor.requires_grad.__get__)  # pyright: ignore[reportAttributeAccessIssue]
def _requires_grad(x: Jet) -> bool:  # noqa: ARG001
    """As in the engine that goes backward, so that a checkpoint does not warn."""
    return True


@rule(Tensor.grad_fn.__get__)  # pyright: ignore
def _grad_fn(x: Jet) -> Any:
    """A node in any case, as what requires a gradient has; without a graph one out of reach."""
    if x.stack.requires_grad:
        return x.stack.grad_fn
    return torch.ones((), requires_grad=True).view(()).grad_fn


@rule(Tensor.register_hook)
def _register_hook(x: Jet, hook: Callable[[Tensor], Any]) -> RemovableHandle:
    """Show a hook the gradient in the value; to change it would be another loss in each engine."""
    if not x.stack.requires_grad:
        return RemovableHandle(OrderedDict())

    def shown(cotangent: Tensor) -> None:
        if hook(cotangent[0]) is not None:
            raise TaylorError(f"a hook {CHANGES}")

    return x.stack.register_hook(shown)


@rule(*every("as_strided", "as_strided_copy", "as_strided_scatter"))
def _strided(*_args: Any, **_named: Any) -> Any:
    raise TaylorError("as_strided: its result depends on where the elements of a tensor lie.")
