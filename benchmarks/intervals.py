"""Estimates with intervals, by bootstrap; over a few seeds by Student's t.

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
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 1 to 9 degrees
Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A number with its interval; in JSON a list of three."""

    value: float
    low: float
    high: float


def estimate(values: Array) -> Estimate:
    """The first of (1 + RESAMPLES,), with the interval of the others."""
    low, high = np.quantile(values[1:], TAILS)
    return Estimate(float(values[0]), float(low), float(high))


def bootstrap(statistic: Callable[..., float], *samples: ArrayLike) -> Estimate:
    """Any statistic of arrays (..., n), drawn together; it is called for every resample."""
    arrays = [np.asarray(each, dtype=np.float64) for each in samples]
    count = arrays[0].shape[-1]
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    every = [np.arange(count), *drawn]
    return estimate(np.array([statistic(*(each[..., rows] for each in arrays)) for rows in every]))


def ratio_of_medians(above: ArrayLike, below: ArrayLike) -> Estimate:
    """Median of (n,) over that of (n,), of the same rounds."""
    return bootstrap(lambda x, y: np.median(x) / np.median(y), above, below)


def root_mean_square(values: ArrayLike) -> Estimate:
    """Root mean square of (..., n) over all; the last axis is drawn again."""
    squares = np.square(np.asarray(values)).reshape(-1, np.shape(values)[-1]).mean(0)
    return bootstrap(lambda x: x.mean() ** 0.5, squares)


def mean_variance(values: ArrayLike) -> Estimate:
    """Unbiased variance over the last axis of (..., n), averaged over the others."""
    return estimate(_variances(values))


def ratio_of_variances(above: ArrayLike, below: ArrayLike) -> Estimate:
    """`mean_variance` of (..., n) over that of (..., m), drawn apart."""
    return estimate(_variances(above) / _variances(below, seed=1))


@lru_cache(8)
def weights(count: int, seed: int = 0) -> tuple[Array, Array]:
    """How often each of `count` is drawn, over count, and what makes a variance unbiased.

    Returns:
        Weights (1 + RESAMPLES, count), of which the first are even, and factors (1 + RESAMPLES,).
        A resample is of a population whose variance is itself (n − 1)/n short: twice the factor.
    """
    even = np.full((1, count), 1 / count)
    drawn = np.random.default_rng(seed).multinomial(count, even[0], RESAMPLES) / count
    factors = np.full(1 + RESAMPLES, (count / (count - 1)) ** 2)
    factors[0] = count / (count - 1)
    return np.concatenate([even, drawn]), factors


def over_seeds(values: ArrayLike) -> Estimate:
    """The mean of (seeds, blocks), whose blocks of points are the same for all seeds.

    Both seeds and points are chance, so their variances add. That of single entries counts twice,
    and the degrees of freedom are those of the fewer: the interval is too wide rather than narrow.
    With one seed points alone are chance.
    """
    values = np.asarray(values, dtype=np.float64)
    sizes = {k: size for k, size in enumerate(values.shape) if size > 1}
    variance = sum(values.mean(1 - k).var(ddof=1) / size for k, size in sizes.items())
    mean, half = values.mean(), STUDENT[min(sizes.values()) - 2] * variance**0.5
    return Estimate(float(mean), float(mean - half), float(mean + half))


def _variances(values: ArrayLike, seed: int = 0) -> Array:
    """The mean variance, and that of every resample."""
    values = np.asarray(values, dtype=np.float64)
    rows = values.reshape(-1, values.shape[-1])
    rows = rows - rows.mean(1, keepdims=True)
    drawn, unbiased = weights(rows.shape[1], seed)
    return unbiased * (drawn @ (rows**2).T - (drawn @ rows.T) ** 2).mean(1)
