"""The moments of gradients are unbiased, and their intervals are centred on them."""

from itertools import product

import numpy as np
import pytest
import torch
from benchmarks.gradient_variance import estimators, gradient, moments

import hosm_losses as hosm
from tests.cases import MLP
from tests.oracles import sign_vectors


def test_the_estimates_are_unbiased():
    """The mean over every pair of minibatches there could be is the law of total variance.

    The population is the gradient of the third term at three points with all signs of the plane.
    """
    model = hosm.ScoreModel(MLP(2, width=3).double(), hosm.VPSchedule())
    x0, noise = torch.randn(2, 3, 1, 2, dtype=torch.float64)
    t, parameters = torch.full((1,), 0.5, dtype=torch.float64), list(model.parameters())
    third, found = estimators(2)["third"], []
    for (x, eps), v in product(zip(x0, noise, strict=True), sign_vectors(2)):
        value = third(model, x, t=t, noise=eps, probe=v[None])
        found.append(gradient(value.mean(), parameters))
    population = torch.stack(found).unflatten(0, (3, -1))
    evaluated = list(product(range(3), range(4), range(4)))
    every = [
        moments(torch.stack([population[[i, j], [a, c]], population[[i, j], [b, d]]]))
        for (i, a, b), (j, c, d) in product(evaluated, repeat=2)
    ]
    total, probes, signal = (np.mean([found[k][0] for found in every]) for k in range(3))
    among_signs = float(population.var(1, correction=0).sum(1).mean())
    among_points = float(population.mean(1).var(0, correction=0).sum())
    assert probes == pytest.approx(among_signs, rel=1e-9)
    assert total == pytest.approx(among_signs + among_points, rel=1e-9)
    assert signal == pytest.approx(float(population.mean((0, 1)).square().sum()), rel=1e-9)
