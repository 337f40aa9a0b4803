"""Ratios of processor time within one run."""

import statistics
import time
from collections.abc import Callable, Mapping


def ratios(routes: Mapping[str, Callable[[], object]], base: str, rounds: int) -> dict[str, float]:
    """Median time of each route over that of `base`.

    All are timed in turns, in processor time, so that another load hits them alike.
    """
    times: dict[str, list[float]] = {key: [] for key in routes}
    for _ in range(rounds):
        for key, route in routes.items():
            start = time.process_time()
            route()
            times[key].append(time.process_time() - start)
    medians = {key: statistics.median(found) for key, found in times.items()}
    return {key: median / medians[base] for key, median in medians.items()}
