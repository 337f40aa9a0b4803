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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hosm_losses._checks import check_dense, check_not_empty, check_whole, complaint
from hosm_losses.likelihood.paths import Divergence, accumulator
from hosm_losses.likelihood.result import NLLResult, Quantization

EIGHT_BITS = Quantization(256, -1.0, 1.0)


@dataclass(frozen=True)
class Uniform:
    """Uniform dequantization of uint8 images: x = −1 + 2 (k + u)/256 with u uniform on [0, 1).

    Args:
        draws: K draws of u, and of the noise if `clean`, whose densities are averaged for a
            tighter bound, at K times the cost; above 1 with divergence="exact" alone.

    Raises:
        ValueError: for draws that are no whole number of at least 1.

    Example:
        >>> Uniform()
        Uniform(draws=1)
    """

    draws: int = 1

    def __post_init__(self) -> None:
        """Check the field."""
        object.__setattr__(self, "draws", check_whole("Uniform.draws", self.draws, 1))


def check_dequantization(value: object, divergence: Divergence | None = "exact") -> None:
    """Raise for another value, or for several draws of u where they would flatter.

    With 7 nats of noise in log p, as of Hutchinson's estimator, 20 draws seem to gain 11 nats.
    """
    if not (value is None or isinstance(value, Uniform)):
        raise ValueError(complaint("dequantization", "Uniform(...) or None", value))
    if value is not None and value.draws > 1 and divergence != "exact":
        raise ValueError(
            f"dequantization: expected one draw with divergence={divergence!r}; got "
            f"{value.draws}. The mean of exp(log p) turns the noise of log p into a gain, which "
            "flatters the model: use divergence='exact'."
        )


def check_images(x: object) -> None:
    """Raise unless x is uint8 (B, *)."""
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        expected = "a uint8 tensor (B, *) of levels 0 to 255 with dequantization=Uniform()"
        remedy = "Dequantize other data yourself, and give levels, low and high to bits_per_dim."
        raise TypeError(complaint("x", expected, x, remedy))
    check_dense("x", x)
    check_not_empty("x", x)


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
