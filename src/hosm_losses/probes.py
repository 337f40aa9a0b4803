r"""Random directions v with E[v vᵀ] = I.

What:
    A probe replaces a trace or a Frobenius norm by an average of matrix-vector products,
    E[vᵀ A v] = tr A and E‖A v‖² = ‖A‖²_F, so that a Jacobian is never built.

Formula:
    The variance of vᵀ A v is, with S = (A + Aᵀ)/2,
        Rademacher   4 Σ_{i<j} S_ij²          zero for a diagonal A, hence the default
        Gaussian     2 ‖S‖²_F
        sphere       2 d/(d + 2) (‖S‖²_F − (tr S)²/d)      radius √d

Source:
    Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990); Skilling,
    "The eigenvalues of mega-dimensional matrices" (1989).
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


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], Tensor, torch.Generator | None], Tensor]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
    "sphere": _sphere,
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
        distribution: "rademacher" (signs), "gaussian", or "sphere" (radius √d).
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
