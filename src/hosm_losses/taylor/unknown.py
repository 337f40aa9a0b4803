r"""Derivatives of functions without a rule, by nested torch.func.jvp.

Those of a few operators PyTorch does not differentiate rightly again: they are refused. So are
operators that it does not differentiate at all, such as torch.special.bessel_j0, in both engines.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor._torch import forward_mode, of_a_package, operators, pytree
from hosm_losses.taylor.errors import ConstantError
from hosm_losses.taylor.registry import CONSTANT, functions_named, name_of
from hosm_losses.taylor.stacks import Pairs, collect, extend

Tensors = tuple[Tensor, ...]


def _operators_named(names: str) -> set[Any]:
    """The functions and methods of PyTorch with these names, and the operators below them."""
    return {*functions_named(names), *(each for name in names.split() for each in operators(name))}


# What PyTorch derives in forward mode by a formula that it does not differentiate rightly:
# cumprod where a factor is zero, and those of the second row where it derives them twice.
_FORWARD = _operators_named(
    "solve solve_ex tensorsolve det slogdet logdet householder_product orgqr cumprod cumprod_ "
    "cholesky_inverse linear_cross_entropy dist pairwise_distance matrix_norm float_power "
    "cosine_similarity "
    "eigh eigvalsh copysign copysign_ renorm renorm_ cosine_embedding_loss triplet_margin_loss"
)
# And these where they multiply.
_PRODUCTS = _operators_named("scatter_reduce index_reduce scatter_reduce_ index_reduce_")
WRONG = (
    "PyTorch's derivative of it in forward mode is not differentiated rightly. Write it with "
    "other operators."
)
# Functions that take the type or the shape of an argument alone; and torch.tensor, which detaches.
_CONSTANT_TOO = ("to", "type_as", "view_as", "reshape_as", "expand_as", "fill", "fill_", "tensor")


def wrong_in_forward_mode(function: object, args: Iterable[Any], named: Mapping[str, Any]) -> bool:
    """Whether PyTorch gets a function's forward derivative, or the gradient of it, wrong.

    Of a package's own operator, as `torch.library.custom_op` makes it, it takes it for zero.
    """
    if of_a_package(function):
        return True
    if function in _PRODUCTS:
        return any(isinstance(each, str) and each == "prod" for each in (*args, *named.values()))
    return function in _FORWARD


def refuse_constant(function: Any, result: Tensor) -> None:
    """Raise for a result without a derivative, of a function of what carries derivatives.

    It may be a constant on purpose: a new tensor, a draw, or what is detached.
    """
    if not result.is_floating_point() or function in CONSTANT:
        return
    # An operator of torch.ops.aten has a name such as new_zeros.default.
    name = name_of(function).split(".")[0]
    if name in _CONSTANT_TOO or any(name == name_of(each) for each in CONSTANT):
        return
    raise ConstantError(
        f"network: expected operators that PyTorch differentiates; got {name}, which it takes for "
        "a constant. Write it with other operators, or give it x.detach() if it is meant as one."
    )


def along(
    function: Callable[..., Any], values: Tensors, derivatives: Tensors, firsts: int, pairs: Pairs
) -> list[Tensor]:
    """The stacks of the results of a function, value first; in one evaluation.

    `derivatives` has for each value the stack of its `firsts` first derivatives and, unless they
    are zero, of its second ones.
    """
    inner: Any = partial(torch.func.jvp, function)

    def second(tangents: Tensors, seconds: Tensors) -> Any:
        found: Any = torch.func.jvp(inner, (values, tangents), (tangents, seconds))
        (value, first), (_, second) = found
        return value, first, second

    if pairs == "none":
        value, *parts = _map_directions(partial(inner, values), derivatives)
    else:
        tangents = tuple(each[:firsts] for each in derivatives)
        # Of a sum the first direction has it all.
        seconds = tuple(extend(each[firsts:], firsts) for each in derivatives)
        value, *parts = _map_directions(second, tangents, seconds)
        parts[1] = pytree.tree_map(partial(collect, pairs=pairs), parts[1])
    stacks = zip(value, *parts, strict=True)
    return [torch.cat([one.unsqueeze(0), *rest]) for one, *rest in stacks]


def _map_directions(function: Callable[..., Any], *args: Tensors) -> Any:
    """(value, *derivatives) of a function for several directions.

    Under vmap where there are several: one mask of a dropout then serves all of them.
    """
    with forward_mode():
        if torch.compiler.is_compiling():
            # PyTorch asks for the offset of a view, which it does not know for all sizes.
            args = pytree.tree_map(torch.clone, args)
        if len(args[0][0]) > 1:
            outs: Any = (None, *(0,) * len(args))
            return torch.func.vmap(function, out_dims=outs, randomness="same")(*args)
        value, *parts = function(*pytree.tree_map(lambda stack: stack[0], args))
    return value, *pytree.tree_map(lambda part: part.unsqueeze(0), parts)
