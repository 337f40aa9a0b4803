r"""Weights that bring the higher terms to the scale of the first, at every noise level.

Formula, with m_j(u) the running mean of |term j| near u = log σ̂:
    w_j(u) = √(m_first(u)/m_j(u)), without a gradient, times the weight that was asked for

    The gradient of a square is its root times that of the residual. So it is the roots that are
    made equal: with m_first/m_j in place of √ the terms themselves would be, and the gradient of
    the trace would have 4 to 9 times the noise of the first one's, at d = 64 and 768.

    m_j is a mean over bins of u, in which a step counts DECAY as much as the next. A mean over all
    bins counts as PRIOR samples in each, so that a bin that is new gives no weight of its own.
    The mean of the size is taken and not that of the term: a term that is mostly noise, of which
    the paired ones are of either sign, counts the less. Where torch.distributed is initialised all
    processes take up the terms of all, so a training step is one of each of them.

Source:
    Kendall, Gal and Cipolla, "Multi-task learning using uncertainty to weigh losses", CVPR 2018;
    Karras et al., "Analyzing and improving the training dynamics of diffusion models", CVPR 2024,
    for a weight that is learned for each noise level.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BINS, DECAY, PRIOR = 32, 0.999, 32.0


class Balance(nn.Module):
    """The running sizes of terms by noise level, kept in a buffer, and the weights they give."""

    running: Tensor  # sums of sizes, and counts, (2, terms, BINS)

    def __init__(self, terms: int, device: torch.device | None = None) -> None:
        super().__init__()
        # In half precision, perhaps the default, a running mean forgets nothing and overflows.
        empty = torch.zeros(2, terms, BINS, device=device, dtype=torch.float32)
        self.register_buffer("running", empty)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Balance":
        before = self.running
        super()._apply(fn, recurse)
        moved = self.running
        if before.is_meta and not moved.is_meta:  # by to_empty, which leaves what was there
            self.running = torch.zeros_like(moved, dtype=torch.float32)
        elif moved.dtype != torch.float32:
            self.running = before.to(moved.device, torch.float32)
        return self

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        # Of a checkpoint without them, as of order one: the means are those that are here.
        here = torch.zeros(self.running.shape) if self.running.is_meta else self.running.clone()
        name = f"{prefix}running"
        state_dict[name] = state_dict.get(name, here).float()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(
        self, terms: Sequence[Tensor | None], level: Tensor, rows: Tensor | None
    ) -> list[Tensor | None]:
        """The weight of every term: 1 for the first, (B,) or that of the rows for the others.

        `level` (B,) is where log σ̂ lies in its range, from 0 to 1. In training the sizes of the
        terms are taken up first.
        """
        if self.running.device != level.device:  # a loss may be made after its network was moved
            self.to(level.device)
        bins = (level.detach() * BINS).long().clamp(0, BINS - 1)
        of_rows = bins if rows is None else bins[rows]
        places = [bins, *[of_rows] * (self.running.shape[1] - 1)]
        if self.training:
            self._update(terms, places)
        sums, counts = self.running
        overall = sums.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
        means = (sums + PRIOR * overall) / (counts + PRIOR)
        ratios = torch.where(means > 0, means[:1] / means, 1).sqrt()
        return [
            None if term is None else ratio[place].to(term.dtype)
            for term, ratio, place in zip(terms, ratios, places, strict=False)
        ]

    @torch.no_grad()
    def _update(self, terms: Sequence[Tensor | None], places: Sequence[Tensor]) -> None:
        found = torch.zeros_like(self.running)
        for row, (term, place) in enumerate(zip(terms, places, strict=False)):
            if term is not None:
                known = torch.isfinite(term)
                size = torch.where(known, term.abs(), 0)
                for part, each in zip(found, (size, known), strict=True):
                    part[row].index_add_(0, place, each.to(found.dtype))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
        self.running.mul_(DECAY).add_(found)
