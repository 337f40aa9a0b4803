"""Posteriors beside zuko: what is exact, equal time, and every row."""

import sys

import pytest
import torch
from torch.distributions import Normal

pytest.importorskip("matplotlib")

from benchmarks import experiment, posteriors


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


def test_a_training_takes_its_time_and_its_rate_falls(monkeypatch):
    """By the clock alone, of which a step takes a second here."""
    clock, rates = [0.0], []
    monkeypatch.setattr(posteriors.time, "process_time", lambda: clock[0])
    network = torch.nn.Linear(1, 1)

    def step(count, optimizer):
        assert count == len(rates)
        clock[0] += 1.0
        rates.append(optimizer.param_groups[0]["lr"])
        return network(torch.ones(1, 1)).sum()

    assert posteriors.train(4.0, 2.0, network, step) == 4
    assert rates == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


@pytest.mark.parametrize("row", posteriors.ROWS)
def test_every_row_is_measured(row, monkeypatch):
    pytest.importorskip("zuko")
    kept = {}
    small = posteriors.Size(0.001, 8, 8)
    monkeypatch.setattr(posteriors, "Size", lambda: small)
    monkeypatch.setattr(experiment.results, "environment", lambda *, dirty: {"commit": "a"})
    monkeypatch.setattr(posteriors.results, "keep", lambda _, found: kept.update(found))
    monkeypatch.setattr(sys, "argv", ["posteriors", "--rows", f"^{row}$"])
    posteriors.main()
    found = kept[row]
    assert found["steps"] >= 1
    assert found["rate"] in posteriors.RATES
    low, high = found["kl"][1:]
    assert low < found["kl"][0] < high
    assert len(found["searched"]) == len(posteriors.RATES)
