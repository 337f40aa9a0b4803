"""Rules for what is asked of a tensor, does not depend on x, or changes its type or device.

A property that says how a tensor hangs in the graph is answered for the stack. So tools that
watch modules, such as PyTorch's counter of operations, find what they find on an ordinary tensor.

A cast to another floating type casts every component. One to integers or to bool has no
derivatives, as in PyTorch: its result is a plain tensor, and casting that back brings none. One to
complex numbers is refused by `Jet.make`.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hosm_losses.taylor.errors import TaylorError
from hosm_losses.taylor.hooks import guard_hook
from hosm_losses.taylor.registry import CONSTANT, Function, functions_named, rule
from hosm_losses.taylor.tensor import Jet, on_values

_PROPERTIES = """
    size dim ndimension numel nelement stride __len__ element_size is_contiguous is_floating_point
    is_complex is_same_size get_device __hash__ __repr__ result_type
"""
_WITHOUT_SLOPE = """
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like new new_zeros
    new_ones new_empty new_empty_strided new_full new_tensor lt le gt ge eq ne __lt__ __le__ __gt__
    __ge__ __eq__ __ne__ isnan isinf isfinite argmax argmin argsort sign logical_and logical_or
    logical_not allclose equal all any is_nonzero floor ceil round
"""
_CASTS = """
    to type type_as float double half bfloat16 int long short char byte bool cfloat cdouble chalf
    cpu cuda
"""
CONSTANT.update(dict.fromkeys(functions_named(_PROPERTIES + _WITHOUT_SLOPE), False))
CONSTANT.update(dict.fromkeys(functions_named("detach"), True))
CONSTANT[Tensor.data.__get__] = True  # pyright: ignore[reportAttributeAccessIssue]


@rule(Tensor.requires_grad.__get__)  # pyright: ignore[reportAttributeAccessIssue]
def _requires_grad(x: Jet) -> bool:  # noqa: ARG001
    """True, as in the engine that goes backward, so that a checkpoint does not warn."""
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

    guarded = guard_hook(hook)
    return x.stack.register_hook(lambda cotangent: guarded(cotangent[0]))


@rule("as_strided as_strided_copy as_strided_scatter", several=True)
def _strided(*_args: Any, **_named: Any) -> Any:
    raise TaylorError("as_strided: its result depends on where the elements of a tensor lie.")


@rule(_CASTS, several=True, told=True)
def _cast(function: Function, x: Any, *args: Any, **named: Any) -> Any:
    if not isinstance(x, Jet):  # a plain tensor in the type of a Jet
        return on_values(function, (x, *args), named)
    args = tuple(each.stack if isinstance(each, Jet) else each for each in args)
    named = {k: v.stack if isinstance(v, Jet) else v for k, v in named.items()}
    named.pop("memory_format", None)  # of a value, and not of its stack
    found = function(x.stack, *args, **named)
    if found is x.stack:
        return x
    return x.of(found) if isinstance(found, Tensor) else found


@rule(torch.as_tensor, torch.asarray)
def _as_tensor(x: Any, dtype: Any = None, device: Any = None) -> Any:
    """Only torch.compile asks for it here. Elsewhere it is made below autograd, and refused."""
    return x.of(x.stack.to(dtype=dtype, device=device))
