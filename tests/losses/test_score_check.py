"""Whether scores are those of the data: exact samples, for which it is known what is found."""

import math
import re
import warnings

import pytest
import torch

import hosm_losses as hosm
from hosm_losses.losses import score_check
from tests.losses.test_target_scores import PLANE, few, score_of

WRONG = "expected scores whose mean of "
WEAK = "expected enough samples to tell scores that are wrong by 10%"
SLANTED = "expected matrix=True, or coordinates"
K, BOND = 3000.0, 1.0  # of springs over kT, a stiffness and a length


def draws(seed):
    return torch.Generator().manual_seed(seed)


def said(x, g, **options):
    """The warnings of a check, without the name of the function."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hosm.TargetScores.information_of(x, g, **options)
    messages = [str(each.message) for each in caught]
    assert all(each.startswith("TargetScores.information_of: ") for each in messages)
    return [each.partition(": ")[2] for each in messages]


def plane(count, seed=3):
    x = PLANE.sample(count, draws(seed))
    return x, score_of(PLANE)(x)


def chain(count, particles=22, dimensions=3, seed=0):
    """A freely jointed chain of springs (count, n, D) without its centre of mass; scores.

    Bonds are independent, with lengths of density r^(D − 1) exp(−K (r − BOND)²/2), here on a grid.
    """
    generator, shape = draws(seed), (count, particles - 1, dimensions)
    lengths = torch.linspace(BOND - 6 / math.sqrt(K), BOND + 6 / math.sqrt(K), 1001)
    log_density = (dimensions - 1) * lengths.log() - K * (lengths - BOND).square() / 2
    rows = torch.multinomial(
        log_density.softmax(0), shape[0] * shape[1], True, generator=generator
    )
    within = torch.rand(len(rows), generator=generator) - 0.5
    r = (lengths[rows] + within * (lengths[1] - lengths[0])).reshape(*shape[:2], 1)
    direction = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=2)
    x = torch.nn.functional.pad((r * direction).cumsum(1), (0, 0, 1, 0))
    pull = torch.nn.functional.pad(K * (r - BOND) * direction, (0, 0, 1, 1))
    return x - x.mean(1, keepdim=True), pull[:, 1:] - pull[:, :-1]


@pytest.mark.parametrize("seed", range(3))
def test_the_right_scores_of_many_samples_give_no_warning(seed):
    x, g = plane(40_000, seed)
    assert said(3.0 + x, g) == []


FAULTS = {
    "sign": lambda x, g: (x, -g),
    "temperature": lambda x, g: (x, g / 1.1),
    "units": lambda x, g: (10 * x, g),
    "edges": lambda x, g: (x.clamp(-0.5, 0.5), g * ((x > -0.5) & (x < 0.5))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_scores_that_are_not_those_of_the_data_give_a_warning(fault):
    (message,) = said(*FAULTS[fault](*plane(20_000)))
    assert message.startswith(f"{WRONG}−(x − x̄)·g is 2, the dimension; got ")


def test_the_mean_of_few_samples_is_not_too_small():
    """The covariance of two points is 2 with N − 1, so the scores of a Gaussian are −x/2."""
    x = torch.tensor([[-1.0], [1.0]])
    assert [float(each) for each in score_check._products(x, -x / 2)] == [1.0, 1.0]


@pytest.mark.parametrize("count", [2, 5, 31])
def test_too_few_samples_never_say_that_scores_are_wrong(count):
    """The error of a few means may be far too small by chance."""
    for seed in range(20):
        x = torch.randn(count, 3, generator=draws(seed))
        (message,) = said(x, -x)
        assert message.startswith(f"{WEAK}; got {count}, ")


def test_particles_that_coincide_are_named():
    x = torch.randn(4000, 4, 3, generator=draws(0))
    x[0, 1] = x[0, 0]
    (message,) = said(x, -x, particles=4)
    assert message.startswith("expected particles at different positions; got some that coincide")


def test_few_samples_say_what_they_cannot_tell():
    """The error of a Gaussian's mean is √(2 d/N)."""
    x = torch.randn(300, 8, generator=draws(0))
    (message,) = said(x, -x)
    found = r"got 300, whose mean of .* is (\S+) ± (\S+) and cannot tell 8, .* from (\S+)\. "
    mean, error, other = map(float, re.search(found, message).groups())
    assert error == pytest.approx(math.sqrt(2 * 8 / 300), rel=0.4)
    assert abs(mean - 8) < 5 * error
    assert other == pytest.approx(8 + 5 * error, rel=0.02)
    assert "particles=..." in message
    assert WEAK in message
    x = torch.randn(3000, 66, generator=draws(0))
    (message,) = said(x[:50], -x[:50])  # which are no subspace
    assert WEAK in message
    assert said(x, -x) == []
    (message,) = said(x, -x * 63 / 66)
    assert message.startswith(f"{WRONG}−(x − x̄)·g is 66, ")


@pytest.mark.parametrize("factor", [1.0, 1.06, 1 / 1.06])
def test_stiff_pairs_see_a_temperature_that_the_sum_does_not(factor):
    x, g = chain(3000)
    (message,) = said(x, factor * g, matrix=True)
    assert message.startswith(f"{WEAK}; got 3000, whose mean of −(x − x̄)·g is ")
    assert "cannot tell 63, the dimension, from " in message
    messages = said(x.flatten(1), factor * g.flatten(1), matrix=True, particles=22)
    assert len(messages) == (factor != 1)
    assert all(WRONG in each and "is 1, over stiff pairs; got" in each for each in messages)


def test_the_mean_over_pairs_has_no_bias_and_a_right_error():
    """Over 200 sets of few samples of particles that are all alike."""
    results = []
    for seed in range(200):
        x = torch.randn(100, 5, 3, generator=draws(seed))
        means = score_check._means_of_pairs(x, -x)
        results.append((means.mean(), means.std() / math.sqrt(len(means))))
    mean, error = torch.tensor(results).T
    assert abs(float(mean.mean()) - 1) < 5 * float(mean.std()) / math.sqrt(200)
    assert float(error.square().mean().sqrt()) == pytest.approx(float(mean.std()), rel=0.3)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_mean_over_pairs_is_that_of_the_scale(dimensions):
    """1, within errors that 21 independent bonds of variance 2 would have, √(2/(21 N))."""
    x, g = chain(3000, dimensions=dimensions)
    for scale in (1.0, 1.5):
        means = score_check._means_of_pairs(x, scale * g)
        error = float(means.std()) / math.sqrt(len(means))
        assert abs(float(means.mean()) - scale) < 5 * error
        assert error < 1.6 * scale * math.sqrt(2 / (21 * 3000))


@pytest.mark.parametrize("axes", [2, 3])
def test_pairs_of_gaussian_data(axes):
    """Springs of no length, none stiff, in a plane too; particles at rest do not count."""
    x = torch.randn(40_000, 4, 3, generator=draws(1)) / 2
    x = x - x.mean(1, keepdim=True)
    x[..., axes:] = 0
    padding = torch.zeros(40_000, 2, 3)
    for factor, count in ((1.0, 0), (1.1, 2)):
        g = -4 * factor * x
        assert len(said(x, g, matrix=True, particles=4)) == count
        padded = torch.cat([x, 2 + padding], 1), torch.cat([g, padding], 1)
        assert len(said(*padded, matrix=True, particles=6)) == count


def test_bonds_of_a_fixed_length_have_no_density():
    x, g = chain(3000)
    first = x[:, :1] - torch.nn.functional.normalize(x[:, 1:2] - x[:, :1], dim=2)
    rigid = torch.cat([first, x], 1), torch.cat([0 * g[:, :1], g], 1)
    message = said(*rigid, matrix=True, particles=23)[-1]
    assert abs(float(re.search(r"over stiff pairs; got (\S+) ±", message)[1])) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_slanted_subspace_needs_a_matrix(dtype):
    """Its dimension is found in any precision, and far from zero."""
    basis = torch.linalg.qr(torch.randn(3, 3, generator=draws(0))).Q[:2]
    y = torch.randn(40_000, 2, generator=draws(1))
    x, g = (y @ basis).to(dtype), (-y @ basis).to(dtype)
    (message,) = said(x, g)
    assert message.startswith(SLANTED)
    assert "of 2 dimensions; got data of 3" in message
    assert said(x, g, matrix=True) == []
    assert said(*(torch.cat([part, 0 * part[:, :1] + 7], 1) for part in (y, -y))) == []


@few
@pytest.mark.parametrize("seed", range(12))
def test_correlated_frames_give_no_false_alarm(seed):
    """A chain x' = ρ x + √(1 − ρ²) ξ, whose errors would be seven times too small by rows."""
    rho, d, generator = 0.98, 8, draws(seed)
    noise = math.sqrt(1 - rho**2) * torch.randn(6000, d, generator=generator)
    rows = [noise[0] / math.sqrt(1 - rho**2)]
    for each in noise[1:]:
        rows.append(rho * rows[-1] + each)
    x = torch.stack(rows)
    assert all(WEAK in each for each in said(x, -x, particles=4))
    by_rows = ((x - x.mean(0)) * x).sum(1)
    means = torch.stack([each.sum(1).mean() for each in score_check._products(x, -x)])
    assert float(means.std()) / math.sqrt(32) > 3 * float(by_rows.std()) / math.sqrt(6000)
