"""Estimates with intervals, by bootstrap.

An interval holds 95 %. What is drawn again is the last axis of the samples; arrays that were
measured in the same rounds are drawn together, others apart. The seed is fixed, so that the same
samples give the same interval.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

TAILS = (0.025, 0.975)
RESAMPLES = 1000
Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A number with its interval; in JSON a list of three."""

    value: float
    low: float
    high: float


def estimate(value: float, drawn: Array) -> Estimate:
    """A number with the interval of what its resamples gave."""
    low, high = np.quantile(drawn, TAILS)
    return Estimate(float(value), float(low), float(high))


def bootstrap(statistic: Callable[..., float], *samples: ArrayLike) -> Estimate:
    """Any statistic of arrays (..., n), drawn together; it is called for every resample."""
    arrays = [np.asarray(each, dtype=np.float64) for each in samples]
    drawn = _drawn(arrays[0].shape[-1])
    found = [statistic(*(each[..., rows] for each in arrays)) for rows in drawn]
    return estimate(statistic(*arrays), np.array(found))


def _at_once(statistic: Callable[..., Array], *samples: ArrayLike) -> Estimate:
    """`bootstrap` of a statistic over the last axis of arrays (n,), with all resamples at once."""
    arrays = [np.asarray(each, dtype=np.float64) for each in samples]
    drawn = _drawn(len(arrays[0]))
    return estimate(float(statistic(*arrays)), statistic(*(each[drawn] for each in arrays)))


def median(values: ArrayLike) -> Estimate:
    """Median of (n,)."""
    return _at_once(lambda x: np.median(x, -1), values)


def ratio_of_medians(above: ArrayLike, below: ArrayLike) -> Estimate:
    """Median of (n,) over that of (n,), of the same rounds."""
    return _at_once(lambda x, y: np.median(x, -1) / np.median(y, -1), above, below)


def root_mean_square(values: ArrayLike) -> Estimate:
    """Root mean square of (..., n) over all; the last axis is drawn again."""
    squares = np.square(np.asarray(values)).reshape(-1, np.shape(values)[-1]).mean(0)
    return _at_once(lambda x: np.sqrt(x.mean(-1)), squares)


def mean_variance(values: ArrayLike) -> Estimate:
    """Unbiased variance over the last axis of (..., n), averaged over the others."""
    return estimate(*_variances(values))


def total_variance(values: ArrayLike) -> Estimate:
    """For vectors (s, n, m): the variance over n, summed over m, averaged over s."""
    values = np.asarray(values, dtype=np.float64)
    mean = mean_variance(np.moveaxis(values, 1, -1))
    return Estimate(*(values.shape[-1] * each for each in mean))


def ratio_of_variances(above: ArrayLike, below: ArrayLike) -> Estimate:
    """`mean_variance` of (..., n) over that of (..., m), drawn apart."""
    (top, tops), (bottom, bottoms) = _variances(above), _variances(below, seed=1)
    return estimate(top / bottom, tops / bottoms)


def standard_error_of_variance(values: ArrayLike) -> float:
    """Of `total_variance`, from the spread of squared distances to the mean.

    The second part, of order 1/n², is what is left where all distances are equal, as they are for
    a number of two values; for vectors it is at most this.
    """
    values = np.asarray(values, dtype=np.float64)
    squares = np.square(values - values.mean(1, keepdims=True)).sum(-1)
    count = squares.shape[1]
    second = 2 * np.square(squares.mean(1)) / (count * (count - 1))
    return float(np.sqrt((squares.var(1, ddof=1) / count + second).sum()) / len(squares))


@lru_cache(8)
def _drawn(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


@lru_cache(8)
def weights(count: int, seed: int = 0) -> Array:
    """How often each of `count` is drawn, (RESAMPLES, count), over count."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def _variances(values: ArrayLike, seed: int = 0) -> tuple[float, Array]:
    """The mean variance, and that of every resample."""
    values = np.asarray(values, dtype=np.float64)
    rows = values.reshape(-1, values.shape[-1])
    rows = rows - rows.mean(1, keepdims=True)
    count = rows.shape[1]
    # Resamples are of a population whose variance is itself (n − 1)/n short: twice the factor.
    drawn, unbiased = weights(count, seed), (count / (count - 1)) ** 2
    squares = drawn @ (rows**2).T - (drawn @ rows.T) ** 2
    return float(rows.var(1, ddof=1).mean()), unbiased * squares.mean(1)
