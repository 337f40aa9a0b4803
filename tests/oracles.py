"""Closed forms to test against: written for float64, by formulas other than the library's own."""

import itertools
import math

import torch
from torch import Tensor


class GaussianMixture:
    """A mixture of Gaussians with any covariances, and its diffusions: log q_t and three derivatives.

    Everything is in float64. log q_t, the score and its derivatives come from the posterior of the
    component, not from autograd.
    """

    def __init__(self, means, covariances, weights):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.covariances = torch.as_tensor(covariances, dtype=torch.float64)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)

    def _parts(self, x: Tensor, alpha: Tensor, sigma: Tensor):
        """Precisions P_k, pulls a_k = −P_k (x − α m_k) and log weights at x, per sample."""
        d = self.means.shape[1]
        eye = torch.eye(d, dtype=torch.float64)
        covariance = alpha[:, None, None, None] ** 2 * self.covariances
        covariance = covariance + sigma[:, None, None, None] ** 2 * eye
        precision = torch.linalg.inv(covariance)
        centred = x[:, None] - alpha[:, None, None] * self.means
        pull = -torch.einsum("bkij,bkj->bki", precision, centred)
        logdet = torch.linalg.slogdet(covariance).logabsdet
        log_joint = (
            self.weights.log()
            - 0.5 * (d * math.log(2 * math.pi) + logdet)
            + 0.5 * (pull * centred).sum(-1)
        )
        return precision, pull, log_joint

    def log_density(self, x, alpha, sigma):
        return torch.logsumexp(self._parts(x, alpha, sigma)[2], 1)

    def score(self, x, alpha, sigma):
        _, pull, log_joint = self._parts(x, alpha, sigma)
        return torch.einsum("bk,bki->bi", log_joint.softmax(1), pull)

    def hessian(self, x, alpha, sigma):
        """∇² log q_t = E[a aᵀ − P] − s sᵀ over the posterior of the component."""
        precision, pull, log_joint = self._parts(x, alpha, sigma)
        posterior = log_joint.softmax(1)
        mean = torch.einsum("bk,bki->bi", posterior, pull)
        second = torch.einsum("bk,bki,bkj->bij", posterior, pull, pull)
        second = second - torch.einsum("bk,bkij->bij", posterior, precision)
        return second - mean[:, :, None] * mean[:, None, :]

    def third(self, x, alpha, sigma):
        """∂³ log q_t: of log Σ w e^{h_k}, the third cumulant of the posterior of (∇h, ∇²h)."""
        precision, a, log_joint = self._parts(x, alpha, sigma)
        p = log_joint.softmax(1)
        s = torch.einsum("bk,bki->bi", p, a)
        c = a - s[:, None]
        third = torch.einsum("bk,bki,bkj,bkl->bijl", p, c, c, c)
        mixed = torch.einsum("bk,bki,bkjl->bijl", p, c, -precision)
        return third + mixed + mixed.permute(0, 2, 1, 3) + mixed.permute(0, 3, 1, 2)

    def sample(self, count, generator):
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(
            (count, self.means.shape[1]), generator=generator, dtype=torch.float64
        )
        factor = torch.linalg.cholesky(self.covariances)
        return self.means[which] + torch.einsum("nij,nj->ni", factor[which], noise)


def paper_mixture() -> GaussianMixture:
    """The 1-D mixture of arXiv 2206.08265, section 5.1."""
    return GaussianMixture(
        [[-2 / 7], [-6 / 7], [4 / 7]],
        [[[0.1 / 49]], [[0.1 / 49]], [[1 / 49]]],
        [0.3, 0.3, 0.4],
    )


def ring(count: int = 8, std: float = 0.1) -> GaussianMixture:
    """Equal round Gaussians on the unit circle."""
    angles = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
    means = torch.stack([angles.cos(), angles.sin()], 1)
    covariances = std**2 * torch.eye(2, dtype=torch.float64).expand(count, 2, 2)
    return GaussianMixture(means, covariances, torch.full((count,), 1 / count))


def mixture_noise(mixture: GaussianMixture, schedule):
    """The exact ε̂(x, t) = −σ ∇ log q_t of a mixture, as a network."""

    def network(x, t):
        alpha, sigma = schedule(t.double())
        return -sigma[:, None] * mixture.score(x.double(), alpha, sigma)

    return network


def atoms_posterior(atoms: Tensor, weights: Tensor, x: Tensor, alpha: float, sigma: float):
    """For data that is K points: the noises ε_k that lead to each x, (B, K, d), and p(k | x)."""
    noise = (x[:, None] - alpha * atoms) / sigma
    log_joint = weights.log() - 0.5 * noise.square().sum(-1)
    return noise, log_joint.softmax(1)


def sign_vectors(d: int) -> Tensor:
    """All 2^d vectors of signs, (2^d, d)."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
