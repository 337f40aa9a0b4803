"""The moments of gradients are unbiased, and their intervals are centred on them."""

from itertools import product

import numpy as np
import pytest
import torch
from benchmarks.gradient_variance import estimators, gradient, moments
from benchmarks.trained import trained

import hosm_losses as hosm
from tests.oracles import MLP, sign_vectors


def test_the_moments_are_those_of_the_plain_gradients():
    drawn = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, middle = moments(drawn), drawn.mean(0)
    between = float((drawn[0] - drawn[1]).square().sum()) / 12
    assert found.probes[0] == pytest.approx(between)
    assert found.total[0] == pytest.approx(float(torch.cov(middle.T).trace()) + between / 2)
    products = [middle[i] @ middle[j] for i, j in product(range(6), repeat=2) if i != j]
    assert found.signal[0] == pytest.approx(float(sum(products)) / 30)


def test_the_estimates_are_unbiased():
    """The mean over every pair of minibatches there could be is the law of total variance.

    The population is the gradient of the third term at three points with all signs of the plane.
    """
    torch.manual_seed(0)
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


def test_resamples_of_the_bootstrap_are_centred_on_the_estimate():
    drawn = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for values in moments(drawn + 0.2):
        error = values[1:].std() / len(values) ** 0.5
        assert abs(values[1:].mean() - values[0]) < 4 * error


def test_paired_probes_take_the_noise_of_the_probes_away():
    """The variance of each term's gradient over minibatches, beside one probe of the paper's."""
    pytest.importorskip("sklearn")
    problem, minibatches, batch = trained("digits", 200), 24, 32
    parameters, generator = list(problem.model.parameters()), torch.Generator().manual_seed(0)
    found = {estimator: [] for estimator in ("hutchinson", "paired")}
    for _ in range(minibatches):
        x0 = problem.draw(batch, generator)
        t = problem.model.schedule.sample_time(batch, generator)
        given = {"t": t, "noise": torch.randn(x0.shape, generator=generator)}
        for estimator, rows in found.items():
            terms = hosm.dsm_terms(
                problem.model, x0, estimator=estimator, generator=generator, **given
            )
            several = [term.mean() for term in terms[1:]]
            rows.append(
                torch.stack(
                    [
                        gradient(term, parameters, retain_graph=term is not several[-1])
                        for term in several
                    ]
                )
            )
    one, other = (torch.stack(rows).double().var(0).sum(1) for rows in found.values())
    assert (one / other).min() > 12
