"""Every peer gives the likelihood that is known, and what it costs at a target error."""

import numpy as np
import pytest
import torch
from benchmarks.likelihood import PEERS, Method, Runs, adaptive, at_target, estimates, peers
from benchmarks.trained import exact

from tests.oracles import paper_mixture, ring

SEEDS = 400


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


def runs(name, seconds, *, noise=0.0, bias=0.0, evaluations=10.0, random=True):
    """Runs of two samples with a noise and a solver's error."""
    of_ours = {"ours": name == "we", "random": random}
    found = Runs(Method(name, "tolerance", (1e-3,), lambda *_: None, **of_ours), 1e-3)
    drawn = torch.randn(SEEDS, 2, generator=torch.Generator().manual_seed(0)).double()
    found.nll = list(noise * drawn + bias)
    found.seconds, found.evaluations, found.bias = [seconds] * SEEDS, [evaluations] * SEEDS, bias
    return found, found.errors(torch.zeros(2).double())


def test_noise_is_averaged_and_bias_is_not():
    assert estimates(np.full((2, 5), 3.0), 0.0, 1.0) == pytest.approx(9.0)
    assert estimates(np.full((2, 5), 3.0), 0.6, 1.0) == pytest.approx(9 / 0.64)
    assert estimates(np.full((2, 5), 0.1), 0.0, 1.0) == 1.0


def test_a_noisy_peer_pays_for_its_noise_and_a_biased_one_is_out_of_reach():
    noisy, biased = runs("they", 0.5, noise=4.0), runs("biased", 0.1, noise=0.1, bias=0.5)
    found = at_target([runs("we", 1.0, noise=1.0), noisy, biased], 0.5, random=True)
    assert found.keys() == {"we", "they"}
    assert found["we"]["over_ours"][0] == 1.0
    assert found["we"]["seconds"] == pytest.approx(4.0, rel=0.1)
    assert found["they"]["over_ours"][0] == pytest.approx(8.0, rel=0.1)
    assert found["they"]["evaluations"] == pytest.approx(640, rel=0.1)


def test_an_exact_result_reaches_the_target_or_does_not():
    errors = {"we": (1.0, 0.01), "they": (0.2, 0.2), "others": (0.3, 0.09)}
    every = [runs(name, s, bias=bias, random=False) for name, (s, bias) in errors.items()]
    found = at_target(every, 0.1, random=False)
    assert found.keys() == {"we", "others"}
    assert found["others"]["over_ours"][0] == pytest.approx(0.3)
