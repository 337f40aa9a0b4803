r"""The four residuals of high-order denoising score matching: pure algebra and the detach.

What:
    f(x, t) = σ_t s(x, t) is the dimensionless score (minus the predicted noise), D = ∂f/∂x (σ v)
    its Jacobian along a probe v, G = σ² ∇_x (vᵀ ∂f/∂x v) the gradient of its quadratic form.
    Against the noise ε that made x = α x₀ + σ ε, each residual has conditional mean zero given x
    if and only if its order is right.

Formula, with ℓ = ε + f held fixed, and D held fixed inside r3 as well:
    r1 = f + ε
    r2 = D + v − (ℓ·v) ℓ
    rt = v·D + ‖v‖² − (ℓ·v)²
    r3 = G + (ℓ·v)² ℓ − (v·D + ‖v‖²) ℓ − 2 (ℓ·v) (D + v)

    The targets are conditional cumulants of ε given x: f = −κ₁, σ ∂f/∂x + I = κ₂, G = −κ₃(v, v,
    ·).

Why the detach:
    It is part of the method, not an optimisation. Held fixed, the lower orders enter the targets
    of the higher ones with an error that is bounded: the minimiser of order two is off by
    exactly ‖ŝ₁ − ∇log q‖², that of order three by products of the lower errors. Let through, the
    higher orders could lower their loss by spoiling the lower ones.

Source:
    Lu et al., "Maximum Likelihood Training for Score-Based Diffusion ODEs by High-Order
    Denoising Score Matching", ICML 2022, arXiv 2206.08265, equations 10 to 15 and appendix.
"""

__all__ = [
    "first_residual",
    "second_residual",
    "sliced_residual",
    "third_residual",
    "trace_residual",
]

from torch import Tensor

from hosm_losses._checks import over_elements


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the elements of a sample: (K, B, *) and (K, B, *) to (K, B)."""
    return over_elements(a * b)


def _along(coefficient: Tensor, vector: Tensor) -> Tensor:
    """Multiply the vector (K, B, *) of every probe and sample by its number (K, B)."""
    return coefficient.reshape(*coefficient.shape, *(1,) * (vector.ndim - 2)) * vector


def first_residual(value: Tensor, noise: Tensor) -> Tensor:
    """r1 = f + ε.

    Args:
        value: f, of shape (K, B, *) or (1, B, *).
        noise: ε, of shape (B, *).

    Returns:
        r1, of the shape of `value`.
    """
    return value + noise


def second_residual(value: Tensor, directional: Tensor, noise: Tensor, probe: Tensor) -> Tensor:
    """r2 = D + v − (ℓ·v) ℓ with ℓ = (ε + f) detached; its mean square is the Jacobian's error.

    Args:
        value: f, of shape (K, B, *) or (1, B, *).
        directional: D = ∂f/∂x (σ v), of shape (K, B, *).
        noise: ε, of shape (B, *).
        probe: v, of shape (K, B, *).

    Returns:
        r2, of shape (K, B, *).
    """
    ell = first_residual(value, noise).detach()
    return directional + probe - _along(_inner(ell, probe), ell)


def trace_residual(value: Tensor, directional: Tensor, noise: Tensor, probe: Tensor) -> Tensor:
    """rt = v·D + ‖v‖² − (ℓ·v)² with ℓ = (ε + f) detached: the error of the trace.

    Args:
        value: f, of shape (K, B, *) or (1, B, *).
        directional: D = ∂f/∂x (σ v), of shape (K, B, *).
        noise: ε, of shape (B, *).
        probe: v, of shape (K, B, *).

    Returns:
        rt, of shape (K, B).
    """
    ell = first_residual(value, noise).detach()
    return _inner(probe, directional + probe) - _inner(ell, probe).square()


def third_residual(
    value: Tensor, directional: Tensor, gradient: Tensor, noise: Tensor, probe: Tensor
) -> Tensor:
    """r3 = G + (ℓ·v)² ℓ − (v·D + ‖v‖²) ℓ − 2 (ℓ·v) (D + v), everything but G detached.

    Args:
        value: f, of shape (K, B, *) or (1, B, *).
        directional: D = ∂f/∂x (σ v), of shape (K, B, *).
        gradient: G = σ² ∇_x (vᵀ ∂f/∂x v), of shape (K, B, *), or the Laplacian form σ² ∂²f[v, v],
            which is the same where ∂f/∂x is symmetric, as it is of a true score.
        noise: ε, of shape (B, *).
        probe: v, of shape (K, B, *).

    Returns:
        r3, of shape (K, B, *).
    """
    return gradient + _lower_orders(value, directional, noise, probe)


def sliced_residual(
    value: Tensor,
    directional: Tensor,
    curvature: Tensor,
    noise: Tensor,
    probe: Tensor,
    other: Tensor,
) -> Tensor:
    """u·r3 for another probe u, everything but the curvature detached.

    u·G = v·C with the curvature C = σ² ∂²f[v, u]. Over independent u of covariance one the mean of
    (u·r3)² is ‖r3‖².

    Args:
        value: f, of shape (K, B, *) or (1, B, *).
        directional: D = ∂f/∂x (σ v), of shape (K, B, *).
        curvature: C, of shape (K, B, *).
        noise: ε, of shape (B, *).
        probe: v, of shape (K, B, *).
        other: u, of shape (K, B, *).

    Returns:
        u·r3, of shape (K, B).
    """
    rest = _lower_orders(value, directional, noise, probe)
    return _inner(probe, curvature) + _inner(other, rest)


def _lower_orders(value: Tensor, directional: Tensor, noise: Tensor, probe: Tensor) -> Tensor:
    """r3 without G, all of it held fixed."""
    ell = first_residual(value, noise).detach()
    shifted = directional.detach() + probe
    slope = _inner(ell, probe)
    return _along(slope.square() - _inner(probe, shifted), ell) - _along(2 * slope, shifted)
