r"""Random directions v with E[v vᵀ] = I.

What:
    A probe replaces a trace or a Frobenius norm by an average of matrix-vector products,
    E[vᵀ A v] = tr A and E‖A v‖² = ‖A‖²_F, so that a Jacobian is never built.

Formula:
    The variance of vᵀ A v is, with S = (A + Aᵀ)/2,
        Rademacher   4 Σ_{i<j} S_ij²          zero for a diagonal A, hence the default
        Gaussian     2 ‖S‖²_F
        sphere       2 d/(d + 2) (‖S‖²_F − (tr S)²/d)      radius √d
        dct          4 Σ_{i<j} (Q S Qᵀ)_ij²                v = Qᵀ ε with signs ε

    Q is the orthonormal discrete cosine transform along every dimension of a sample, that of the
    channels included: for three colours it is brightness and two opponent colours. Where
    neighbouring elements act on each other alike everywhere, as in images, Q S Qᵀ is nearer to
    diagonal than S.

Source:
    Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990); Skilling,
    "The eigenvalues of mega-dimensional matrices" (1989). Ahmed, Natarajan and Rao, "Discrete
    cosine transform", IEEE Transactions on Computers (1974), for Q.
"""

__all__ = ["DISTRIBUTIONS", "draw_probes", "unit_vectors"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hosm_losses._checks import check_choice


def _rademacher(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(0, 2, shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)


def _gaussian(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


def _sphere(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = _gaussian(shape, like, generator).reshape(*shape[:2], -1)
    unit = flat / flat.square().sum(-1, keepdim=True).sqrt()
    return (unit * math.sqrt(flat.shape[-1])).reshape(shape)


def _dct(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    wide = torch.promote_types(like.dtype, torch.float32)
    rotated = _rademacher(shape, like, generator).to(wide)
    # Autocast would round the products, after which E[v vᵀ] is no longer I.
    with torch.autocast(like.device.type, enabled=False):
        for dim in range(2, len(shape)):
            rotated = rotated.movedim(2, -1) @ _cosines(shape[dim], rotated)
    return rotated.to(like.dtype)


def _cosines(n: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II (n, n), frequencies by rows."""
    index = torch.arange(n, dtype=like.dtype, device=like.device)
    basis = torch.cos(math.pi / n * index[:, None] * (index[None] + 0.5)) * math.sqrt(2 / n)
    return torch.where(index[:, None] == 0, torch.full_like(basis, math.sqrt(1 / n)), basis)


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], Tensor, torch.Generator | None], Tensor]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
    "sphere": _sphere,
    "dct": _dct,
}


def draw_probes(
    like: Tensor,
    count: int = 1,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw `count` independent probes for every sample, on the device of the batch.

    Args:
        like: the batch (B, *) whose shape, dtype and device the probes take.
        count: K, the number of probes a sample.
        distribution: "rademacher" (signs), "gaussian", "sphere" (radius √d), or "dct" (signs
            in the basis of the discrete cosine transform).
        generator: the source of randomness; the global one of the device if None.

    Returns:
        Probes (K, B, *) with E[v vᵀ] = I over the elements of a sample.

    Raises:
        ValueError: for a distribution of another name or a count below 1.

    Example:
        >>> draw_probes(torch.zeros(2, 3), count=5).shape
        torch.Size([5, 2, 3])
    """
    check_choice("distribution", distribution, DISTRIBUTIONS)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"probes: expected a whole number of at least 1; got {count!r}.")
    return DISTRIBUTIONS[distribution]((count, *like.shape), like, generator)


def unit_vectors(like: Tensor) -> Tensor:
    """All d unit vectors as probes (d, B, *): with them a SUM over probes is exact.

    Example:
        >>> unit_vectors(torch.zeros(2, 3))[:, 0]
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    d = like[0].numel()
    eye = torch.eye(d, dtype=like.dtype, device=like.device)
    return eye.reshape(d, 1, *like.shape[1:]).expand(d, *like.shape)
