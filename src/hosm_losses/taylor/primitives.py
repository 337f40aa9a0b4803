r"""Replace or reject the few operators whose derivatives PyTorch gets wrong.

Purpose:
    PyTorch computes wrong derivatives if layer norm, batch norm (in training) or instance norm is
    differentiated more than twice (tested with 2.6, 2.13 and 2.15). The parameter gradient of a
    loss on a directional derivative is silently wrong, by anything from several percent to more
    than a hundred percent. In the loss of order three, the directional derivative itself is
    sometimes wrong by similar amounts. In reverse mode, PyTorch 2.14 and 2.15 instead raise an
    error for batch and instance norm, but the forward-mode derivatives of these norms are still
    wrong. If the pull requests listed under Source are applied, PyTorch raises an error for all of
    these norms. For group norm, attention and the gated linear unit, PyTorch raises an error on
    common inputs. PyTorch differentiates all these operators correctly in every mode if they are
    composed of means, products, softmax and sigmoid.

The mode:
    A `TorchFunctionMode` replaces these operators where a network calls them. The mode is active
    only while a loss evaluates the network, and only in the loss's thread. No PyTorch function is
    patched. An activation checkpoint evaluates its part of the network again in the backward pass.
    By then the mode is off, so `recomputable` turns it on for this evaluation.

Refused:
    For a few operators, PyTorch's forward-mode derivative, or the gradient of that derivative, is
    wrong. These operators are refused where their forward-mode derivatives are needed. Both
    engines also refuse operators that PyTorch cannot differentiate at all, such as
    torch.special.airy_ai.

Source:
    PyTorch issues 175754, 186256, 196699 and 196700; pull requests 176234 and 186779. The
    documentation of `torch.overrides`, and of `context_fn` in `torch.utils.checkpoint`.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hosm_losses.taylor._torch import (
    carries_gradient,
    checkpoint_hook,
    is_traced,
    of_a_package,
    operators,
)
from hosm_losses.taylor.registry import (
    CONSTANT,
    OF_ONE,
    PRIMITIVES,
    ConstantError,
    DerivativeError,
    functions_named,
    guard_hook,
    name_of,
)

# --------------------------------------------------------------- operators that PyTorch gets wrong


def _operators_named(names: str) -> set[Any]:
    """PyTorch's functions and methods with these names, and the operators that implement them."""
    return {*functions_named(names), *(op for name in names.split() for op in operators(name))}


# Operators with a forward-mode formula that PyTorch does not differentiate correctly: those up to
# logdet before version 2.15, cumprod if a factor is zero, and the operators from eigh on if they
# are differentiated twice. For some inputs, the formulas of cholesky_inverse, cholesky_solve and
# triangular_solve are themselves wrong.
_FORWARD = _operators_named(
    "solve solve_ex tensorsolve det slogdet logdet householder_product orgqr cumprod cumprod_ "
    "cholesky_inverse cholesky_solve triangular_solve linear_cross_entropy dist pairwise_distance "
    "matrix_norm float_power cosine_similarity "
    "eigh eigvalsh copysign copysign_ renorm renorm_ cosine_embedding_loss triplet_margin_loss"
)
# These operators are wrong only if they reduce by a product.
_PRODUCTS = _operators_named("scatter_reduce index_reduce scatter_reduce_ index_reduce_")
# Operators whose CPU kernels do not support vmap; only mish's kernel supports forward mode.
_PLAIN_ONLY = _operators_named("scaled_dot_product_attention multi_head_attention_forward mish")
WRONG = (
    "PyTorch does not differentiate its forward-mode derivative correctly. Write it with other "
    "operators."
)
MISSING = (
    "PyTorch does not implement its first or second derivative in forward mode. Write it with "
    "other operators."
)
# Functions that only use the dtype or shape of an argument; and torch.tensor, which detaches.
_CONSTANT_TOO = ("to", "type_as", "view_as", "reshape_as", "expand_as", "fill", "fill_", "tensor")


def wrong_in_forward_mode(function: object, args: Iterable[Any], named: Mapping[str, Any]) -> bool:
    """Whether PyTorch's forward-mode derivative, or that derivative's gradient, is wrong.

    For an operator that a package defines with `torch.library.custom_op`, PyTorch treats the
    forward-mode derivative as zero.
    """
    if of_a_package(function):
        return True
    if function in _PRODUCTS:
        return any(isinstance(arg, str) and arg == "prod" for arg in (*args, *named.values()))
    return function in _FORWARD


def refuse_constant(function: Any, result: Tensor) -> None:
    """Raise ConstantError for a result that is constant although an argument is not.

    No error is raised for a result that is constant on purpose, such as a new tensor, a random
    draw or a detached tensor.
    """
    if not result.is_floating_point() or function in CONSTANT:
        return
    # An operator of torch.ops.aten has a name such as new_zeros.default.
    name = name_of(function).split(".")[0]
    if name in _CONSTANT_TOO or any(name == name_of(constant) for constant in CONSTANT):
        return
    raise ConstantError(
        f"network: expected operators that PyTorch differentiates; got {name}, which it treats as "
        "a constant. Write it with other operators, or pass it x.detach() if a constant is "
        "intended."
    )


# ---------------------------------------------------------------------------------------- the mode
CHECKPOINT_ADVICE = (
    "checkpoint: expected hosm_losses.checkpoint inside a network that is trained with order "
    "two or three; got torch's checkpoint, which recomputes with other operators. Use "
    "hosm_losses.checkpoint (diffusers: "
    "model.enable_gradient_checkpointing(gradient_checkpointing_func=hosm_losses.checkpoint)), "
    "or checkpoint around the loss module."
)


_DATA = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]


class ForeignCheckpointError(DerivativeError):
    """Torch's checkpoint would recompute an operator without the primitive that replaces it."""


class _Thread(threading.local):
    def __init__(self) -> None:
        # Set here, not on the class: torch.compile guards attributes, and none may come later.
        self.modes: tuple[_SafePrimitives, ...] = ()


_thread = _Thread()


class _SafePrimitives(TorchFunctionMode):
    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table
        self.outer_hook: object = None  # the hook of a checkpoint around the mode

    def __enter__(self) -> Self:
        super().__enter__()
        self.outer_hook = checkpoint_hook()
        _thread.modes = (*_thread.modes, self)
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.modes = _thread.modes[:-1]
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.register_hook:
            tensor, hook = *args, *(kwargs or {}).values()
            return tensor.register_hook(guard_hook(hook))
        if func == _DATA and is_traced():  # which is shallow, as .detach_() is
            return args[0].detach()
        if func in (Tensor.detach_, torch.detach_) and is_traced():
            raise DerivativeError(
                "network: got .detach_(), which is wrong under torch.func. Write x = x.detach()."
            )
        primitive = self.table.get(func)
        if primitive is not None:
            _refuse_foreign_checkpoint()
        result = (primitive or func)(*args, **(kwargs or {}))
        if torch.compiler.is_compiling() or self.table is OF_ONE:
            return result
        if type(result) is Tensor and not result.requires_grad:
            arguments = *args, *(kwargs or {}).values()
            if torch.is_grad_enabled() and any(map(carries_gradient, arguments)):
                refuse_constant(func, result)
        return result


def _refuse_foreign_checkpoint() -> None:
    """Raise an error if torch's own checkpoint would recompute an operator without its primitive.

    A checkpoint that was already active when the mode was entered is either
    `hosm_losses.checkpoint` or one that surrounds the loss. In both cases, the recomputation
    enters the mode again.
    """
    if checkpoint_hook() not in (None, _thread.modes[-1].outer_hook):
        raise ForeignCheckpointError(CHECKPOINT_ADVICE)


def safe_primitives(
    enabled: bool = True, *, of_one_sample: bool = False
) -> AbstractContextManager[Any]:
    """Return a context manager that makes this thread use the primitives if `enabled`.

    If `of_one_sample`, use only the primitives needed for first derivatives in a batch of one.
    """
    return _SafePrimitives(OF_ONE if of_one_sample else PRIMITIVES) if enabled else nullcontext()


class _Transformable(TorchFunctionMode):
    """A mode in which primitives replace operators that torch.func may not support.

    Under vmap, PyTorch would warn, and would evaluate such an operator one sample at a time. The
    mode is active under every transform, not only under vmap. For example, jacrev applies vmap to
    the backward pass. By then the network has been evaluated, and it is too late to replace
    operators.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return (PRIMITIVES[func] if func in _PLAIN_ONLY else func)(*args, **(kwargs or {}))


def transformable(x: Tensor) -> AbstractContextManager[Any]:
    """Return a `_Transformable` mode if x is a plain tensor on the CPU, else a null context."""
    replaces = type(x) is Tensor and x.device.type == "cpu"
    return _Transformable() if replaces else nullcontext()


def refuse_constants() -> AbstractContextManager[Any]:
    """Return a context manager that rejects operators without a derivative.

    Unlike `safe_primitives`, this context manager replaces no operators.
    """
    return _SafePrimitives({})


def recomputable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call torch's non-reentrant checkpoint, and recompute with primitives if they are in use.

    The first computation also enters the mode again, after the checkpoint has set its hooks. The
    mode then does not reject this checkpoint as foreign.
    """
    if torch.compiler.is_compiling():  # which fails on context_fn, instead of running it eagerly
        torch._dynamo.graph_break()
    tables = [mode.table for mode in _thread.modes]

    def mode() -> AbstractContextManager[Any]:
        return _SafePrimitives(tables[-1]) if tables else nullcontext()

    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (mode(), mode()), **kwargs
    )


# ---------------------------------------------------------------------------------- the primitives
def _add_in_place(counter: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    """Add to batch norm's counter with `out=`, because torch.func forbids the in-place method."""
    if counter.is_floating_point():
        return counter.add_(other, alpha=alpha)
    return torch.add(counter, other, alpha=alpha, out=counter)


def _mish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """Use softplus, because PyTorch's second derivative is NaN for float32 inputs above 88."""
    result = input * torch.tanh(F.softplus(input))
    return input.copy_(result) if inplace else result


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:  # noqa: A002
    """Write a length-one slice because select_scatter's gradient is wrong under PyTorch's vmap."""
    place = range(input.shape[dim])[index]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, place, place + 1)


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:  # noqa: A002
    """Use a mask; PyTorch's index_fill is wrong under vmap if only the value is batched."""
    mask = torch.zeros_like(input, dtype=torch.bool).index_fill(dim, index, True)
    return torch.where(mask, value, input).to(input.dtype)


def _refuse(message: str, *_: Any, **__: Any) -> Tensor:
    raise DerivativeError(message)


NORMS = (
    "network: expected F.layer_norm, F.group_norm, F.batch_norm or F.instance_norm; got one of "
    "the functions behind them, such as torch.native_layer_norm, which PyTorch 2.6, 2.13 and 2.15 "
    "differentiate incorrectly."
)
NOT_A_NUMBER = (
    "network: expected no logcumsumexp, whose second derivative is NaN. Write torch.logsumexp."
)


def complete_primitives() -> None:
    """Register the primitives other than composites; call this after all composites are known."""
    refuse_norms = partial(_refuse, NORMS)
    primitives: dict[Any, Any] = {
        Tensor.add_: _add_in_place,
        F.mish: _mish,
        "logcumsumexp": partial(_refuse, NOT_A_NUMBER),
        Tensor.index_fill_: lambda x, *args, **named: x.copy_(_index_fill(x, *args, **named)),
        "select_scatter": _select_scatter,
        "index_fill": _index_fill,
        "native_layer_norm native_group_norm native_batch_norm": refuse_norms,
        "_native_batch_norm_legit _batch_norm_with_update": refuse_norms,
        torch.batch_norm: refuse_norms,
        torch.instance_norm: refuse_norms,
    }
    for names, primitive in primitives.items():
        for function in functions_named(names):
            PRIMITIVES[function] = primitive
    # torch.export programs call the aten operators, with the torch functions' arguments.
    for function, primitive in list(PRIMITIVES.items()):
        if not function.__name__.endswith("_"):
            PRIMITIVES.update(dict.fromkeys(operators(function.__name__), primitive))
    # For one sample in channels_last on the CPU, PyTorch gets even the first derivative wrong.
    for function in *functions_named("instance_norm"), *operators("instance_norm"):
        OF_ONE[function] = PRIMITIVES[function]
