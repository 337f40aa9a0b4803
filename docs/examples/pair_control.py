r"""Targets for particles with known scores: a control variate depends on the configuration.

The target is e = ε − A z − σ̂ ∇·A with z = ε + σ̂ g and the matrix
    A(x₀) = (I + σ̂² (Σ_p k_p D_pᵀ u_p u_pᵀ D_p + a F))⁻¹,   F = E g gᵀ,
where p runs over pairs of particles, D_p x = x_i − x_j = r_p u_p, and k_p and a depend on σ̂.
Given x, the law of x₀ has the score z/σ̂, so e and ε have the same mean by integration by parts.
"""

import math

import torch
from torch import Tensor, nn

LEVELS = 17  # of log σ̂, between which log k_p and log a are interpolated


class PairControl(nn.Module):
    """k_p and a for positions and scores (N, n, D), fitted to minimise the targets' noise."""

    def __init__(self, x: Tensor, scores: Tensor, low: float, high: float) -> None:
        super().__init__()
        self.n, self.low, self.span = x.shape[1], math.log(low), math.log(high / low)
        self.first, self.second = torch.triu_indices(self.n, self.n, 1)
        self.F = torch.einsum("bi,bj->ij", *[scores.double().flatten(1)] * 2) / len(x)
        r = (x[:, self.first] - x[:, self.second]).norm(dim=2)
        start = torch.cat([0.1 / r.var(0), torch.ones(1)]).log()
        self.logs = nn.Parameter(start.double().repeat(LEVELS, 1))

    def control(self, x: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        """Return A z + σ̂ ∇·A, (N, n, D)."""
        count, n, D = x.shape
        place = (LEVELS - 1) * (sigma.log() - self.low) / self.span
        below = place.detach().long().clamp(0, LEVELS - 2)
        logs = torch.lerp(self.logs[below], self.logs[below + 1], (place - below)[:, None])
        k, a = logs[:, :-1].exp(), logs[:, -1:].exp()
        apart = x[:, self.first] - x[:, self.second]
        r = apart.norm(dim=2, keepdim=True)
        u = apart / r
        uu = u[..., :, None] * u[..., None, :] * k[..., None, None]
        blocks = x.new_zeros(count, n, n, D, D)
        blocks[:, self.first, self.second] = -uu
        blocks = blocks + blocks.transpose(1, 2)
        own = -blocks.sum(2)
        blocks = blocks + torch.diag_embed(own.movedim(1, -1)).movedim((-2, -1), (1, 2))
        matrix = blocks.transpose(2, 3).reshape(count, n * D, n * D) + a[..., None] * self.F
        s2 = (sigma**2)[:, None, None]
        A = torch.linalg.inv(torch.eye(n * D, dtype=x.dtype) + s2 * matrix)
        parts = A.reshape(count, n, D, n, D).transpose(2, 3)
        i, j = self.first, self.second
        Y = parts[:, i, i] + parts[:, j, j] - parts[:, i, j] - parts[:, j, i]
        Yu = (Y @ u[..., None])[..., 0]
        along = (u * Yu).sum(2, keepdim=True)
        trace = Y.diagonal(dim1=2, dim2=3).sum(2, keepdim=True)
        pulls = k[..., None] / r * (Yu + u * (trace - 2 * along))
        w = torch.zeros_like(x).index_add(1, i, pulls).index_add(1, j, -pulls)
        rest = z - sigma[:, None, None] ** 3 * w
        return (A @ rest.flatten(1)[..., None]).reshape(x.shape)

    def targets(self, x: Tensor, scores: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """Return e (N, n, D) for noise without its centre of mass."""
        x, scores, eps, sigma = (part.double() for part in (x, scores, eps, sigma))
        return eps - self.control(x, eps + sigma[:, None, None] * scores, sigma)

    def fit(self, x: Tensor, scores: Tensor, steps: int = 300, batch: int = 128) -> None:
        """Fit k_p and a so that the mean square of e over noise levels is minimal."""
        optimizer = torch.optim.Adam([self.logs], 0.1)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
            rows = torch.randint(len(x), (batch,))
            u = (torch.arange(batch) + torch.rand(batch)) / batch
            sigma = torch.exp(self.low + self.span * u)
            eps = torch.randn_like(x[rows])
            eps = eps - eps.mean(1, keepdim=True)
            optimizer.zero_grad()
            self.targets(x[rows], scores[rows], eps, sigma).square().sum((1, 2)).mean().backward()
            optimizer.step()
