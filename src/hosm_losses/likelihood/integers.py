r"""Integer images: their dequantization, and one density from several draws of it.

Formula:
    Uniform noise u in [0, 1) spreads each integer k over its cell. With K draws of it
    x = low + (high − low)(k + u)/levels;    −log P(k) ≤ E[−log (1/K) Σ_j p(k + u_j)]
    Here −log p is that of x; `bits_per_dim` accounts for the width of a cell.

Source:
    Theis et al., arXiv 1511.01844, for the uniform dequantization; Burda et al.,
    arXiv 1509.00519, and Ho et al., arXiv 1902.00275, for the importance-weighted bound.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hosm_losses._checks import check_choice, check_dense, check_not_empty, complaint
from hosm_losses.likelihood.paths import accumulator
from hosm_losses.likelihood.result import NLLResult, Quantization

Dequantization = Literal["uniform"]
EIGHT_BITS = Quantization(256, -1.0, 1.0)


def dequantize(levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x = −1 + 2 (k + u)/256 for uint8 levels k, in the precision of sums."""
    dtype, device = accumulator(levels), levels.device
    u = torch.rand(levels.shape, generator=generator, dtype=dtype, device=device)
    return EIGHT_BITS.low + (EIGHT_BITS.high - EIGHT_BITS.low) * (levels + u) / EIGHT_BITS.levels


def importance_weighted(draws: Sequence[NLLResult]) -> NLLResult:
    """−log of the mean density over K draws of u, from one result for each.

    `latent` is the first draw's, nfe is the sum, errors are averaged as the densities weigh them.
    """
    first = replace(draws[0], quantization=EIGHT_BITS)
    if len(draws) == 1:
        return first

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(draw, name) for draw in draws])

    log_density = -stacked("nll")
    weight = torch.softmax(log_density.detach(), 0)
    return replace(
        first,
        nll=math.log(len(draws)) - log_density.logsumexp(0),
        nfe=stacked("nfe").sum(0),
        solver_error=(weight * stacked("solver_error")).sum(0),
        failed=stacked("failed").any(0),
    )


def check_draws(draws: int, dequantization: str | None, divergence: str) -> None:
    """Raise ValueError for several draws of u where there is none, or where they would flatter.

    With 7 nats of noise in log p, as of Hutchinson's estimator, 20 draws seem to gain 11 nats.
    """
    if dequantization is None:
        remedy = "Give integer images and dequantization='uniform'."
        raise ValueError(complaint("dequantization_draws", "1 for continuous data", draws, remedy))
    if divergence != "exact":
        remedy = (
            "The mean of exp(log p) turns the noise of log p into a gain, which flatters the "
            "model: use divergence='exact'."
        )
        expected = f"1 with divergence={divergence!r}"
        raise ValueError(complaint("dequantization_draws", expected, draws, remedy))


def check_images(x: object, dequantization: str) -> None:
    """Raise unless x is uint8 (B, *) and the dequantization one that there is."""
    check_choice("dequantization (or None)", dequantization, ("uniform",))
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        expected = "a uint8 tensor (B, *) of levels 0 to 255 with dequantization='uniform'"
        remedy = (
            "Leave dequantization=None for continuous data, or dequantize it yourself and give "
            "levels, low and high to bits_per_dim."
        )
        raise TypeError(complaint("x", expected, x, remedy))
    check_dense("x", x)
    check_not_empty("x", x)
