"""Ratios of processor time within one run."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm


def times(
    routes: Mapping[str, Callable[[], object]], rounds: int, bar: str | None = None
) -> dict[str, list[float]]:
    """Seconds of processor time of each route, in every round; `bar` names a progress bar.

    All are timed in turns, so that another load hits them alike.
    """
    found: dict[str, list[float]] = {key: [] for key in routes}
    for _ in tqdm(range(rounds), bar, leave=False, disable=bar is None):
        for key, route in routes.items():
            start = time.process_time()
            route()
            found[key].append(time.process_time() - start)
    return found


def ratios(routes: Mapping[str, Callable[[], object]], base: str, rounds: int) -> dict[str, float]:
    """Median time of each route over that of `base`."""
    medians = {key: statistics.median(found) for key, found in times(routes, rounds).items()}
    return {key: median / medians[base] for key, median in medians.items()}


def interval(found: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """90 % of the ratio of medians, by a bootstrap of the rounds, which the two share."""
    rounds = len(base)
    drawn = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
    above, below = (np.median(np.asarray(each)[drawn], 1) for each in (found, base))
    low, high = np.quantile(above / below, (0.05, 0.95))
    return float(low), float(high)
