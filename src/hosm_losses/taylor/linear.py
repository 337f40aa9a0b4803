"""Rules for functions that move or sum elements and act on every component in the same way.

Dimensions are converted to negative indices, which are the same for a value and for its stack.

The functions that networks call most often each have a rule that acts on the whole stack. Other
linear functions are called on each component in turn, with the user's own arguments.

Queries and casts:
    When queried about its autograd graph, a Jet behaves like an ordinary tensor that requires
    gradients. Tools that monitor modules, such as PyTorch's FLOP counter, rely on this. A
    cast to another floating dtype casts every component. As in PyTorch, a cast to integers or to
    bool drops the derivatives: the result is a plain tensor. Casting this tensor back does not
    restore the derivatives. `Jet.make` rejects a cast to complex numbers.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hosm_losses.taylor.jets import (
    Jet,
    call,
    jet_among,
    on_values,
    result_type,
    stacks_of,
    write_jet,
)
from hosm_losses.taylor.memory import share
from hosm_losses.taylor.registry import (
    CONSTANT,
    OF_COMPLEX,
    Function,
    NoRule,
    TaylorError,
    axes,
    axis,
    functions_named,
    guard_hook,
    rule,
)
from hosm_losses.taylor.stacks import align


def linear(move: Function, *names: str | Function, view: bool = False) -> None:
    """Register `move`, a function of a stack, as the rule for PyTorch functions.

    If `move` receives other tensors as well, it uses only their shapes. If `view` is True, the
    result is recorded as possibly sharing memory with the argument.
    """

    def register(function: Function) -> None:
        @rule(function, several=True, kind="linear")
        @wraps(move)
        def moved(x: Any, *args: Any, **named: Any) -> Any:
            if not isinstance(x, Jet):  # only the shape of a Jet is used, as in expand_as
                return on_values(function, (x, *args), named)
            output = move(x.stack, *args, **named)
            parts = [x.like(part) for part in (output if isinstance(output, tuple) else (output,))]
            parts = [share(x, part) for part in parts] if view else parts
            return tuple(parts) if isinstance(output, tuple) else parts[0]

    for function in functions_named(*names):
        register(function)


def _numbers(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sizes or dimensions passed to a method, either separately or as one sequence."""
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        return tuple(sizes[0])
    return sizes


def _axis(stack: Tensor, dim: Any) -> int:
    return axis(dim, stack.ndim - 1)


def _axes(stack: Tensor, dims: Any) -> tuple[int, ...]:
    return axes(dims, stack.ndim - 1)


# ---------------------------------------------------------------------- views and possible views
def _reshape(stack: Tensor, *sizes: Any, shape: Any = None) -> Tensor:
    if isinstance((*sizes, None)[0], torch.dtype):
        raise TaylorError("view: another dtype for the same bits has no derivative.")
    return stack.reshape(len(stack), *_numbers(sizes or (shape,)))


def _expand(stack: Tensor, *sizes: Any) -> Tensor:
    sizes = _numbers(sizes)
    return align(stack, len(sizes)).expand(len(stack), *sizes)


def _permute(stack: Tensor, *dims: Any) -> Tensor:
    return stack.permute(0, *(dim + stack.ndim for dim in _axes(stack, _numbers(dims))))


def _transpose(stack: Tensor) -> Tensor:
    if stack.ndim < 3:
        raise NoRule
    return stack.mT


def _turned(stack: Tensor) -> Tensor:
    if stack.ndim > 3:
        raise NoRule
    return stack.permute(0, *range(stack.ndim - 1, 0, -1))


def _squeeze(stack: Tensor, dim: Any = None) -> Tensor:
    if dim is None:
        dim = [axis for axis, size in enumerate(stack.shape[1:]) if size == 1]
    return stack.squeeze(_axes(stack, dim)) if dim != [] else stack


VIEWS = {
    "reshape view": _reshape,
    "reshape_as view_as": lambda stack, other: _reshape(stack, *other.shape),
    "expand": _expand,
    "expand_as": lambda stack, other: _expand(stack, *other.shape),
    "contiguous": lambda stack, memory_format=None: stack,  # noqa: ARG005
    "permute": _permute,
    "t": _turned,
    "squeeze": _squeeze,
    "unsqueeze": lambda stack, dim: stack.unsqueeze(axis(dim, stack.ndim)),
    "transpose swapaxes swapdims": lambda stack, dim0, dim1: stack.transpose(
        _axis(stack, dim0), _axis(stack, dim1)
    ),
    "flatten": lambda stack, start_dim=0, end_dim=-1: stack.flatten(
        _axis(stack, start_dim), _axis(stack, end_dim)
    ),
    "unflatten": lambda stack, dim, sizes: stack.unflatten(_axis(stack, dim), sizes),
    "narrow": lambda stack, dim, start, length: stack.narrow(_axis(stack, dim), start, length),
    "select": lambda stack, dim, index: stack.select(_axis(stack, dim), index),
    "unbind": lambda stack, dim=0: tuple(stack.unbind(_axis(stack, dim))),
    "chunk": lambda stack, chunks, dim=0: tuple(stack.chunk(chunks, _axis(stack, dim))),
    "split split_with_sizes": lambda stack, size, dim=0: tuple(
        stack.split(size, _axis(stack, dim))
    ),
}


# ----------------------------------------------------------------------------------- new tensors
def _reduced(reduce: Function) -> Function:
    """Return a function that sums or averages a stack over some or all axes of the value."""

    def reduced(
        stack: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
    ) -> Tensor:
        # Integers have no derivatives, and numbers have no axes.
        if stack.ndim == 1 or not (dtype is None or dtype.is_floating_point):
            raise NoRule
        return reduce(stack, _axes(stack, dim), keepdim, dtype=dtype)

    return reduced


def per_sample(stack: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Pass all components, as one large batch, to a function that treats samples independently."""
    return function(stack.flatten(0, 1)).unflatten(0, stack.shape[:2])


NEW = {
    "sum": _reduced(torch.sum),
    "mean": _reduced(torch.mean),
    "neg negative __neg__": lambda stack: -stack,
    "clone": lambda stack, memory_format=None: stack.clone(),  # noqa: ARG005
}
for _table in (VIEWS, NEW):
    for _names, _move in _table.items():
        linear(_move, _names, view=_table is VIEWS)
linear(_turned, Tensor.T.__get__, view=True)  # pyright: ignore[reportAttributeAccessIssue]
linear(_transpose, Tensor.mT.__get__, view=True)  # pyright: ignore[reportAttributeAccessIssue]


@rule("view_as_complex", kind="linear")
def _pairs_as_complex(x: Jet) -> Jet:
    if x.ndim == 0:
        raise NoRule
    # PyTorch requires pairs to be last in memory, which may hold for the value but not its stack.
    stack = torch.view_as_complex(x.stack.contiguous())
    return share(x, Jet.make(stack, x.firsts, x.pairs, of_complex=True))


@rule("view_as_real", kind="linear")
def _complex_as_pairs(x: Jet) -> Jet:
    return share(x, x.like(torch.view_as_real(x.stack)))


_TURNS = "view_as_real mul multiply __mul__ __rmul__ __getitem__"
_ASKED = Tensor.requires_grad.__get__, Tensor.grad_fn.__get__  # pyright: ignore
OF_COMPLEX.update(dict.fromkeys(functions_named(_TURNS, *VIEWS, *_ASKED)))


@rule(
    "avg_pool1d avg_pool2d avg_pool3d interpolate upsample",
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    kind="linear",
    with_function=True,
)
def _by_samples(function: Function, x: Jet, *args: Any, **named: Any) -> Jet:
    return x.like(per_sample(x.stack, lambda samples: function(samples, *args, **named)))


@rule(
    "cumsum flip gather index_select pixel_shuffle pixel_unshuffle repeat repeat_interleave roll",
    "tile",
    kind="linear",
    with_function=True,
)
def _by_components(function: Function, x: Jet, *args: Any, **named: Any) -> Tensor:
    components = [function(component, *args, **named) for component in x.stack.unbind()]
    return x.of(torch.stack(components))


@rule("pad", kind="linear")
def _pad(x: Jet, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    if value:  # padding with a number other than zero
        raise NoRule
    return _by_components(F.pad, x, pad, mode)


@rule("dropout dropout1d dropout2d dropout3d", kind="linear", with_function=True)
def _dropout(
    function: Function, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0:
        return x
    # One mask for the value and its derivatives.
    dropped = x.like(x.stack * function(torch.ones_like(x.stack[0]), p, True))
    return write_jet(x, dropped) if inplace else dropped


@rule(Tensor.__iter__, kind="linear")
def _iterator(x: Jet) -> Any:
    return iter(call(Tensor.unbind, (x,), {}))


# ------------------------------------------------------------------------------- several tensors
@rule("cat concat concatenate", several=True, kind="linear")
def _cat(tensors: Any, dim: int = 0) -> Jet:
    ndim = tensors[0].ndim
    if any(tensor.ndim != ndim for tensor in tensors):
        raise NoRule
    return jet_among(tensors).like(torch.cat(stacks_of(tensors), axis(dim, ndim)))


@rule(torch.stack, several=True, kind="linear")
def _stack(tensors: Any, dim: int = 0) -> Jet:
    place = axis(dim, tensors[0].ndim + 1)
    return jet_among(tensors).like(torch.stack(stacks_of(tensors), place))


@rule(torch.where, several=True, kind="linear")
def _where(condition: Any, a: Any, b: Any, dtype: torch.dtype | None = None) -> Jet:
    known = all(isinstance(operand, Tensor | float | int) for operand in (a, b))
    if not known or not isinstance(condition, Tensor) or condition.dtype != torch.bool:
        raise NoRule
    if not isinstance(a, Jet) and not isinstance(b, Jet):
        raise NoRule
    jet = jet_among((a, b))
    if dtype is None:
        dtype = result_type(a, b)
    tensors = [
        operand if isinstance(operand, Tensor) else jet.stack.new_full((), operand)
        for operand in (a, b)
    ]
    ndim = max(condition.ndim, *(operand.ndim for operand in tensors))
    stacks = (align(stack, ndim) for stack in stacks_of(tensors))
    return jet.like(torch.where(condition, *stacks).to(dtype))


@rule(Tensor.where, several=True, kind="linear")
def _where_of(a: Any, condition: Any, b: Any) -> Jet:
    return _where(condition, a, b)


@rule("masked_fill", several=True, kind="linear")
def masked_fill(x: Any, mask: Any, value: Any) -> Jet:
    """Return x with elements replaced by a number where a mask is True."""
    if (isinstance(value, Tensor) and value.ndim) or not x.is_floating_point():
        raise NoRule
    return _where(mask, value, x, x.dtype)


@rule(Tensor.__getitem__, kind="linear")
def _item(x: Jet, index: Any) -> Tensor:
    parts = index if isinstance(index, tuple) else (index,)
    if all(map(_slices, parts)):
        stack = x.stack[(slice(None), *parts)]
    else:
        stack = torch.stack([component[index] for component in x.stack.unbind()])
    # Indexing by a tensor without axes also makes a view.
    copied = any(isinstance(part, list) or getattr(part, "ndim", 0) for part in parts)
    return x.like(stack) if copied else share(x, x.like(stack))


def _slices(part: Any) -> bool:
    if isinstance(part, bool):  # a bool makes a new axis, and acts as a mask
        return False
    return part is None or part is Ellipsis or isinstance(part, int | slice)


# ------------------------------------------------------------------------ queries, casts and hooks
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
    """Return True, so that a checkpoint does not warn that no input requires a gradient."""
    return True


@rule(Tensor.grad_fn.__get__)  # pyright: ignore
def _grad_fn(x: Jet) -> Any:
    """Return the stack's autograd node, or a node not connected to x if there is none."""
    if x.stack.requires_grad:
        return x.stack.grad_fn
    return torch.ones((), requires_grad=True).view(()).grad_fn


@rule(Tensor.register_hook)
def _register_hook(x: Jet, hook: Callable[[Tensor], Any]) -> RemovableHandle:
    """Register a hook on the value's gradient; the hook must not change this gradient."""
    if not x.stack.requires_grad:
        return RemovableHandle(OrderedDict())

    guarded = guard_hook(hook)
    return x.stack.register_hook(lambda cotangent: guarded(cotangent[0]))


@rule("as_strided as_strided_copy as_strided_scatter", several=True)
def _strided(*_args: Any, **_named: Any) -> Any:
    raise TaylorError("as_strided: its result depends on how the elements lie in memory.")


@rule(_CASTS, several=True, with_function=True)
def _cast(function: Function, x: Any, *args: Any, **named: Any) -> Any:
    if not isinstance(x, Jet):  # a plain tensor cast to the dtype of a Jet
        return on_values(function, (x, *args), named)
    args = tuple(arg.stack if isinstance(arg, Jet) else arg for arg in args)
    named = {k: v.stack if isinstance(v, Jet) else v for k, v in named.items()}
    named.pop("memory_format", None)  # it applies to a value, not to its stack
    cast = function(x.stack, *args, **named)
    if cast is x.stack:
        return x
    return x.of(cast) if isinstance(cast, Tensor) else cast


@rule(torch.as_tensor, torch.asarray)
def _as_tensor(x: Any, dtype: Any = None, device: Any = None) -> Any:
    """Cast x to `dtype` and move it to `device` under torch.compile.

    In eager mode, torch.as_tensor bypasses `__torch_function__` and hence this rule. The cast then
    raises TaylorError.
    """
    cast = x.stack.to(dtype=dtype, device=device)
    return x if cast is x.stack else x.of(cast)
