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

import torch
from torch import Tensor

from hosm_losses.probes import DISTRIBUTIONS, draw_probes

UNITS, ORTHOGONAL = "unit vectors", "orthogonal"
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
    if name == "dct":
        return known_variance("rademacher", _rotated(forms, shape), count, shape)
    d, diagonal = forms.shape[-1], forms.diagonal(dim1=-2, dim2=-1)
    square, traces = forms.square().sum(), diagonal.sum(1).square().sum()
    spread = diagonal.var(1, correction=0).sum()
    variances = {
        "rademacher": 2 * (square - diagonal.square().sum()),
        "gaussian": 2 * square,
        "sphere": 2 * d / (d + 2) * (square - traces / d),
        UNITS: d**2 * (d - count) / max(d - 1, 1) * spread,
    }
    return float(variances[name] / count) if name in variances else None


def _rotated(forms: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Q B Qᵀ, with Q from scipy's own transform and not the library's."""
    from scipy.fft import dctn

    def along(array: Tensor) -> Tensor:
        rows = array.reshape(-1, *shape).numpy()
        axes = tuple(range(1, rows.ndim))
        return torch.from_numpy(dctn(rows, axes=axes, norm="ortho")).reshape(array.shape)

    return along(along(forms).transpose(-1, -2).contiguous()).transpose(-1, -2)
