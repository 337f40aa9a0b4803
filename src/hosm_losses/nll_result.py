r"""What a likelihood is reported as.

Formula:
    bits/dim = nll/(d ln 2) + log2(levels/(high − low))
    for data of `levels` levels, dequantized as x = low + (high − low)(k + u)/levels with u uniform
    on [0, 1): its density per element is levels/(high − low) times that of k + u.

Source:
    Theis et al., "A note on the evaluation of generative models", arXiv 1511.01844.
"""

__all__ = ["NLLResult"]

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NLLResult:
    """The negative log-likelihood of a batch.

    Attributes:
        nll: −log p(x) in nats, (B,).
        latent: the image of x at t_max, in the coordinates of x, (B, *).
        nfe: network evaluations, one a value with its divergence, (B,).
        standard_error: of nll, from the random probes, (B,); None where it is not known.
        solver_error: estimate of what the solver is off, in nats, (B,). On the fixed grid with
            random probes it covers the path alone, for the quadrature's part hides in the noise;
            with the adaptive method it is the sum of the integral's local errors alone.
        failed: where the number is not to be used, (B,).
    """

    nll: Tensor
    latent: Tensor
    nfe: Tensor
    standard_error: Tensor | None
    solver_error: Tensor
    failed: Tensor

    def bits_per_dim(
        self, levels: int | None = None, low: float = -1.0, high: float = 1.0
    ) -> Tensor:
        """Bits per dimension: nll/(d ln 2), and for data of `levels` levels that of the integers.

        Args:
            levels: 256 for 8-bit images that were dequantized and scaled to [low, high]: it adds
                log2(levels/(high − low)). None for continuous data.
            low: what level 0 was scaled to.
            high: what level `levels` was scaled to.

        Returns:
            Bits per dimension, (B,).

        Example:
            >>> import torch
            >>> one = torch.ones(1)
            >>> result = NLLResult(one * 0, torch.zeros(1, 3), one, None, one, one > 2)
            >>> result.bits_per_dim(levels=256)
            tensor([7.])
        """
        bits = self.nll / (self.latent[0].numel() * math.log(2))
        if levels is None:
            return bits
        if not (levels >= 1 and high > low):
            raise ValueError(
                f"bits_per_dim: expected levels >= 1 and low < high; got {levels}, {low}, {high}."
            )
        return bits + math.log2(levels / (high - low))
