"""What a likelihood costs at a target error, from runs of methods at several settings.

Formula:
    The mean of n independent estimates with variance v and bias b has the error √(v/n + b²), so
    that a target e takes n = v/(e² − b²) of them, and is out of reach where b ≥ e.
"""

import numpy as np
import torch
from torch import Tensor

from benchmarks import intervals
from benchmarks.likelihood_methods import KEPT, Method, value_of
from benchmarks.timing import clocked
from benchmarks.trained import Problem


class Runs:
    """A method at a setting: what it returned and what it took, seed by seed."""

    def __init__(self, method: Method, setting: float) -> None:
        self.method, self.setting = method, setting
        self.nll: list[Tensor] = []
        self.seconds: list[float] = []
        self.evaluations: list[float] = []
        self.bias = 0.0  # root mean square of the solver's error, of a random method

    def run(self, problem: Problem, x: Tensor, seed: int, *, warm_up: bool) -> None:
        """Solve once."""
        problem.model.network.samples = 0
        found, seconds = clocked(lambda: self.method.solve(problem, x, self.setting, seed))
        counted = found[1] if isinstance(found, tuple) else problem.model.network.samples / len(x)
        if not warm_up:
            self.nll.append(value_of(found).double())
            self.seconds.append(seconds)
            self.evaluations.append(float(counted))

    def values(self) -> np.ndarray:
        """What it returned, (B, n)."""
        return torch.stack(self.nll, 1).numpy()

    def noise(self) -> np.ndarray:
        """Differences (B, n) to the mean over seeds, scaled so that their square is unbiased."""
        values, seeds = self.values(), len(self.nll)
        return (values - values.mean(1, keepdims=True)) * (seeds / max(seeds - 1, 1)) ** 0.5

    def errors(self, reference: Tensor | None) -> np.ndarray:
        """Differences (B, n) to the reference, or where there is none noise and solver's error."""
        if reference is not None:
            return self.values() - reference[:, None].numpy()
        return np.sqrt(np.square(self.noise()) + self.bias**2)

    def row(self) -> dict:
        """How the results name it."""
        method = self.method
        names = {"method": method.name, "setting": self.setting, "unit": method.unit}
        return names | {"ours": method.ours}


def estimates(noise: np.ndarray, bias: float, target: float) -> float:
    """Of how many independent estimates the mean has this error; averaging leaves the bias."""
    return max(1.0, float(np.square(noise).mean()) / (target**2 - bias**2))


def at_target(every: list[tuple[Runs, np.ndarray]], target: float, *, random: bool) -> dict:
    """The cheapest setting of each method that reaches an error, and its time over ours.

    A random method may average several estimates for it, any other has to reach it in one.
    """

    def factor(runs: Runs) -> float:
        return estimates(runs.noise(), runs.bias, target) if random else 1.0

    def reaches(runs: Runs, errors: np.ndarray) -> bool:
        return runs.bias < target if random else np.sqrt(np.square(errors).mean()) <= target

    able: dict[str, list[Runs]] = {}
    for runs, errors in every:
        if runs.method.random == random and reaches(runs, errors):
            able.setdefault(runs.method.name, []).append(runs)
    time = {name: [factor(r) * np.median(r.seconds) for r in each] for name, each in able.items()}
    calls = {
        name: min(factor(r) * np.mean(r.evaluations) for r in each) for name, each in able.items()
    }
    best = {name: each[int(np.argmin(time[name]))] for name, each in able.items()}
    own = [name for name, runs in best.items() if runs.method.ours and name != KEPT]
    if not own:
        return {"error": target, "random": random, "rows": []}
    base = best[min(own, key=lambda name: min(time[name]))]

    def ratio(runs: Runs) -> intervals.Estimate:
        def statistic(*drawn: np.ndarray) -> float:
            (seconds, noise), (own_seconds, own_noise) = drawn[:2], drawn[2:]
            found = float(np.median(seconds) / np.median(own_seconds))
            if not random:
                return found
            numbers = estimates(noise, runs.bias, target), estimates(own_noise, base.bias, target)
            return found * numbers[0] / numbers[1]

        samples = (runs.seconds, runs.noise(), base.seconds, base.noise())
        return intervals.bootstrap(statistic, *samples)

    rows = []
    for name, runs in best.items():
        over, peer = ratio(runs), not runs.method.ours
        costs = {
            "seconds": float(min(time[name])),
            "over_ours": over,
            "evaluations": float(calls[name]),
            "ahead": peer and over.high < 1,
            "fewer_evaluations": bool(peer and calls[name] < min(calls[o] for o in own)),
        }
        rows.append(runs.row() | costs)
    rows.sort(key=lambda row: row["seconds"])
    return {"error": target, "random": random, "rows": rows}
