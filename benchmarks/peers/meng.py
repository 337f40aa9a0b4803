r"""The second-order loss of Meng et al., written for comparison from its formula.

Formula, in the letters of `hosm_losses.losses`:
    Tweedie's formula for second moments says that s₂ + s₁ s₁ᵀ is the conditional mean of
    (ε εᵀ − I)/σ². Along a probe v, and with σ² s₂ v = D, the residual of that regression is

        r₂ = D + v − (ε·v) ε + (f·v) f,        f held fixed.

    Its conditional mean is zero at the true score, as is that of this library's residual
    D + v − (ℓ·v) ℓ, ℓ = ε + f. An error δ in f moves the minimiser by −(f* δᵀ + δ f*ᵀ + δ δᵀ), f*
    the true value: of first order in δ, where with ℓ it is moved by δ δᵀ.

What differs from the paper:
    There a second network stands for s₂. Here the Jacobian of the one network is matched, so that
    the two losses are compared on the same network. The paper's control variate, with noises ε
    and −ε and evaluations at three points, is left out.

Source:
    Meng, Song, Li and Ermon, "Estimating High Order Gradients of the Data Distribution by
    Denoising", NeurIPS 2021, arXiv 2111.04726.
"""

from typing import Any

import torch
from torch import Tensor

import hosm_losses as hosm
from hosm_losses.model import noise_field
from hosm_losses.probes import draw_probes, unit_vectors


def second_residual(value: Tensor, directional: Tensor, noise: Tensor, probe: Tensor) -> Tensor:
    """r₂ (K, B, *) of f (1, B, *), D (K, B, *), ε (B, *) and v (K, B, *)."""
    return directional + probe - _along(noise, probe) + _along(value.detach(), probe)


def second_term(model: hosm.ScoreModel, x0: Tensor, **given: Any) -> Tensor:
    """‖r₂‖²/d² of every sample, (B,); arguments as those of `terms`."""
    return terms(model, x0, **given)[1]


def second_order_loss(
    model: hosm.ScoreModel, x0: Tensor, *, weights: tuple[float, float], **given: Any
) -> Tensor:
    """The first and the second term, weighted and averaged over the batch."""
    first, second = terms(model, x0, **given)
    return (weights[0] * first + weights[1] * second).mean()


def terms(
    model: hosm.ScoreModel,
    x0: Tensor,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    probe: Tensor | None = None,
    probes: int | str = 1,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """‖f + ε‖²/d and ‖r₂‖²/d², (B,), with arguments and draws as those of `hosm.dsm_terms`."""
    d, ones = x0[0].numel(), (1,) * (x0.ndim - 1)
    t = model.schedule.sample_time(len(x0), generator) if t is None else t
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype) if noise is None else noise
    alpha, sigma = (part.reshape(-1, *ones) for part in model.schedule(t))
    if probe is not None:
        v = probe.reshape(-1, *x0.shape)
    elif probes == "exact":
        v = unit_vectors(x0)
    else:
        v = draw_probes(x0, probes, distribution, generator)
    value, directional, _ = noise_field(model, t).derive(
        alpha * x0 + sigma * noise, sigma * v, order=2
    )
    first = (value + noise).square().reshape(len(x0), -1).sum(1) / d
    squares = second_residual(value, directional, noise, v).square().flatten(2).sum(2)
    # Over the unit vectors the squares add up to what is their mean over random ones.
    return first, (squares.sum(0) if probes == "exact" else squares.mean(0)) / d**2


def _along(vector: Tensor, probe: Tensor) -> Tensor:
    """(a·v) a for a (B, *) or (1, B, *), of the shape of v (K, B, *)."""
    inner = (vector * probe).flatten(2).sum(2)
    return inner.reshape(*inner.shape, *(1,) * (probe.ndim - 2)) * vector
