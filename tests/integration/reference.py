"""Terms and parameter gradients of order two and three, from what PyTorch certainly gets right.

Only values of the network and its first-order vector-Jacobian products are taken, on the plain
network without any primitive. All other derivatives are central differences of eighth order:

    D = ∂ₛ f(x + s w)                      of values
    G = ∂ₛ (∂f/∂x)ᵀ w at x + s w           of products, the second derivative being symmetric
    ∇_θ ⟨D, c⟩ = ∂ₛ ∇_θ ⟨f(x + s w), c⟩
    ∇_θ ⟨G, c⟩ = ∂ₛ ∂ᵤ ∇_θ ⟨f(x + s w + u c), w⟩

Nothing is differenced in the parameters, so what the loss holds fixed is fixed by construction:
each gradient is that of an inner product with a residual that is a number here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# ∂ₛ at 0 is Σ weight/step (g(step) − g(−step)), ∂ₛ² is Σ weight/step² (g(step) + g(−step)) and a
# multiple of g(0), which cancels where it is used.
FIRST = ((1, 4 / 5), (2, -1 / 5), (3, 4 / 105), (4, -1 / 280))
SECOND = ((1, 8 / 5), (2, -1 / 5), (3, 8 / 315), (4, -1 / 560))
STEP = 1 / 2048


@dataclass(frozen=True)
class Reference:
    """What a loss has to agree with.

    Attributes:
        terms: first, second, trace and third per sample, (4, B).
        gradients: the gradient of each term's mean over the batch, (4, parameters).
    """

    terms: Tensor
    gradients: Tensor

    @property
    def weights(self) -> Tensor:
        """Weights with which every term has a gradient of norm one: no term hides another."""
        return 1 / self.gradients.norm(dim=1)

    def gradient(self, order: int) -> Tensor:
        """The gradient of the weighted loss of an order."""
        return self.weights[: order + 1] @ self.gradients[: order + 1]


def reference(
    field: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    x: Tensor,
    noise: Tensor,
    probe: Tensor,
    sigma: Tensor,
) -> Reference:
    """Terms and gradients of f = −ε̂ at x (B, *), for one probe (B, *) and σ (B,)."""
    batch, d = len(x), x[0].numel()

    def along(vector: Tensor, *coefficient: Tensor) -> Tensor:
        """Per-sample numbers times a vector."""
        for number in coefficient:
            vector = number.reshape(batch, *(1,) * (x.ndim - 1)) * vector
        return vector

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).reshape(batch, -1).sum(1)

    def value(point: Tensor) -> Tensor:
        with torch.no_grad():
            return field(point)

    def pulled(point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        return torch.autograd.grad(field(point), point, w)[0]

    def slope(point: Tensor, cotangent: Tensor) -> Tensor:
        """∇_θ ⟨f(point), cotangent⟩ as one vector."""
        parts = torch.autograd.grad(
            field(point), parameters, cotangent, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts])

    w = along(probe, sigma)
    f = value(x)
    ell = f + noise
    big_d = first_difference(lambda s: value(x + s * w))
    big_g = first_difference(lambda s: pulled(x + s * w))

    shifted, dot = big_d + probe, inner(ell, probe)
    r2 = shifted - along(ell, dot)
    rt = inner(probe, shifted) - dot**2
    r3 = big_g + along(ell, dot**2 - inner(probe, shifted)) - along(shifted, 2 * dot)
    terms = torch.stack(
        [inner(ell, ell) / d, inner(r2, r2) / d**2, rt**2 / d**2, inner(r3, r3) / d**3]
    )

    def slope_of_d(c: Tensor) -> Tensor:
        return first_difference(lambda s: slope(x + s * w, c))

    def slope_of_g(c: Tensor) -> Tensor:
        size = float(c.norm()) / math.sqrt(c.numel())
        c = c / size
        both = [
            second_difference(lambda s, u=w + sign * c: slope(x + s * u, w)) for sign in (1, -1)
        ]
        return size * (both[0] - both[1]) / 4

    scale = 2 / batch
    gradients = torch.stack(
        [
            slope(x, scale / d * ell),
            slope_of_d(scale / d**2 * r2),
            slope_of_d(scale / d**2 * along(probe, rt)),
            slope_of_g(scale / d**3 * r3),
        ]
    )
    return Reference(terms, gradients)


def first_difference(function: Callable[[float], Tensor]) -> Tensor:
    """The derivative at 0, to eighth order."""
    return sum(
        weight / STEP * (function(count * STEP) - function(-count * STEP))
        for count, weight in FIRST
    )


def second_difference(function: Callable[[float], Tensor]) -> Tensor:
    """The second derivative at 0, to eighth order and up to a multiple of the value there."""
    return sum(
        weight / STEP**2 * (function(count * STEP) + function(-count * STEP))
        for count, weight in SECOND
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖/‖expected‖ in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())
