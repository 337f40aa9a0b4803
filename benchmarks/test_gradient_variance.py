"""How noisy is the gradient of each loss term and of each third-order estimator, against σ̂?

python -m pytest benchmarks/test_gradient_variance.py
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from docs.examples import mixture_1d as example
from tests.oracles import MLP, atoms_posterior, sign_vectors
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import trained
from benchmarks.fields import LEVELS
from benchmarks.gradients import TERMS, estimators, gradient, measure, moments
from benchmarks.peers import meng
from hosm_losses.losses import terms as residuals

# The size of a minibatch, and the kinds of probes beside signs.
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "mixture": (256, ()),
    "digits": (16, ("gaussian",)),
    "images": (2, ("gaussian", "dct")),
    "large images": (2, ("gaussian", "dct")),
}


def mixture(steps: int) -> trained.Problem:
    """The example's network, trained with order three under VP."""
    job = example.Job("vp", 3, steps, seed=0)
    model = example.new_model(job)
    for _ in tqdm(example.training(model, job), "mixture", job.steps, leave=False):
        pass
    data = trained.mixture(trained.HELD_OUT, torch.Generator().manual_seed(0))
    return trained.Problem(model, data, example.DATA_STD, trained.mixture)


@pytest.mark.parametrize("name", CASES)
def test_gradient_variance(benchmark, choose, name):
    if name == "large images" and not choose(False, False, True):
        pytest.skip("with --full")
    batch, distributions = CASES[name]
    if name == "mixture":
        problem = mixture(choose(2, 1000, 2000))
    else:
        problem = trained.trained(name, choose(2, None if name == "digits" else 300, None))
    levels = choose(LEVELS[2:3], LEVELS, LEVELS)
    log_levels = (torch.tensor(levels, dtype=torch.float64) * problem.std).log()
    log_levels = log_levels.clamp(*problem.model.schedule.log_sigma_hat_range)
    minibatches = choose(8, 8, 16 if name == "large images" else 48)
    given = (problem, log_levels, estimators(distributions))
    size = {"minibatches": minibatches, "batch": batch}
    figures = benchmark.pedantic(measure, given, size, rounds=1)
    elements = problem.data[0].numel()
    benchmark.extra_info.update(figures, levels=list(levels), elements=elements)
    assert all(share == (0, 0, 0) for share in figures["probe share"]["first"])


def test_the_moments_are_those_of_the_plain_gradients():
    drawn = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, middle = moments(drawn), drawn.mean(0)
    between = float((drawn[0] - drawn[1]).square().sum()) / 12
    assert found.probes[0] == pytest.approx(between)
    assert found.total[0] == pytest.approx(float(torch.cov(middle.T).trace()) + between / 2)
    products = [middle[i] @ middle[j] for i, j in product(range(6), repeat=2) if i != j]
    assert found.signal[0] == pytest.approx(float(sum(products)) / 30)
    # Without probes the total is the trace of the covariance alone.
    alone = moments(middle.expand(2, -1, -1))
    assert alone.total[0] == pytest.approx(float(torch.cov(middle.T).trace()))


@pytest.fixture(scope="module")
def population() -> Tensor:
    """Gradients (data, signs, P) of the third term: three points and all signs of the plane."""
    torch.manual_seed(0)
    model = hosm.ScoreModel(MLP(2, width=3).double(), hosm.VPSchedule())
    x0, noise = torch.randn(2, 3, 1, 2, dtype=torch.float64)
    t, parameters = torch.full((1,), 0.5, dtype=torch.float64), list(model.parameters())
    found = []
    for (x, eps), v in product(zip(x0, noise, strict=True), sign_vectors(2)):
        term = TERMS["third"](model, x, t=t, noise=eps, probe=v[None])
        found.append(gradient(term.mean(), parameters))
    return torch.stack(found).unflatten(0, (3, -1))


def parts(population: Tensor) -> tuple[float, float]:
    """The variance among signs, and that among points."""
    among_signs = population.var(1, correction=0).sum(1).mean()
    return float(among_signs), float(population.mean(1).var(0, correction=0).sum())


def test_the_estimates_are_unbiased(population):
    """The mean over every pair of minibatches there could be is the law of total variance."""
    points, signs, _ = population.shape
    evaluated = list(product(range(points), range(signs), range(signs)))
    every = [
        moments(torch.stack([population[[i, j], [a, c]], population[[i, j], [b, d]]]))
        for (i, a, b), (j, c, d) in product(evaluated, repeat=2)
    ]
    total, probes, signal = (np.mean([found[k][0] for found in every]) for k in range(3))
    among_signs, among_points = parts(population)
    assert probes == pytest.approx(among_signs, rel=1e-9)
    assert total == pytest.approx(among_signs + among_points, rel=1e-9)
    assert signal == pytest.approx(float(population.mean((0, 1)).square().sum()), rel=1e-9)


def test_two_probes_leave_half_of_their_part(population):
    pairs = (population[:, :, None] + population[:, None]).flatten(1, 2) / 2
    among_signs, among_points = parts(population)
    left = pairs.flatten(0, 1).var(0, correction=0).sum()
    assert float(left) == pytest.approx(among_points + among_signs / 2)


def test_resamples_of_the_bootstrap_are_centred_on_the_estimate():
    drawn = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for values in moments(drawn + 0.2):
        error = values[1:].std() / len(values) ** 0.5
        assert abs(values[1:].mean() - values[0]) < 4 * error


@pytest.mark.parametrize("d", [1, 3])
def test_the_minimisers_at_second_order(d):
    """Data that is five points: both residuals have mean zero, and what an error of f does."""
    generator = torch.Generator().manual_seed(d)
    points, x, v, delta = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, d), (1, d), (d,), (d,))
    )
    (noise,), (p,) = atoms_posterior(points, torch.full((5,), 0.2).double(), x, 0.8, 0.6)
    f = -(p @ noise)
    along = torch.cov(noise.T, correction=0, aweights=p).reshape(d, d) @ v - v

    def off(residual: Callable[..., Tensor], value: Tensor) -> Tensor:
        """How far the minimiser is from D: a mean square is least where its mean residual is 0."""
        parts = (part.expand(1, 5, d) for part in (value, along))
        return -(p @ residual(*parts, noise, v.expand(1, 5, d))[0])

    zero, outer = torch.zeros_like(v), torch.outer(delta, delta)
    crossed = torch.outer(f, delta) + torch.outer(delta, f)
    for residual, expected in (
        (residuals.second_residual, outer @ v),
        (meng.second_residual, -(crossed + outer) @ v),
    ):
        torch.testing.assert_close(off(residual, f), zero, rtol=0, atol=1e-12)
        torch.testing.assert_close(off(residual, f + delta), expected, rtol=0, atol=1e-12)


def test_the_term_of_meng_et_al_over_all_signs_is_the_exact_one():
    torch.manual_seed(0)
    model = hosm.ScoreModel(MLP(3).double(), hosm.VPSchedule())
    x0, noise = torch.randn(2, 1, 3, dtype=torch.float64)
    given = {"t": torch.full((1,), 0.5, dtype=torch.float64), "noise": noise}
    exact = meng.second_term(model, x0, probes="exact", **given)
    random = meng.second_term(model, x0, probe=sign_vectors(3)[:, None], **given)
    torch.testing.assert_close(random, exact)
