"""The residuals against exact posteriors: finite data, all sign vectors, exact minimisers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hosm_losses import VPSchedule
from hosm_losses.losses.terms import (
    common,
    first_residual,
    second_residual,
    third_target,
    trace_residual,
)
from tests.oracles import atoms_posterior, sign_vectors


def posterior(seed: int, atoms: int, d: int, t: float):
    """x, the noises that may have led there, their probabilities, and the cumulants of ε given x."""
    generator = torch.Generator().manual_seed(seed)
    alpha, sigma = (float(part) for part in VPSchedule()(torch.tensor(t)))
    points = torch.randn((atoms, d), generator=generator)
    weights = torch.rand((atoms,), generator=generator).softmax(0)
    x = alpha * points[:1] + sigma * torch.randn((1, d), generator=generator)
    noise, p = atoms_posterior(points, weights, x, alpha, sigma)
    noise, p = noise[0], p[0]
    mean = p @ noise
    centred = noise - mean
    covariance = torch.einsum("k,ki,kj->ij", p, centred, centred)
    third = torch.einsum("k,ki,kj,kl->ijl", p, centred, centred, centred)
    return noise, p, mean, covariance, third


def fields(mean, covariance, third, v):
    """f, D and G of the true score: minus the first, and the other two, conditional cumulants."""
    f = -mean
    along = (covariance - torch.eye(len(mean))) @ v
    gradient = -torch.einsum("ijl,i,j->l", third, v, v)
    return f, along, gradient


def residuals(noise, f, along, gradient, v):
    """All four residuals, for every atom in turn as a batch."""
    count = len(noise)
    f, along, gradient, v = (part.expand(1, count, -1) for part in (f, along, gradient, v))
    first = first_residual(f, noise)
    shared = common(first, along, v)
    second, trace = second_residual(shared), trace_residual(shared)
    return first[0], second[0], trace[0], (gradient - third_target(shared))[0]


cases = given(
    seed=st.integers(0, 10_000),
    atoms=st.integers(3, 6),
    d=st.integers(1, 4),
    t=st.floats(0.02, 1.0),
)


@cases
def test_every_residual_has_mean_zero_at_the_true_score(seed, atoms, d, t):
    noise, p, mean, covariance, third = posterior(seed, atoms, d, t)
    v = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    f, along, gradient = fields(mean, covariance, third, v)
    for residual in residuals(noise, f, along, gradient, v):
        expected = torch.tensordot(p, residual, 1)
        assert float(expected.abs().max()) < 1e-9


@cases
def test_the_minimisers_are_off_by_exactly_the_lower_errors(seed, atoms, d, t):
    noise, p, mean, covariance, third = posterior(seed, atoms, d, t)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(d, generator=generator)
    delta = torch.randn(d, generator=generator)
    wrong_slope = torch.randn(d, generator=generator)
    f, along, gradient = fields(mean, covariance, third, v)
    f = f + delta

    # The minimiser of a mean square is what makes the mean residual vanish.
    _, r2, rt, _ = residuals(noise, f, along, gradient, v)
    best = along - p @ r2
    torch.testing.assert_close(best - along, (delta @ v) * delta, rtol=0, atol=1e-9)
    shift = float(p @ rt)
    assert -shift == pytest.approx(float((delta @ v) ** 2), abs=1e-9)

    # Order three with order two off by E v: −(δ·v)² δ + (v·E v) δ + 2 (δ·v) E v.
    _, _, _, r3 = residuals(noise, f, along + wrong_slope, gradient, v)
    best = gradient - p @ r3
    expected = (
        -((delta @ v) ** 2) * delta + (v @ wrong_slope) * delta + 2 * (delta @ v) * wrong_slope
    )
    torch.testing.assert_close(best - gradient, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_all_sign_vectors_average_to_the_exact_terms(d):
    jacobian, second = torch.randn(d, d), torch.randn(d, d, d)
    f, noise, sigma = torch.randn(d), torch.randn(d), 0.7
    signs = sign_vectors(d)
    count = len(signs)
    along = sigma * signs @ jacobian.T
    gradient = sigma**2 * torch.einsum("ijk,ni,nj->nk", second, signs, signs)
    shared = common((f + noise).expand(1, 1, d), along[:, None], signs[:, None])
    r2, rt = second_residual(shared)[:, 0], trace_residual(shared)[:, 0]
    r3 = gradient - third_target(shared)[:, 0]

    ell = f + noise
    m2 = sigma * jacobian + torch.eye(d) - torch.outer(ell, ell)
    off = torch.triu(m2 + m2.T, 1)
    exact_r3 = (
        sigma**2 * torch.einsum("iik->k", second)
        + ell.dot(ell) * ell
        - (sigma * jacobian.trace() + d) * ell
        - 2 * (sigma * jacobian + torch.eye(d)) @ ell
    )
    torch.testing.assert_close((r2**2).sum(1).mean(), (m2**2).sum())
    torch.testing.assert_close(rt.mean(), m2.trace())
    torch.testing.assert_close((rt**2).mean(), m2.trace() ** 2 + (off**2).sum())
    torch.testing.assert_close(r3.mean(0), exact_r3)
    assert count == 2**d


@pytest.mark.parametrize("d", [1, 3])
def test_the_unit_vectors_sum_to_the_exact_terms(d):
    jacobian, second = torch.randn(d, d), torch.randn(d, d, d)
    f, noise, sigma = torch.randn(d), torch.randn(d), 0.7
    units = torch.eye(d)[:, None]
    along = sigma * jacobian.T[:, None]
    gradient = sigma**2 * torch.einsum("iik->ik", second)[:, None]
    shared = common((f + noise).expand(1, 1, d), along, units)
    ell = f + noise
    m2 = sigma * jacobian + torch.eye(d) - torch.outer(ell, ell)
    torch.testing.assert_close((second_residual(shared) ** 2).sum(), (m2**2).sum())
    torch.testing.assert_close(trace_residual(shared).sum(), m2.trace())
    r3 = (gradient - third_target(shared)).sum((0, 1))
    exact = (
        sigma**2 * torch.einsum("iik->k", second)
        + ell.dot(ell) * ell
        - (sigma * jacobian.trace() + d) * ell
        - 2 * (sigma * jacobian + torch.eye(d)) @ ell
    )
    torch.testing.assert_close(r3, exact)


def test_what_is_detached_and_what_is_not():
    f, along, gradient = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(3))
    noise, v = torch.randn(3, 4), torch.randn(2, 3, 4)

    def sources(residual):
        parts = (f, along, gradient)
        grads = torch.autograd.grad(residual.square().sum(), parts, allow_unused=True)
        return tuple(grad is not None for grad in grads)

    first = first_residual(f, noise)
    shared = common(first, along, v)
    assert sources(first) == (True, False, False)
    assert sources(second_residual(shared)) == (False, True, False)
    assert sources(trace_residual(shared)) == (False, True, False)
    assert sources(gradient - third_target(shared)) == (False, False, True)


@cases
def test_the_exact_forms_are_off_by_exactly_the_lower_errors(seed, atoms, d, t):
    noise, p, mean, covariance, third = posterior(seed, atoms, d, t)
    generator = torch.Generator().manual_seed(seed)
    delta, error = torch.randn(d, generator=generator), torch.randn(d, d, generator=generator)
    second_off, third_off = [], torch.zeros(d)
    for unit in torch.eye(d):
        f, along, gradient = fields(mean, covariance, third, unit)
        _, r2, _, _ = residuals(noise, f + delta, along, gradient, unit)
        _, _, _, r3 = residuals(noise, f + delta, along + error @ unit, gradient, unit)
        second_off.append(-(p @ r2))
        third_off = third_off - p @ r3
    torch.testing.assert_close(
        torch.stack(second_off, 1), torch.outer(delta, delta), rtol=0, atol=1e-9
    )
    expected = -delta.dot(delta) * delta + error.trace() * delta + 2 * error @ delta
    torch.testing.assert_close(third_off, expected, rtol=0, atol=1e-8)
