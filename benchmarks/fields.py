r"""What random probes estimate: the Jacobian at a point, and what the losses make of it.

Formula:
    At x = α x₀ + σ ε, with f = σ s, ℓ = ε + f and A = σ ∂f/∂x:
        trace       vᵀ A v            of tr A; the likelihood's
        Frobenius   ‖M v‖²            of ‖M‖²_F, M = A + I − ℓ ℓᵀ; order two's
        third       r3(v)             of R₃, r3(v)_k = vᵀ T_k v; order three's
    All three are quadratic forms in v, of A, of Mᵀ M and of every T_k.

    Of a Gaussian mixture all is in closed form,
        T_kij = σ³ ∂³_kij log q + ℓ_i ℓ_j ℓ_k − (A + I)_ij ℓ_k − (A + I)_ki ℓ_j − (A + I)_kj ℓ_i.
    Of a network A is D along all unit vectors; where d is small T comes from r3 along the sums of
    two of them, by polarisation.

Source:
    Lu et al., arXiv 2206.08265; the mixture of `tests.oracles`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.oracles import GaussianMixture
from torch import Tensor

import hosm_losses as hosm
from hosm_losses.losses.terms import third_residual
from hosm_losses.model import noise_field

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # σ̂ over the data's standard deviation
CHUNK_ELEMENTS = 2**16  # of a batch of probes that is sent through a network at once
CHUNK_PROBES = 256  # whose products with all forms are held at once
DENSE = 64  # up to which d all T_k are built


@dataclass(frozen=True)
class Point:
    """What is estimated at one point.

    Attributes:
        shape: of a sample.
        jacobian: A, (d, d).
        second: M, (d, d).
        third: v (n, d) → r3 (n, d).
        forms: T symmetrised in its last two, (d, d, d); None where d is too large for it.
    """

    shape: tuple[int, ...]
    jacobian: Tensor
    second: Tensor
    third: Callable[[Tensor], Tensor]
    forms: Tensor | None

    @property
    def elements(self) -> int:
        """The number d of elements of a sample."""
        return len(self.jacobian)


def symmetric(forms: Tensor) -> Tensor:
    """The part that a quadratic form sees."""
    return (forms + forms.transpose(-1, -2)) / 2


def mixture_points(
    mixture: GaussianMixture, sigma_hat: float, count: int, generator: torch.Generator
) -> list[Point]:
    """Points of a mixture's diffusion with α = 1, all in closed form in float64."""
    x0 = mixture.sample(count, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    sigma = torch.full((count,), sigma_hat, dtype=x0.dtype)
    x, alpha = x0 + sigma_hat * noise, torch.ones_like(sigma)
    ell = noise + sigma_hat * mixture.score(x, alpha, sigma)
    jacobian = sigma_hat**2 * mixture.hessian(x, alpha, sigma)
    shifted = jacobian + torch.eye(x.shape[1], dtype=x.dtype)
    crossed = torch.einsum("nki,nj->nkij", shifted, ell)
    forms = (
        sigma_hat**3 * mixture.third(x, alpha, sigma)
        + torch.einsum("nk,ni,nj->nkij", ell, ell, ell)
        - torch.einsum("nij,nk->nkij", shifted, ell)
        - crossed
        - crossed.transpose(-1, -2)
    )
    second = shifted - ell[:, :, None] * ell[:, None, :]

    each = zip(jacobian, second, symmetric(forms), strict=True)
    return [Point(x.shape[1:], a, m, along(t), t) for a, m, t in each]


def network_points(
    model: hosm.ScoreModel, data: Tensor, sigma_hat: float, generator: torch.Generator
) -> list[Point]:
    """Points of a trained network, one for each row of the data."""
    points = []
    for row in data:
        noise = torch.randn(row.shape, generator=generator, dtype=row.dtype)
        points.append(_network_point(model, row[None], sigma_hat, noise[None]))
    return points


def _network_point(model: hosm.ScoreModel, x0: Tensor, sigma_hat: float, noise: Tensor) -> Point:
    level = torch.tensor([sigma_hat], dtype=torch.float64).log()
    t = model.schedule.time(level).to(x0.dtype)
    alpha, sigma = (float(part) for part in model.schedule(t))
    x, field, d = alpha * x0 + sigma * noise, noise_field(model, t), x0.numel()
    chunk = max(1, CHUNK_ELEMENTS // d)

    def derive(v: Tensor, order: int) -> tuple[Tensor, ...]:
        """f, D and G along v (n, d), flat."""
        probes = v.to(x.dtype).reshape(-1, *x.shape)
        with torch.no_grad():
            found = field.derive(x, sigma * probes, order=order)
        return tuple(part for part in found if part is not None)

    def third(v: Tensor) -> Tensor:
        parts = []
        for each in v.split(chunk):
            value, directional, gradient = derive(each, 3)
            probes = each.to(x.dtype).reshape(directional.shape)
            residual = third_residual(value, directional, gradient, noise, probes)
            parts.append(residual.flatten(1))
        return torch.cat(parts)

    units = torch.eye(d).split(chunk)
    jacobian = torch.cat([derive(each, 2)[1].flatten(1) for each in units]).T.double()
    with torch.no_grad():
        ell = (noise + field(x)).flatten().double()
    second = jacobian + torch.eye(d, dtype=torch.float64) - torch.outer(ell, ell)
    shape = tuple(x0.shape[1:])
    if d > DENSE:
        return Point(shape, jacobian, second, third, None)
    forms = polarised(third, d)
    return Point(shape, jacobian, second, along(forms), forms)


def polarised(quadratic: Callable[[Tensor], Tensor], d: int) -> Tensor:
    """The symmetric forms (m, d, d) of a quadratic map v (n, d) → (n, m)."""
    eye = torch.eye(d)
    rows, columns = torch.triu_indices(d, d)
    singles = quadratic(eye).double()
    pairs = quadratic(eye[rows] + eye[columns]).double() - singles[rows] - singles[columns]
    forms = pairs.new_empty(pairs.shape[1], d, d)
    forms[:, rows, columns] = forms[:, columns, rows] = pairs.T / 2
    return forms


def along(forms: Tensor) -> Callable[[Tensor], Tensor]:
    """The quadratic map v (n, d) → (n, m) of forms (m, d, d)."""
    m, d, _ = forms.shape
    flat = forms.reshape(m * d, d)

    def quadratic(v: Tensor) -> Tensor:
        parts = v.to(forms.dtype).split(CHUNK_PROBES)
        return torch.cat([((v @ flat.T).view(-1, m, d) @ v[:, :, None])[..., 0] for v in parts])

    return quadratic
