"""Posteriors beside zuko: what is exact."""

import pytest
import torch
from torch.distributions import Normal

pytest.importorskip("matplotlib")

from benchmarks import posteriors


def log_joint(a, b, first, second):
    """Of one pair, with its observations."""
    prior = Normal(0, 1).log_prob(a) + Normal(0, 1).log_prob(b)
    return prior + Normal(a, 1).log_prob(first) + Normal(b + a**2, 0.1).log_prob(second)


@pytest.mark.parametrize("d", [2, 10])
def test_posteriors_are_exact(d):
    """The joint density pair by pair, and its integral over both of a pair."""
    theta, x = (part.double() for part in posteriors.simulate(3, d, posteriors.seeded(1)))
    assert (theta.shape, x.shape) == ((3, d), (3, d))
    pairs = zip((theta @ posteriors.rotation(d).double()).split(2, 1), x.split(2, 1), strict=True)
    joint = sum(log_joint(*z.unbind(1), *seen.unbind(1)) for z, seen in pairs)
    torch.testing.assert_close(posteriors.log_joint(theta, x), joint, rtol=1e-6, atol=1e-6)
    grid = torch.linspace(-7, 7, 701, dtype=torch.float64)
    evidence = [
        sum(log_joint(grid[:, None], grid, *pair).logsumexp((0, 1)) for pair in row.split(2))
        for row in x
    ]
    expected = torch.stack(evidence) + d * torch.tensor(0.02).double().log()
    torch.testing.assert_close(posteriors.log_evidence(x), expected, rtol=1e-6, atol=1e-6)


def test_simulations_are_noisy_as_they_say():
    theta, x = posteriors.simulate(20_000, 10, posteriors.seeded(1))
    noise = (x.unflatten(1, (-1, 2)) - posteriors.curved(theta)) / posteriors.NOISE
    assert noise.flatten(1).mean(0).tolist() == pytest.approx([0] * 10, abs=5 / 20_000**0.5)
    assert noise.flatten(1).std(0).tolist() == pytest.approx([1] * 10, abs=5 / 40_000**0.5)


def test_scores_are_slopes_of_the_joint_density():
    theta, x = (part.double() for part in posteriors.simulate(4, 10, posteriors.seeded(1)))
    small = 1e-6 * torch.randn_like(theta)
    moved = posteriors.log_joint(theta + small, x) - posteriors.log_joint(theta - small, x)
    slope = 2 * (small * posteriors.score(theta, x)).sum(1)
    torch.testing.assert_close(moved, slope, rtol=1e-5, atol=1e-9)
