"""Every peer, and the reference, give the likelihood that is known."""

import pytest
import torch
from benchmarks.likelihood import PEERS, adaptive, peers
from benchmarks.trained import exact
from torch import Tensor

import hosm_losses as hosm
from tests.oracles import paper_mixture, ring


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_right(name):
    """In one dimension a probe of signs is exact; in two the divergence has to be."""
    methods = [each for each in peers(exact=True) if each.name.removesuffix(", exact") == name]
    if not methods:
        pytest.skip(f"needs {PEERS[name][0]}")
    for method in methods:
        for mixture in [paper_mixture()] if method.random else [paper_mixture(), ring()]:
            problem = exact(mixture)
            x = problem.data[:4]
            expected = adaptive(problem, x, 1e-7, 0)
            found = method.solve(problem, x, 1e-8, 0)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_the_reference_is_the_density():
    """The model of the ring is exact, so that its likelihood is known but for the prior."""
    problem = exact(ring())
    x, schedule = problem.data[:4], problem.model.schedule

    def log_density(x: Tensor, t: float) -> Tensor:
        return ring().log_density(x, *schedule(x.new_full((4,), t)))

    options = {"method": "adaptive", "divergence": "exact", "tolerance": 1e-7}
    found = hosm.ode_nll(
        problem.model, x, **options, log_prior=lambda x: log_density(x, schedule.t_max)
    )
    torch.testing.assert_close(-found.nll, log_density(x, schedule.t_min), rtol=0, atol=1e-5)
