"""Ratios of processor time within one run."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from tqdm import tqdm

from benchmarks.intervals import Estimate, ratio_of_medians

T = TypeVar("T")
Routes = Mapping[str, Callable[[], object]]


def clocked(route: Callable[[], T]) -> tuple[T, float]:
    """The result of a route, and its seconds of processor time."""
    start = time.process_time()
    found = route()
    return found, time.process_time() - start


def times(routes: Routes, rounds: int, bar: str | None = None) -> dict[str, list[float]]:
    """Seconds of processor time of each route, in every round; `bar` names a progress bar.

    All are timed in turns, so that another load hits them alike.
    """
    found: dict[str, list[float]] = {key: [] for key in routes}
    for _ in tqdm(range(rounds), bar, leave=False, disable=bar is None):
        for key, route in routes.items():
            found[key].append(clocked(route)[1])
    return found


def ratios(routes: Routes, base: str, rounds: int) -> dict[str, Estimate]:
    """Median time of each route over that of `base`."""
    found = times(routes, rounds)
    return {key: ratio_of_medians(each, found[base]) for key, each in found.items()}
