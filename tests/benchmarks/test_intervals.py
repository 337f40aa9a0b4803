"""The intervals hold what they say, and the statistics are those of numpy."""

import numpy as np
import pytest
from benchmarks import intervals


def test_values_are_those_of_numpy():
    x = np.random.default_rng(0).exponential(size=(3, 50))
    assert intervals.ratio_of_medians(x[0], x[1]).value == np.median(x[0]) / np.median(x[1])
    assert intervals.mean_variance(x).value == pytest.approx(x.var(1, ddof=1).mean())
    ratio = intervals.ratio_of_variances(x, 2 * x[:, :30]).value
    assert ratio == pytest.approx(x.var(1, ddof=1).mean() / (4 * x[:, :30].var(1, ddof=1).mean()))
    assert intervals.root_mean_square(x).value == pytest.approx(np.sqrt((x**2).mean()))
    # Of two values a resample has both, or one of them twice, with equal chance.
    assert intervals.mean_variance([0.0, 2.0]) == (2.0, 0.0, 4.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statistic", "truth"),
    [
        (lambda x, _: intervals.mean_variance(x), 1.0),
        (intervals.ratio_of_variances, 1.0),
        (lambda x, _: intervals.root_mean_square(x), 1.0),
    ],
)
def test_coverage(statistic, truth):
    """A number of 200 trials with the mean 190 and the standard deviation 3.1.

    Bootstrap intervals of few samples are known to be somewhat short, hence the room below.
    """
    rng = np.random.default_rng(0)
    found = [statistic(*rng.normal(size=(2, 100))) for _ in range(200)]
    covered = sum(low <= truth <= high for _, low, high in found)
    assert 178 <= covered <= 199
