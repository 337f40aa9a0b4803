"""A small network that pulls or pushes each pair of particles along the line between them.

The network's output rotates and is mirrored with the particles. Particles of the same type
are interchangeable.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

import hosm_losses as hosm


class PairNetwork(nn.Module):
    """ε̂(x, t) for positions x (N, n, D) without their centre of mass, under a VE schedule.

    The network adds a correction to the exact predictor for isotropic Gaussian data. Distances are
    in units of their standard deviation at the noise level, so that stiff bonds are resolved.
    """

    def __init__(
        self,
        schedule: hosm.VESchedule,
        data: Tensor,
        types: Tensor,
        width: int = 48,
        depth: int = 2,
        harmonics: int = 3,
    ) -> None:
        super().__init__()
        self.schedule, self.harmonics, n = schedule, harmonics, len(types)
        first, second = torch.triu_indices(n, n, 1)
        start, end = (nn.functional.one_hot(each, n).float() for each in (first, second))
        kinds = torch.stack([types[first], types[second]], 1).sort(1).values
        _, kind = kinds.unique(dim=0, return_inverse=True)
        groups = nn.functional.one_hot(kind).to(data.dtype)
        distances = (data[:, first] - data[:, second]).norm(dim=2)
        share = (groups / groups.sum(0)) @ groups.T  # means over the pairs of one kind
        mean = distances.mean(0) @ share
        variance = (distances - mean).square().mean(0) @ share
        buffers = {"signed": start - end, "both": start + end, "kind": kind}
        buffers |= {"mean": mean[:, None], "variance": variance[:, None], "square": data.var()}
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.float() if buffer.is_floating_point() else buffer)
        self.kinds = nn.Embedding(int(kind.max()) + 1, 16)
        sizes = [17 + 2 * harmonics, *[width] * depth]
        self.edges = nn.ModuleList(nn.Linear(*size) for size in pairwise(sizes))
        self.nodes = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.levels = nn.ModuleList(nn.Linear(16, 2 * width) for _ in range(depth))
        self.last = nn.Linear(width + 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x (N, n, D) at t (N,)."""
        sigma = self.schedule.sigma(t)[:, None, None]
        apart = self.signed @ x
        distance = (apart.square().sum(2, keepdim=True) + 1e-12).sqrt()
        spread = (self.variance + 2 * sigma**2).sqrt()
        standard = (distance - (self.mean**2 + 4 * sigma**2).sqrt()) / spread
        angles = [k * standard for k in range(1, self.harmonics + 1)]
        kinds = self.kinds(self.kind).expand(len(x), -1, -1)
        hidden = torch.cat([standard, kinds, *map(torch.sin, angles), *map(torch.cos, angles)], 2)
        level = sigma.log() / 4 * torch.arange(1, 9, device=x.device)
        level = torch.cat([level.sin(), level.cos()], 2)
        for edge, node, levels in zip(self.edges, self.nodes, self.levels, strict=True):
            scale, shift = levels(level).chunk(2, 2)
            hidden = edge(hidden)
            hidden = hidden + self.both @ node(self.both.T @ hidden / len(self.both.T))
            hidden = nn.functional.silu(hidden * (1 + scale) + shift)
        pull = self.last(torch.cat([hidden, standard], 2))
        total = self.signed.T @ (pull * apart / distance)
        return sigma / (self.square + sigma**2) * x + total
