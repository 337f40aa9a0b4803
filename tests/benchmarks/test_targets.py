"""What a likelihood costs at a target error, on made-up runs whose answer is known."""

import numpy as np
import pytest
import torch
from benchmarks.likelihood import Method, Runs, at_target, estimates

SEEDS = 400


def runs(name, seconds, *, noise=0.0, bias=0.0, evaluations=10.0, ours=False, random=True):
    """Runs of two samples with a noise and a solver's error."""
    method = Method(name, "tolerance", (1e-3,), lambda *_: None, ours=ours, random=random)
    found = Runs(method, 1e-3)
    drawn = torch.randn(SEEDS, 2, generator=torch.Generator().manual_seed(0)).double()
    found.nll = list(noise * drawn + bias)
    found.seconds, found.evaluations, found.bias = [seconds] * SEEDS, [evaluations] * SEEDS, bias
    return found, found.errors(torch.zeros(2).double())


def test_noise_is_averaged_and_bias_is_not():
    assert estimates(np.full((2, 5), 3.0), 0.0, 1.0) == pytest.approx(9.0)
    assert estimates(np.full((2, 5), 3.0), 0.6, 1.0) == pytest.approx(9 / 0.64)
    assert estimates(np.full((2, 5), 0.1), 0.0, 1.0) == 1.0


def test_a_noisy_peer_pays_for_its_noise():
    found = at_target(
        [runs("we", 1.0, noise=1.0, ours=True), runs("they", 0.5, noise=4.0)], 0.5, random=True
    )
    assert found["we"]["over_ours"][0] == 1.0
    assert found["we"]["seconds"] == pytest.approx(4.0, rel=0.1)
    assert found["they"]["over_ours"][0] == pytest.approx(8.0, rel=0.1)
    assert found["they"]["evaluations"] == pytest.approx(640, rel=0.1)
    assert not found["they"]["ahead"]


def test_time_and_evaluations_are_told_apart():
    fast = runs("they", 0.5, noise=1.0, evaluations=20.0)
    few = runs("others", 2.0, noise=1.0, evaluations=5.0)
    found = at_target([runs("we", 1.0, noise=1.0, ours=True), fast, few], 0.5, random=True)
    told = {name: (row["ahead"], row["fewer_evaluations"]) for name, row in found.items()}
    assert told == {"we": (False, False), "they": (True, False), "others": (False, True)}


def test_a_bias_as_large_as_the_target_is_out_of_reach():
    biased = runs("they", 0.1, noise=0.1, bias=0.5)
    assert "they" not in at_target(
        [runs("we", 1.0, noise=1.0, ours=True), biased], 0.5, random=True
    )


def test_an_exact_result_reaches_the_target_or_does_not():
    every = [
        runs("we", 1.0, bias=0.01, ours=True, random=False),
        runs("they", 0.2, bias=0.2, random=False),
        runs("others", 0.3, bias=0.09, random=False),
    ]
    found = at_target(every, 0.1, random=False)
    assert found.keys() == {"we", "others"}
    assert found["others"]["ahead"]
    assert found["others"]["over_ours"][0] == pytest.approx(0.3)
