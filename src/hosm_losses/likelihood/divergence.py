r"""The divergence of a field, with its value, in one pass.

What:
    ∇·f = tr ∂f/∂x, exactly from the d unit vectors, or estimated from K random probes. The forward
    pass is shared; every direction costs one vector-Jacobian product.

Formula:
    exact        ∇·f = Σ_i e_iᵀ ∂f/∂x e_i
    hutchinson   ∇·f = E[vᵀ ∂f/∂x v], the mean of K probes with variance Var[vᵀ ∂f/∂x v]/K

Source:
    Grathwohl et al., "FFJORD", arXiv 1810.01367, for the estimator in a likelihood.
"""

__all__ = ["DIVERGENCES", "Divergence", "exact_divergence", "hutchinson_divergence"]

from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses.model import NoiseField
from hosm_losses.probes import unit_vector_chunks

DIVERGENCES = ("exact", "hutchinson")
CHUNK_ELEMENTS = 2**22


class Divergence(NamedTuple):
    """A field's value and divergence.

    Attributes:
        value: f, of shape (B, *).
        samples: K independent estimates of ∇·f, (K, B); one, without error, where it is exact.
    """

    value: Tensor
    samples: Tensor


def exact_divergence(field: NoiseField, x: Tensor) -> Divergence:
    """Value and divergence from all unit vectors, as many at once as memory easily holds.

    It takes d vector-Jacobian products, in passes back of 2²² elements: for one sample of d = 10⁶
    that is 250,000 passes of four products, in the memory of five evaluations.

    Args:
        field: a function of x that treats every sample alone.
        x: the point (B, *).

    Returns:
        The value and the divergence, samples of shape (1, B).

    Example:
        >>> from hosm_losses import ScoreModel, VPSchedule
        >>> from hosm_losses.model import noise_field
        >>> model = ScoreModel(lambda x, t: -(x**2), VPSchedule())
        >>> field = noise_field(model, torch.tensor([0.5]))
        >>> exact_divergence(field, torch.tensor([[1.0, 2.0]])).samples.item()
        6.0
    """
    chunk = max(1, CHUNK_ELEMENTS // x.numel())
    value, forms = field.quadratic_forms(x, unit_vector_chunks(x, chunk))
    return Divergence(value, forms.to(accumulator(x)).sum(0, keepdim=True))


def hutchinson_divergence(field: NoiseField, x: Tensor, probes: Tensor) -> Divergence:
    """Value and K estimates of the divergence.

    Args:
        field: a function of x that treats every sample alone.
        x: the point (B, *).
        probes: v, of shape (K, B, *).

    Returns:
        The value and the estimates, samples of shape (K, B).
    """
    value, forms = field.quadratic_forms(x, [probes])
    return Divergence(value, forms.to(accumulator(x)))


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64, but float32 on devices that have no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64
