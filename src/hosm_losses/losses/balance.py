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
    """The running sizes of terms by noise level, kept in buffers, and the weights they give."""

    sums: Tensor
    counts: Tensor

    def __init__(self, terms: int, device: torch.device | None = None) -> None:
        super().__init__()
        # In half precision, perhaps the default, a running mean forgets nothing and overflows.
        for name in ("sums", "counts"):
            empty = torch.zeros(terms, BINS, device=device, dtype=torch.float32)
            self.register_buffer(name, empty)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Balance":
        kept = self.sums, self.counts
        super()._apply(fn, recurse)
        for name, before in zip(("sums", "counts"), kept, strict=True):
            moved = getattr(self, name)
            if before.is_meta and not moved.is_meta:  # by to_empty, which leaves what was there
                setattr(self, name, torch.zeros_like(moved, dtype=torch.float32))
            elif moved.dtype != torch.float32:
                setattr(self, name, before.to(moved.device, torch.float32))
        return self

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        # Of a checkpoint without them, as of order one: the means are those that are here.
        for name, buffer in self.named_buffers():
            here = torch.zeros(buffer.shape) if buffer.is_meta else buffer.clone()
            state_dict[prefix + name] = state_dict.get(prefix + name, here).float()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(
        self, terms: Sequence[Tensor | None], level: Tensor, rows: Tensor | None
    ) -> list[Tensor | None]:
        """The weight of every term: 1 for the first, (B,) or that of the rows for the others.

        `level` (B,) is where log σ̂ lies in its range, from 0 to 1. In training the sizes of the
        terms are taken up first.
        """
        if self.sums.device != level.device:  # a loss may be made after its network was moved
            self.to(level.device)
        bins = (level.detach() * BINS).long().clamp(0, BINS - 1)
        of_rows = bins if rows is None else bins[rows]
        places = [bins, *[of_rows] * (len(self.sums) - 1)]
        if self.training:
            self._take_up(terms, places)
        overall = self.sums.sum(1, keepdim=True) / self.counts.sum(1, keepdim=True).clamp_min(1)
        means = (self.sums + PRIOR * overall) / (self.counts + PRIOR)
        ratios = torch.where(means > 0, means[:1] / means, 1).sqrt()
        return [
            None if term is None else ratio[place].to(term.dtype)
            for term, ratio, place in zip(terms, ratios, places, strict=False)
        ]

    @torch.no_grad()
    def _take_up(self, terms: Sequence[Tensor | None], places: Sequence[Tensor]) -> None:
        kept = torch.stack([self.sums, self.counts]) * DECAY
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        found = torch.zeros_like(kept) if several else kept
        for row, (term, place) in enumerate(zip(terms, places, strict=False)):
            if term is not None:
                known = torch.isfinite(term)
                size = torch.where(known, term.abs(), 0)
                for part, each in zip(found, (size, known), strict=True):
                    part[row].index_add_(0, place, each.to(found.dtype))
        if several:
            dist.all_reduce(found)
            found += kept
        self.sums.copy_(found[0])
        self.counts.copy_(found[1])
