r"""Estimators of quadratic forms from probes, and their variances in closed form.

Formula:
    The variance of vᵀ B v with S = (B + Bᵀ)/2 is
        rademacher   Σ_{i<j} (B_ij + B_ji)²
        gaussian     2 ‖S‖²_F
        sphere       2 d/(d + 2) (‖S‖²_F − (tr S)²/d)
        dct          that of signs, of Q S Qᵀ
    and of the mean over K independent probes 1/K of it. K of the d unit vectors, times √d and
    without replacement, have d²/K (d − K)/(d − 1) Var_i(B_ii), zero at K = d. Orthogonal
    directions (Q of a Gaussian matrix, times √d) and Hutch++ have no such formula here.

Source:
    Avron and Toledo, "Randomized algorithms for estimating the trace of an implicit symmetric
    positive semi-definite matrix" (2011); Meyer et al., "Hutch++", arXiv 2010.09649.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hosm_losses.probes import DISTRIBUTIONS, draw_probes

UNITS, ORTHOGONAL, HUTCHPP = "unit vectors", "orthogonal", "Hutch++"
# Those that draw probes first and look at the matrix afterwards.
SAMPLERS = (*DISTRIBUTIONS, UNITS, ORTHOGONAL)


def can_draw(name: str, count: int, elements: int) -> bool:
    """Whether there are so many probes of the kind in d dimensions."""
    return name in DISTRIBUTIONS or count <= elements


def draw(
    name: str, repeats: int, count: int, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """Probes (repeats, count, d) of a sampler, in float32."""
    elements = torch.Size(shape).numel()
    if name in DISTRIBUTIONS:
        like = torch.empty(repeats, *shape)
        return draw_probes(like, count, name, generator).transpose(0, 1).flatten(2)
    if name == UNITS:
        order = torch.rand(repeats, elements, generator=generator).argsort(1)[:, :count]
        return torch.nn.functional.one_hot(order, elements).float() * elements**0.5
    columns = torch.randn(repeats, elements, count, generator=generator)
    return torch.linalg.qr(columns).Q.transpose(1, 2) * elements**0.5


def known_variance(name: str, forms: Tensor, count: int, shape: tuple[int, ...]) -> float | None:
    """Variance of the mean over `count` probes of vᵀ B_k v, summed over k; None where not known.

    Args:
        name: of the sampler.
        forms: B, symmetric, (m, d, d).
        count: of probes.
        shape: of a sample, which "dct" knows about.
    """
    d = forms.shape[-1]
    diagonal = forms.diagonal(dim1=-2, dim2=-1)
    square = forms.square().sum()
    if name == "dct":
        return known_variance("rademacher", _rotated(forms, shape), count, shape)
    if name == UNITS:
        if d == 1:
            return 0.0
        spread = diagonal.var(1, correction=0).sum()
        return float(d**2 / count * (d - count) / (d - 1) * spread)
    if name == "rademacher":
        return float(2 * (square - diagonal.square().sum()) / count)
    if name == "gaussian":
        return float(2 * square / count)
    if name == "sphere":
        return float(2 * d / (d + 2) * (square - diagonal.sum(1).square().sum() / d) / count)
    return None


def _rotated(forms: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Q B Qᵀ, with Q from scipy's own transform and not the library's."""
    from scipy.fft import dctn

    def along(array: Tensor) -> Tensor:
        rows = array.reshape(-1, *shape).numpy()
        axes = tuple(range(1, rows.ndim))
        return torch.from_numpy(dctn(rows, axes=axes, norm="ortho")).reshape(array.shape)

    return along(along(forms).transpose(-1, -2).contiguous()).transpose(-1, -2)


def hutchpp() -> Callable[[Tensor, int], Tensor] | None:
    """Hutch++ of curvlinops, (A, K) → estimate of tr A; None where it is not installed."""
    try:
        from curvlinops import hutchpp_trace
    except ImportError:
        return None
    return hutchpp_trace
