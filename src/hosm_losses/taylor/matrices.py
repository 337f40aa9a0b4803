r"""Rules for square matrices: determinants, inverses, linear systems and Cholesky factors.

Formulas for the first and second derivatives along l, where X = A⁻¹ is computed once:
    log|det A|    tr(X A_l)                    tr(X A_ll) − tr((X A_l)²)
    det A         det A tr(X A_l)              det A (tr(X A_ll) − tr((X A_l)²) + tr(X A_l)²)
    A Y = B       Y_l = X (B_l − A_l Y)        Y_ll = X (B_ll − A_ll Y − 2 A_l Y_l)
    A = L Lᵀ      L_l = L Φ(A_l)               L_ll = L Φ(A_ll − 2 L_l L_lᵀ)
    Φ(M) is the lower triangle of L⁻¹ M L⁻ᵀ with its diagonal halved, where M is first
    symmetrised, as in PyTorch's gradients. The inverse of A is the solution Y if B is the identity
    matrix.

Gradients are computed by autograd through products and an inverse, which PyTorch differentiates
correctly at every order. In reverse mode, PyTorch also differentiates log|det A|, det A and L
correctly. In forward mode, PyTorch versions before 2.15 have a bug: under vmap, the jvp of the
grad of slogdet is correct only for the first sample.

Precision: if A has condition number κ, results lose up to log10 κ digits. Float32 has only seven
digits, so use float64 for nearly singular matrices. For an exactly singular matrix, the
derivatives of the determinant are NaN, and PyTorch raises an error for the inverse and for linear
systems.

Source:
    Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
    differentiation" (2008); Murray, "Differentiation of the Cholesky decomposition" (2016).
"""

from typing import Any

import torch
from torch import Tensor

from hosm_losses.taylor._torch import without_autocast
from hosm_losses.taylor.jets import Jet, jet_among
from hosm_losses.taylor.registry import Function, NoRule, rule
from hosm_losses.taylor.stacks import align, collect, components, extend


def _components(stack: Tensor, jet: Jet) -> tuple[Tensor, Tensor, Tensor]:
    """Append the zero derivatives that a stack omits, then split the stack into components."""
    seconds = {"none": 0, "sum": 1}.get(jet.pairs, jet.firsts)
    return components(extend(stack, 1 + jet.firsts + seconds), jet.firsts)


# ------------------------------------------------------------------------------------ determinants
def _of_log_determinant(A: Jet) -> tuple[Tensor, Tensor]:
    """The first and second derivatives of log|det A|."""
    value, tangents, seconds = _components(A.stack, A)
    with without_autocast(value.device.type):
        # inv_ex instead of inv, whose check for errors would synchronise an accelerator.
        inverse, info = torch.linalg.inv_ex(value)
        inverse = inverse.where(info[..., None, None] == 0, torch.nan)
        products = inverse @ tangents
    squares = collect((products * products.mT).sum((-2, -1)), A.pairs)[: len(seconds)]
    bends = (inverse.mT * seconds).sum((-2, -1)) - squares
    return products.diagonal(dim1=-2, dim2=-1).sum(-1), bends


@rule("slogdet", kind="stack", with_function=True)
def _slogdet(function: Function, A: Jet) -> Any:
    sign, value = answer = function(A.stack[0])
    # A named tuple; its type differs between torch.slogdet and torch.linalg.slogdet.
    return type(answer)((sign, A.like(torch.cat([value[None], *_of_log_determinant(A)]))))


@rule("logdet", kind="stack")
def _logdet(A: Jet) -> Jet:
    sign, logarithm = _slogdet(torch.slogdet, A)
    return A.like(logarithm.stack.where(sign >= 0, torch.nan))


@rule("det", kind="stack")
def _det(A: Jet) -> Jet:
    value = torch.linalg.det(A.stack[:1])
    firsts, seconds = _of_log_determinant(A)
    seconds = seconds + collect(firsts.square(), A.pairs)[: len(seconds)]
    return A.like(torch.cat([value, value * firsts, value * seconds]))


# --------------------------------------------------------------------------------------- solutions
@rule(torch.linalg.solve, several=True, kind="stack")  # torch.solve belongs to older PyTorch
def _solve(A: Any, B: Any, *, left: bool = True) -> Jet:
    vector = B.ndim == 1 or B.shape == A.shape[:-1]
    if A.ndim < 2 or (vector and not left):  # left for PyTorch to refuse
        raise NoRule
    a, b = (x.stack if isinstance(x, Jet) else x.unsqueeze(0) for x in (A, B))
    b = b.unsqueeze(-1) if vector else b
    a, b = (a, b) if left else (a.mT, b.mT)
    jet = jet_among((A, B))
    with without_autocast(a.device.type):
        y = _solution(align(a, b.ndim - 1), align(b, a.ndim - 1), jet)
    return jet.like(y.squeeze(-1) if vector else y if left else y.mT)


def _solution(A: Tensor, B: Tensor, jet: Jet) -> Tensor:
    """Return the stack of Y, where A Y = B; either A or B may be a stack without derivatives."""
    inverse = torch.linalg.inv(A[:1])
    if len(A) == 1:
        return inverse @ B
    _, A_tangents, A_seconds = _components(A, jet)
    value, tangents, seconds = _components(B, jet)
    value = inverse @ value
    tangents = inverse @ (tangents - A_tangents @ value)
    if jet.pairs == "none":
        return torch.cat([value, tangents])
    squares = collect(2 * A_tangents @ tangents, jet.pairs)
    return torch.cat([value, tangents, inverse @ (seconds - A_seconds @ value - squares)])


@rule("inv inverse", kind="stack")
def _inv(A: Jet) -> Jet:
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return _solve(A, one.expand(A.shape))


@rule("cholesky", kind="stack")
def _cholesky(A: Jet, upper: bool = False) -> Jet:
    value, tangents, seconds = _components(A.stack.mT if upper else A.stack, A)
    with without_autocast(value.device.type):
        L = torch.linalg.cholesky(value)
        inverse = torch.linalg.inv(L)

        def factor(change: Tensor) -> Tensor:
            symmetric = inverse @ ((change + change.mT) / 2) @ inverse.mT
            return L @ (symmetric.tril() + symmetric.tril(-1)) / 2

        tangents = factor(tangents)
        if A.pairs != "none":
            seconds = factor(seconds - collect(2 * tangents @ tangents.mT, A.pairs))
    stack = torch.cat([L, tangents, seconds])
    return A.like(stack.mT if upper else stack)
