"""Operators whose forward derivative in PyTorch is wrong, or is not differentiated rightly."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from hosm_losses.taylor._torch import of_a_package, operators


def _every(names: str) -> set[Any]:
    """The functions and methods of PyTorch with these names, and the operators below them."""
    homes = (torch, torch.Tensor, torch.linalg, F)
    found = [getattr(home, name, None) for home in homes for name in names.split()]
    below = [each for name in names.split() for each in operators(name)]
    return {each for each in (*found, *below) if each is not None}


# What PyTorch derives in forward mode by a formula that it does not differentiate rightly:
# cumprod where a factor is zero, and those of the second row where it derives them twice.
_FORWARD = _every(
    "solve solve_ex tensorsolve det slogdet logdet householder_product orgqr cumprod cumprod_ "
    "cholesky_inverse linear_cross_entropy "
    "eigh eigvalsh copysign copysign_ renorm renorm_ cosine_embedding_loss triplet_margin_loss"
)
# And these where they multiply.
_PRODUCTS = _every("scatter_reduce index_reduce scatter_reduce_ index_reduce_")
WRONG = (
    "PyTorch's derivative of it in forward mode is not differentiated rightly. Write it with "
    "other operators, or leave derivative at 'auto', which takes the engine 'reverse'."
)


def wrong_in_forward_mode(function: object, args: Iterable[Any], named: Mapping[str, Any]) -> bool:
    """Whether PyTorch gets a function's forward derivative, or the gradient of it, wrong.

    Of a package's own operator, as `torch.library.custom_op` makes it, it takes it for zero.
    """
    if of_a_package(function):
        return True
    if function in _PRODUCTS:
        return any(isinstance(each, str) and each == "prod" for each in (*args, *named.values()))
    return function in _FORWARD
