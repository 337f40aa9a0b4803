"""Closed forms to test against: written for float64, by formulas other than the library's own."""

import itertools
import math
from functools import partial

import torch
from torch import Tensor


class GaussianMixture:
    """A mixture of Gaussians of any covariances, diffused: log q_t and three derivatives.

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
        return third + mixed + mixed.permute(0, 2, 1, 3) + mixed.permute(0, 2, 3, 1)

    def sample(self, count, generator):
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn((count, self.means.shape[1]), generator=generator, dtype=torch.float64)
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


def anisotropic(d: int = 64, count: int = 5) -> GaussianMixture:
    """Gaussians of random axes and means, with standard deviations from 0.05 to 0.5."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn((count, d, d), generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(square).Q
    stds = torch.logspace(math.log10(0.05), math.log10(0.5), d, dtype=torch.float64)
    covariances = torch.einsum("kij,j,klj->kil", axes, stds**2, axes)
    means = 0.3 * torch.randn((count, d), generator=generator, dtype=torch.float64)
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


def standardise_by_hand(x: Tensor, dims: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    """(x − mean)/std from sums of x and x², unlike the library's centred form."""
    count = math.prod(x.shape[dim] for dim in dims)
    mean = x.sum(dims, keepdim=True) / count
    variance = (x * x).sum(dims, keepdim=True) / count - mean * mean
    return (x - mean) / (variance + eps) ** 0.5


# The a and b of what each kind predicts, a x₀ + b ε.
TARGETS = {
    "epsilon": lambda alpha, sigma, rates: (0.0, 1.0),
    "score": lambda alpha, sigma, rates: (0.0, -1 / sigma),
    "x0": lambda alpha, sigma, rates: (1.0, 0.0),
    "v": lambda alpha, sigma, rates: (-sigma, alpha),
    "velocity": lambda alpha, sigma, rates: rates,
}


def noise_by_solving(prediction: str, raw: Tensor, x: Tensor, alpha, sigma, rates) -> Tensor:
    """ε̂ of one sample from the definition of the prediction: two equations for x₀ and ε."""
    if prediction == "score":
        return -sigma * raw
    second = TARGETS[prediction](alpha, sigma, rates)
    matrix = torch.tensor([[float(alpha), float(sigma)], [float(second[0]), float(second[1])]])
    sides = torch.stack([x.reshape(-1), raw.reshape(-1)])
    return torch.linalg.solve(matrix.double(), sides)[1].reshape(x.shape)


def _of_noise(prediction: str, noise, x, alpha, sigma, rates):
    a, b = TARGETS[prediction](alpha, sigma, rates)
    return a * (x - sigma * noise) / alpha + b * noise


PREDICTIONS_OF_ORACLE = {kind: partial(_of_noise, kind) for kind in TARGETS}
THIRD = "ijk,i,j->k"  # the gradient of vᵀ ∂f v


def rates_of(schedule, t):
    """(α′, σ′) by reverse mode, which the library does not use for it."""
    return tuple(
        torch.func.grad(function)(t.clone()) for function in (schedule.alpha, schedule.sigma)
    )


def dense_derivatives(function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f (d,), ∂f/∂x (d, d) and ∂²f/∂x² (d, d, d) of one sample x (*), reverse over reverse."""
    d = x.numel()

    def flat(point: Tensor) -> Tensor:
        return function(point.reshape(x.shape)).reshape(-1)

    point = x.reshape(-1)
    first = torch.func.jacrev(flat)
    return flat(point), first(point), torch.func.jacrev(first)(point).reshape(d, d, d)


def dense_terms(
    f,
    jacobian,
    second,
    sigma,
    noise,
    probes,
    *,
    exact=False,
    frozen=None,
    others=None,
    control=0.0,
):
    """The four terms of one sample from dense arrays; `frozen` holds (ℓ, ∂f/∂x) of the detach.

    `others` are (w_j, ℓ_j, ℓ_j − C z_j), over which the higher residuals are averaged in place of
    ℓ alone; `control` is the matrix C of targets from scores z.
    """
    d = f.numel()
    noise, probes = noise.reshape(-1), probes.reshape(len(probes), -1)
    ell, held = (f + noise, jacobian) if frozen is None else frozen
    others = [(1.0, ell, ell)] if others is None else others
    control = control + torch.zeros(d, d)
    first = ((f + noise) ** 2).sum() / d

    def whole(ell, quiet):
        r3 = (
            sigma**2 * sum(torch.einsum(THIRD, second, v, v) for v in torch.eye(d))
            + ell.dot(ell) * quiet
            - (sigma * held.trace() + d) * quiet
            - 2 * (sigma * held + torch.eye(d) - control) @ quiet
        )
        outer = torch.outer(ell, quiet)
        return sigma * jacobian + torch.eye(d) - control - (outer + outer.T) / 2, r3

    def along(v, ell, quiet):
        moved, fixed = sigma * jacobian @ v, sigma * held @ v
        slope, other, Cv = ell.dot(v), quiet.dot(v), control @ v
        r3 = (
            sigma**2 * torch.einsum(THIRD, second, v, v)
            + slope**2 * quiet
            - (v.dot(fixed) + v.dot(v)) * quiet
            - 2 * other * (fixed + v - Cv)
        )
        r2 = moved + v - Cv - (slope * quiet + other * ell) / 2
        return r2, v.dot(moved) + v.dot(v) - v.dot(Cv) - slope * other, r3

    def averaged(residuals):
        parts = zip(*(residuals(*both) for _, *both in others), strict=True)
        weights = [weight for weight, *_ in others]
        return [sum(w * each for w, each in zip(weights, part, strict=True)) for part in parts]

    if exact:
        m2, r3 = averaged(whole)
        return first, (m2**2).sum() / d**2, m2.trace() ** 2 / d**2, (r3**2).sum() / d**3
    squares = []
    for v in probes:
        r2, rt, r3 = averaged(partial(along, v))
        squares.append(torch.stack([(r2**2).sum() / d**2, rt**2 / d**2, (r3**2).sum() / d**3]))
    return first, *torch.stack(squares).mean(0)


def dense_halves(estimates):
    """The means of the first half of some estimates and of the others."""
    half = len(estimates) // 2
    return sum(estimates[:half]) / half, sum(estimates[half:]) / (len(estimates) - half)


def dense_paired_terms(f, a, second, noise, probes, others=None, control=0.0):
    """The terms of one sample by two halves of the probes, a = σ ∂f/∂x, second = σ² ∂²f.

    `others` and `control` are those of `dense_terms`. What the targets have beside ℓ alone, which
    is the mean of ℓ_j − C z_j, is taken from a and added to the third derivatives.
    """
    d, ell = len(f), (f + noise).detach()
    others = [(1.0, ell, ell)] if others is None else others
    control = control + torch.zeros(d, d)
    outer = sum(weight * torch.outer(each, quiet) for weight, each, quiet in others)
    rest = control + (outer + outer.T) / 2 - torch.outer(ell, ell)
    a = a - rest
    square, held, squares, traces, vectors = ell.dot(ell), a.detach(), [], [], []

    def target(v, Cv, pairs):
        """What r3 has beside the derivatives of the network."""
        return sum(
            weight * ((each.dot(v) ** 2 - v.dot(v)) * quiet - 2 * quiet.dot(v) * (v - Cv))
            for weight, each, quiet in pairs
        )

    for v in probes:
        squares.append((a @ v).dot(a @ v) + 2 * v.dot(a @ v))
        traces.append(v.dot(a @ v) + d - square)
        alone = target(v, rest @ v, [(1.0, ell, ell)]) + v.dot(rest @ v) * ell
        vector = torch.einsum(THIRD, second, v, v) + target(v, control @ v, others) - alone
        vector = vector + (square - v.dot(held @ v) - d) * ell - 2 * (held @ ell + ell)
        vectors.append(vector)
    of_second = sum(squares) / len(probes) - 2 * ell.dot(a @ ell) + d - 2 * square + square**2
    (one, other), (left, right) = dense_halves(traces), dense_halves(vectors)
    return of_second / d**2, one * other / d**2, left.dot(right) / d**3
