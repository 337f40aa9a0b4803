"""The values that say how the ODE is solved: they check themselves, compare, hash and pickle."""

import pickle

import numpy as np
import pytest
import torch

import hosm_losses as hosm
from tests.cases import VP
from tests.likelihood.problems import gaussian

IMAGE = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1
VALUES = [
    hosm.FixedGrid(32, companion=True, data_mean=IMAGE, data_std=IMAGE.numpy()),
    hosm.ToTolerance(0.1, data_std=[0.5, 0.25]),
    hosm.Adaptive(0.5, data_mean=torch.tensor(1)),
    hosm.Uniform(2),
    hosm.EDMWeighting(np.float32(0.25)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_what_it_prints_as(value):
    written = eval(repr(value), vars(hosm))
    for same in (written, pickle.loads(pickle.dumps(value))):
        assert same == value
        assert hash(same) == hash(value)
    with pytest.raises(AttributeError):
        value.data_std = 1.0


def test_moments_are_numbers_in_their_own_precision():
    grid = VALUES[0]
    assert grid.data_mean == grid.data_std
    assert torch.equal(torch.tensor(grid.data_mean), IMAGE)
    assert hosm.Adaptive(data_std=torch.tensor(0.1).double()).data_std == 0.1
    assert type(hosm.FixedGrid(np.int64(8)).steps) is int


def test_a_prior_may_be_a_distribution():
    model, x = gaussian(VP), 0.5 * torch.randn(4, 3)
    normal = torch.distributions.Normal(torch.zeros(3), 1.0)
    of_sample = torch.distributions.Independent(normal, 1)
    options = {"solver": hosm.FixedGrid(8), "divergence": "exact"}
    calls = [
        lambda prior: hosm.ode_nll(model, x, log_prior=prior, **options),
        lambda prior: hosm.ode_sample(model, x, log_prior=prior, **options),
        lambda prior: hosm.variational_nll(
            model, x, samples=4, log_prior=prior, generator=torch.Generator().manual_seed(0)
        ),
    ]
    for call in calls:
        assert torch.equal(call(of_sample).nll, call(of_sample.log_prob).nll)
