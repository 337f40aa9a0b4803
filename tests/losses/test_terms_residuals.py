"""The residuals against exact posteriors: finite data, exact minimisers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hosm_losses.losses.terms import higher_residuals
from tests.cases import VP
from tests.oracles import atoms_posterior


def posterior(seed: int, atoms: int, d: int, t: float):
    """The noises that may have led to an x, their probabilities, and cumulants of ε given x."""
    generator = torch.Generator().manual_seed(seed)
    alpha, sigma = (float(part) for part in VP(torch.tensor(t)))
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
    along = (covariance - torch.eye(len(mean))) @ v
    return -mean, along, -torch.einsum("ijl,i,j->l", third, v, v)


def residuals(noise, f, along, gradient, v):
    """All four residuals, for every atom in turn as a batch."""
    count = len(noise)
    f, along, gradient, v = (part.expand(1, count, -1) for part in (f, along, gradient, v))
    first = f + noise
    second, trace, target = higher_residuals(first, along + v, v)
    return first[0], second[0], trace[0], (gradient - target)[0]


@given(
    seed=st.integers(0, 10_000),
    atoms=st.integers(3, 6),
    d=st.integers(1, 4),
    t=st.floats(0.02, 1.0),
    size=st.sampled_from([0.0, 1.0]),
)
def test_the_minimisers_are_off_by_exactly_the_lower_errors(seed, atoms, d, t, size):
    """The minimiser of a mean square is what makes the mean residual vanish.

    Without errors, of size 0, that is the true score.
    """
    noise, p, *moments = posterior(seed, atoms, d, t)
    generator = torch.Generator().manual_seed(seed)
    v, delta = torch.randn((2, d), generator=generator)
    delta, error = size * delta, size * torch.randn((d, d), generator=generator)

    def off(v):
        """What is to be added to D, v·D and, where D is off by E v, to G."""
        f, along, gradient = fields(*moments, v)
        _, r2, rt, _ = residuals(noise, f + delta, along, gradient, v)
        _, _, _, r3 = residuals(noise, f + delta, along + error @ v, gradient, v)
        return -(p @ r2), -(p @ rt), -(p @ r3)

    second, trace, third = off(v)
    slope, wrong = delta @ v, error @ v
    torch.testing.assert_close(second, slope * delta, rtol=0, atol=1e-9)
    torch.testing.assert_close(trace, slope**2, rtol=0, atol=1e-9)
    expected = -(slope**2) * delta + (v @ wrong) * delta + 2 * slope * wrong
    torch.testing.assert_close(third, expected, rtol=0, atol=1e-8)
    # The exact forms, as sums over the unit vectors.
    second, _, third = zip(*(off(unit) for unit in torch.eye(d)), strict=True)
    outer = torch.outer(delta, delta)
    torch.testing.assert_close(torch.stack(second, 1), outer, rtol=0, atol=1e-9)
    expected = -delta.dot(delta) * delta + error.trace() * delta + 2 * error @ delta
    torch.testing.assert_close(sum(third), expected, rtol=0, atol=1e-8)
