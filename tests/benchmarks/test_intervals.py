"""The intervals hold what they say, and the statistics are those of numpy."""

import numpy as np
import pytest
from benchmarks import intervals

TRIALS = 200


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_values_are_those_of_numpy(rng):
    x = rng.exponential(size=(3, 50))
    assert intervals.bootstrap(np.median, x[0]).value == np.median(x[0])
    assert intervals.ratio_of_medians(x[0], x[1]).value == np.median(x[0]) / np.median(x[1])
    assert intervals.mean_variance(x).value == pytest.approx(x.var(1, ddof=1).mean())
    ratio = intervals.ratio_of_variances(x, 2 * x[:, :30]).value
    assert ratio == pytest.approx(x.var(1, ddof=1).mean() / (4 * x[:, :30].var(1, ddof=1).mean()))
    assert intervals.root_mean_square(x).value == pytest.approx(np.sqrt((x**2).mean()))


def test_resamples_of_a_variance_are_centred_on_it():
    # Of two values a resample has both, or one of them twice, with equal chance.
    value, low, high = intervals.mean_variance([0.0, 2.0])
    assert (value, low, high) == (2.0, 0.0, 4.0)


# With 95 % a number of 200 trials has the mean 190 and the standard deviation 3.1. Bootstrap
# intervals of few samples are known to be somewhat short, hence the room below.
@pytest.mark.parametrize(
    ("statistic", "truth"),
    [
        (lambda x, _: intervals.bootstrap(np.median, x), 0.0),
        (lambda x, _: intervals.mean_variance(x), 1.0),
        (intervals.ratio_of_variances, 1.0),
        (lambda x, _: intervals.root_mean_square(x), 1.0),
        (lambda x, y: intervals.ratio_of_medians(x + 9, y + 9), 1.0),
    ],
)
def test_coverage(rng, statistic, truth):
    found = [statistic(*rng.normal(size=(2, 100))) for _ in range(TRIALS)]
    covered = sum(low <= truth <= high for _, low, high in found)
    assert 178 <= covered <= 199


def test_the_same_samples_give_the_same_interval(rng):
    x = rng.normal(size=20)
    assert intervals.mean_variance(x) == intervals.mean_variance(x.copy())
