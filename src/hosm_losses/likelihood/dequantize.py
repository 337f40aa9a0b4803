r"""The likelihood of integers from that of continuous data.

What:
    A density says nothing about 8-bit images. Uniform noise u in [0, 1) spreads each integer k
    over its cell, and the density of k + u bounds the probability of k.

Formula:
    x = low + (high − low)(k + u)/levels;    −log P(k) ≤ E_u[−log p(k + u)]
    With K draws of u the bound is tighter:    −log P(k) ≤ E[−log (1/K) Σ_j p(k + u_j)]
    Here −log p is that of x; `bits_per_dim` accounts for the width of a cell.

Noise:
    The second bound averages densities. Noise in log p, as of Hutchinson's estimator, has a
    positive mean after the exponential: with 7 nats of it 20 draws seem to gain 11 nats. So it is
    for the exact divergence alone.

Source:
    Theis et al., arXiv 1511.01844, for the uniform dequantization; Burda et al.,
    arXiv 1509.00519, and Ho et al., arXiv 1902.00275, for the importance-weighted bound.
"""

__all__ = ["check_dequantization", "dequantize", "importance_weighted"]

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hosm_losses._checks import (
    check_choice,
    check_dense,
    check_not_empty,
    check_sample_batch,
    check_whole,
    describe,
)
from hosm_losses.likelihood.divergence import accumulator
from hosm_losses.likelihood.result import NLLResult, Quantization

EIGHT_BITS = Quantization(256, -1.0, 1.0)


def check_dequantization(
    x: object, dequantization: str | None, draws: int, divergence: str = "exact"
) -> int:
    """Return the number of draws if x is what the dequantization needs.

    Args:
        x: uint8 (B, *) with "uniform", floating point without.
        dequantization: None or "uniform".
        draws: the number of draws of u.
        divergence: "exact" or "hutchinson".

    Returns:
        The number of draws, as an int.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for another name, or several draws where they would flatter.
    """
    if dequantization is not None:
        check_choice("dequantization (or None)", dequantization, ("uniform",))
    draws = check_whole("dequantization_draws", draws, 1)
    if draws > 1 and dequantization is None:
        raise ValueError(
            f"dequantization_draws: expected 1 for continuous data; got {draws}. Give integer "
            "images and dequantization='uniform'."
        )
    if draws > 1 and divergence != "exact":
        raise ValueError(
            f"dequantization_draws: expected 1 with divergence={divergence!r}; got {draws}. The "
            "mean of exp(log p) turns the noise of log p into a gain, which flatters the model: "
            "use divergence='exact'."
        )
    if dequantization is None:
        check_sample_batch("x", x)
        return draws
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        raise TypeError(
            f"x: expected a uint8 tensor (B, *) of levels 0 to 255 with dequantization='uniform'; "
            f"got {describe(x)}. Leave dequantization=None for continuous data, or dequantize it "
            "yourself and give levels, low and high to bits_per_dim."
        )
    check_dense("x", x)
    check_not_empty("x", x)
    return draws


def dequantize(levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Spread uint8 levels over their cells, from −1 to 1.

    Args:
        levels: k, of any shape.
        generator: the source of u.

    Returns:
        x = −1 + 2 (k + u)/256, in the precision of sums.

    Example:
        >>> x = dequantize(torch.tensor([0, 255], dtype=torch.uint8))
        >>> bool(-1 <= x[0] < x[1] < 1)
        True
    """
    dtype, device = accumulator(levels), levels.device
    u = torch.rand(levels.shape, generator=generator, dtype=dtype, device=device)
    return EIGHT_BITS.low + (EIGHT_BITS.high - EIGHT_BITS.low) * (levels + u) / EIGHT_BITS.levels


def importance_weighted(draws: Sequence[NLLResult]) -> NLLResult:
    """Combine the results of K draws of u into −log of their mean density.

    Args:
        draws: one result a draw, for the same samples in the same order.

    Returns:
        The bound. `latent` is that of the first draw, nfe is the sum, and the errors are averaged
        as the densities weigh them.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> draws = [NLLResult(n, one[None], one, zero, zero, zero > 1) for n in (one, 3 * one)]
        >>> round(importance_weighted(draws).nll.item(), 4)
        1.5662
    """
    first = replace(draws[0], quantization=EIGHT_BITS)
    if len(draws) == 1:
        return first
    log_density = -torch.stack([draw.nll for draw in draws])
    weight = torch.softmax(log_density.detach(), 0)
    return replace(
        first,
        nll=math.log(len(draws)) - log_density.logsumexp(0),
        nfe=torch.stack([draw.nfe for draw in draws]).sum(0),
        solver_error=(weight * torch.stack([draw.solver_error for draw in draws])).sum(0),
        failed=torch.stack([draw.failed for draw in draws]).any(0),
    )
