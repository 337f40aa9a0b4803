"""Forces on molecules: the network, the molecule, the clusters and the checks."""

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import density_problems, molecule
from docs.examples.equivariant import PairNetwork

import hosm_losses as hosm


def particles(count=3, n=4, dtype=torch.float64):
    x = torch.randn(count, n, 3, dtype=dtype)
    return x - x.mean(1, keepdim=True)


def test_the_network_turns_moves_and_mirrors_with_the_particles():
    schedule, types = hosm.VESchedule(), torch.tensor([0, 1, 0, 1])
    network = PairNetwork(schedule, particles(50), types, 8).double()
    x, t = particles(), torch.rand(3).double()
    turn = torch.linalg.qr(torch.randn(3, 3).double()).Q
    predicted = network(x, t)
    torch.testing.assert_close(network(x @ turn, t), predicted @ turn)
    torch.testing.assert_close(network(-x, t), -predicted)
    swapped = [2, 3, 0, 1]
    torch.testing.assert_close(network(x[:, swapped], t), predicted[:, swapped])
    assert not torch.allclose(network(x[:, [1, 0, 3, 2]], t), predicted[:, [1, 0, 3, 2]])


def test_lennard_jones_is_its_sum_over_pairs():
    x = 2 * particles(2, 13)
    for value, one in zip(density_problems.lennard_jones(x.flatten(1)), x, strict=True):
        r = torch.pdist(one)
        expected = -(r**-12 - 2 * r**-6).sum() - one.square().sum() / 2
        torch.testing.assert_close(value, expected)


def test_forces_of_alanine_are_slopes_of_its_energy():
    pytest.importorskip("openmm")
    from docs.examples.alanine import Alanine

    dipeptide = Alanine(800.0)
    before, forces = dipeptide.simulate(2, 1)
    x, scores = molecule.turned((before, forces), 0)
    move = 1e-4 * torch.randn_like(x)
    change = dipeptide.log_target(x + move) - dipeptide.log_target(x - move)
    torch.testing.assert_close(change, 2 * (move * scores).sum((1, 2)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dipeptide.left_handed(-x), x, rtol=0, atol=0)
    torch.testing.assert_close(dipeptide.log_target(before), dipeptide.log_target(x))
    phi = dipeptide.torsion(x, "ACE C, ALA N, ALA CA, ALA C")
    torch.testing.assert_close(dipeptide.torsion(before, "ACE C, ALA N, ALA CA, ALA C"), phi)
    torch.testing.assert_close(dipeptide.torsion(-x, "ACE C, ALA N, ALA CA, ALA C"), -phi)


def test_the_checks_of_scores_by_hand():
    """Normal particles in three dimensions: the means are 12, and 1 over 1.06."""
    x = torch.randn(40_000, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    found = molecule.checks(x, -x)
    for name, expected in (("dimension", 12), ("pairs", 1 / 1.06)):
        mean, error = found[name]
        assert abs(mean - expected) < 5 * error < 0.05 * expected
