"""Weights of 0 at the end, where a ramp begins: the loss of the lower order, bit by bit."""

import numpy as np
import pytest
import torch

import hosm_losses as hosm
from tests.cases import FUNCTIONS, MLP, MODULES, VP, assert_same, randomise, with_gradients

D, BATCH = 3, 6
LOWER = [
    (3, (1, 0, 0, 0), 1),
    (3, (np.float32(1), 0.0, False + 0, np.int64(0)), 1),
    (3, np.array([1.0, 0, 0, 0]), 1),
    (2, (1, 0, 0), 1),
    (2, (1, 0, 0, 5.0), 1),  # the fourth is not used
    (3, (1, 0.5, 0, 0), 2),
    (3, (0, 0, 0.5, 0), 2),
]
OPTIONS = {
    "paired": {"probes": hosm.Paired()},
    "fraction": {"fraction": 0.5, "weighting": "likelihood"},
    "sum": {"reduction": "sum", "weighting": "native", "probes": "exact"},
    "none": {"reduction": "none", "time_sampler": "log_sigma_hat", "weighting": torch.exp},
}


def setting():
    network = MLP(D)
    randomise(network)
    return hosm.ScoreModel(network, VP), torch.randn(BATCH, D)


def draws():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("order", "weights", "lower"), LOWER)
def test_the_loss_is_that_of_the_lower_order_and_nothing_else_is_drawn(
    order, weights, lower, name
):
    model, x0 = setting()
    options = OPTIONS[name]
    alone = {
        key: options[key] for key in options if lower > 1 or key not in ("probes", "fraction")
    }
    alone |= {} if lower == 1 else {"weights": weights[:3]}
    one, other = draws(), draws()
    found = FUNCTIONS[order](model, x0, **options, weights=weights, generator=one)
    expected = FUNCTIONS[lower](model, x0, **alone, generator=other)
    assert torch.equal(one.get_state(), other.get_state())
    mine, theirs = (with_gradients(each.sum(), model) for each in (found, expected))
    assert all(map(torch.equal, mine, theirs))


def test_a_ramp_begins_without_the_higher_terms():
    model, x0 = setting()
    loss = MODULES[3](model, fraction=0.5)
    present = []
    for height in (0.0, 0.3, torch.tensor(0.0), 0.0):
        value, terms = loss(x0, weights=(1, 0.5 * height, 0, height), return_terms=True)
        value.backward()
        present.append([term is not None for term in terms])
        assert (terms.rows is None) is (not present[-1][1])
        assert terms.t.shape == (BATCH,)
    first, every = [True, False, False, False], [True] * 4
    assert present == [first, every, every, first]


def test_a_sum_over_a_fraction_is_the_mean_times_the_batch():
    model, x0 = setting()
    results = [
        hosm.second_order_dsm(
            model,
            x0,
            fraction=0.5,
            weights=(0, 1, 0),
            reduction=reduction,
            generator=torch.Generator().manual_seed(0),
        )
        for reduction in ("sum", "mean")
    ]
    assert_same(results[0], BATCH * results[1], 1e-12)


def test_a_probe_is_checked_before_it_is_needed():
    model, x0 = setting()
    with pytest.raises(ValueError, match="probe: expected"):
        hosm.third_order_dsm(model, x0, probe=torch.ones(2), weights=(1, 0, 0, 0))
