r"""Random directions v with E[v vᵀ] = I.

Estimates:
    E[vᵀ A v] = tr A and E‖A v‖² = ‖A‖²_F, so products with v suffice to
    estimate tr A and ‖A‖²_F.

Formula:
    Let S = (A + Aᵀ)/2. Depending on the distribution of v, the variance of vᵀ A v is
        Rademacher   4 Σ_{i<j} S_ij²          zero if A is diagonal; this is the default
        Gaussian     2 ‖S‖²_F
        sphere       2 d/(d + 2) (‖S‖²_F − (tr S)²/d)      radius √d
        dct          4 Σ_{i<j} (Q S Qᵀ)_ij²                v = Qᵀ ε with signs ε

    Q is the orthonormal discrete cosine transform along every dimension of a sample, including the
    channels. If neighbouring elements interact in the same way everywhere, as in images, Q S Qᵀ is
    closer to diagonal than S is. Qᵀ is applied by FFT; along one dimension,
        v_j = Re Σ_k c_k ε_k e^{iπk(2j + 1)/(2n)}, where c_0 = 1/√n and c_k = √(2/n) for k > 0.

Source:
    Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990); Skilling,
    "The eigenvalues of mega-dimensional matrices" (1989). Q is from Ahmed, Natarajan and Rao,
    "Discrete cosine transform", IEEE Transactions on Computers (1974).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hosm_losses._checks import (
    at_least_float32,
    check_choice,
    check_whole,
    error_message,
    generator_kwargs,
    sum_elements,
)

CHUNK_ELEMENTS = 2**22  # largest chunk of unit vectors, in elements
Distribution = Literal["rademacher", "gaussian", "sphere", "dct"]
# This limit is in bytes. A loss allocates several tensors as large as the unit vectors, and the
# network allocates many: beyond this limit, no device has enough memory.
LARGEST_UNITS = 16 * 2**30


def _rademacher(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(
        0, 2, shape, device=like.device, dtype=torch.int8, **generator_kwargs(generator)
    )
    return bits.to(like.dtype).mul_(2).sub_(1)


def _gaussian(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=like.dtype, **generator_kwargs(generator))


def _sphere(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = _gaussian(shape, like, generator).reshape(*shape[:2], -1)
    unit = flat / flat.square().sum(-1, keepdim=True).sqrt()
    return (unit * math.sqrt(flat.shape[-1])).reshape(shape)


def _dct(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    rotated = at_least_float32(_rademacher(shape, like, generator))
    for _ in shape[2:]:
        rotated = _from_cosines(rotated.movedim(2, -1))
    return rotated.to(like.dtype)


def _from_cosines(amplitudes: Tensor) -> Tensor:
    """Return Σ_k a_k q_k along the last dimension; q_k is a row of the orthonormal DCT-II."""
    n = amplitudes.shape[-1]
    index = torch.arange(n, dtype=amplitudes.dtype, device=amplitudes.device)
    # hfft adds the conjugates of all terms but the first, which doubles their real parts.
    scaled = amplitudes * torch.where(index == 0, 2.0, 1.0).to(index.dtype).div(2 * n).sqrt()
    phase = -math.pi / (2 * n) * index
    half = torch.stack([scaled * phase.cos(), scaled * phase.sin()], -1)
    return torch.fft.hfft(torch.view_as_complex(half), n=2 * n)[..., :n]


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], Tensor, torch.Generator | None], Tensor]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
    "sphere": _sphere,
    "dct": _dct,
}


class _Random:
    count: int
    distribution: Distribution
    _fewest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check both fields, and convert a NumPy count to a Python int."""
        name = type(self).__name__
        count = check_whole(f"{name}.count", self.count, self._fewest)
        if count is not self.count:  # torch.compile would trace even a no-op write
            object.__setattr__(self, "count", count)
        check_choice(f"{name}.distribution", self.distribution, DISTRIBUTIONS)

    def draw(self, x: Tensor, generator: torch.Generator | None, /) -> Tensor:
        """Draw probes (count, B, *) for points x (B, *), in the dtype and on the device of x."""
        return DISTRIBUTIONS[self.distribution]((self.count, *x.shape), x, generator)


@dataclass(frozen=True)
class Hutchinson(_Random):
    """Random probes v with E[v vᵀ] = I; the estimates from all probes are averaged.

    Args:
        count: K, the number of independent probes per sample, at least 1.
        distribution: "rademacher" (random signs), "gaussian", "sphere" (uniform on the
            sphere of radius √d) or "dct" (random signs in the cosine basis, for lower variance on
            images).

    Raises:
        TypeError: if `count` is not a whole number, or if `distribution` is not a string.
        ValueError: if `count` is below 1, or if `distribution` is unknown.

    Example:
        >>> Hutchinson(4, "dct")
        Hutchinson(count=4, distribution='dct')
    """

    count: int = 1
    distribution: Distribution = "rademacher"

    @property
    def is_random(self) -> bool:
        """True, because the probes are random; see `DivergenceEstimator`."""
        return True

    @property
    def products(self) -> int:
        """The number of vector-Jacobian products that one estimate of a divergence requires."""
        return self.count

    def estimate(self, model: Any, x: Tensor, probes: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return f at x (B, *) and vᵀ ∂f/∂x v (count, B), where `model` is a `BoundModel`."""
        prediction, forms = model.quadratic_forms(x, [probes])
        return model.f_and_divergence(x, prediction, forms, sum_elements(probes.square()))


@dataclass(frozen=True)
class Paired(_Random):
    """Random probes whose estimates are multiplied in pairs rather than squared.

    The mean of an unbiased estimate's square exceeds the square of the true value by the variance.
    The product of two independent estimates is unbiased. The terms of the loss therefore have the
    same mean as with `probes="exact"`, but may be negative for individual samples.

    Args:
        count: K, the number of independent probes per sample, at least 2. The mean estimate from
            the first K // 2 probes is multiplied by the mean estimate from the others.
        distribution: as in `Hutchinson`.

    Raises:
        TypeError: if `count` is not a whole number, or if `distribution` is not a string.
        ValueError: if `count` is below 2, or if `distribution` is unknown.

    Example:
        >>> Paired()
        Paired(count=2, distribution='rademacher')
    """

    count: int = 2
    distribution: Distribution = "rademacher"
    _fewest: ClassVar[int] = 2


def unit_vectors(like: Tensor) -> Tensor:
    """Return all d unit vectors as probes (d, B, *); the SUM of the d estimates is exact.

    Raise ValueError if the unit vectors alone would occupy more than 16 GiB.
    """
    d = like[0].numel()
    size = d * like.numel() * like.element_size()
    if size > LARGEST_UNITS:
        expected = f"a number of probes for samples of d = {d} elements"
        got = (
            "'exact', which evaluates the network on all d unit vectors at once and needs "
            f"{size / 2**30:.0f} GiB for the unit vectors of a batch of {len(like)} alone"
        )
        remedy = "Use probes=2, for example. A likelihood evaluates divergence='exact' in chunks."
        raise ValueError(error_message("probes", expected, like, remedy, got=got))
    (units,) = unit_vector_chunks(like, d)
    return units


def unit_vector_chunks(like: Tensor, size: int | None = None) -> Iterator[Tensor]:
    """Yield the d unit vectors in chunks of at most `size` vectors, as probes (k, B, *).

    By default, a chunk contains as many vectors as fit in CHUNK_ELEMENTS elements, but at
    least one.
    """
    d = like[0].numel()
    size = max(1, CHUNK_ELEMENTS // like.numel()) if size is None else size
    for start in range(0, d, size):
        units = torch.eye(min(size, d - start), d - start, dtype=like.dtype, device=like.device)
        units = F.pad(units, (start, 0))
        yield units.reshape(-1, 1, *like.shape[1:]).expand(-1, *like.shape)
