r"""As many probes at each node of a fixed grid as the standard error of each sample needs.

Formula:
    The variance of Σ_i w_i q_i with K_i probes at node i is Σ_i w_i² s_i²/K_i, s_i the standard
    deviation of one. It is at most ε² with the fewest probes for
        K_i = |w_i| s_i Σ_j |w_j| s_j / ε²,
    rounded up to a power of two, at least two; from d on all unit vectors take their place.
    s_i comes from PILOTS probes, which are then left out: fresh ones give the answer, which is
    unbiased. Where probes that decide when to stop give the answer too, it is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hosm_losses.likelihood.paths import Batch, NoiseLevel
from hosm_losses.probes import Hutchinson, ToStandardError

PILOTS = 4
Nodes = Sequence[tuple[Tensor, Tensor]]  # of a path: the states (B, *), and variances of one probe


def pilot(divergence: ToStandardError) -> Hutchinson:
    """The probes that counts are found with."""
    return Hutchinson(PILOTS, divergence.distribution)


def integrate(
    batch: Batch, nodes: Nodes, weights: Tensor, level: Callable[[int], NoiseLevel]
) -> tuple[Tensor, Tensor, Tensor]:
    """∫ q by weights (N,) over nodes, its standard error, and the probes that it took, (B,) each.

    `batch` has the `ToStandardError`, `level` gives the noise level of a node.
    """
    given, d = batch.divergence, nodes[0][0][0].numel()
    assert isinstance(given, ToStandardError)
    felt = weights.abs()[:, None] * torch.stack([each for _, each in nodes]).sqrt()
    counts = (felt * felt.sum(0) / given.nats**2).clamp(2, 2 * d).log2().ceil().exp2().long()
    total = variance = torch.zeros_like(felt[0])
    for index, (state, _) in enumerate(nodes):
        for count in counts[index].unique().tolist():
            rows = (counts[index] == count).nonzero().flatten()
            probes = Hutchinson(count, given.distribution) if count < d else "exact"
            part, z = replace(batch, divergence=probes), state[rows]
            _, _, q = part.derivatives(z, level(index), part.draw_probes(z), rows)
            total = total.index_add(0, rows, weights[index] * q.mean(0))
            if count < d:
                spread = weights[index] ** 2 * q.detach().var(0) / count
                variance = variance.index_add(0, rows, spread)
    return total, variance.sqrt(), counts.clamp(max=d).sum(0)
