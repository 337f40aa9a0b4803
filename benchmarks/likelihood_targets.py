"""What a likelihood costs at a target error, from runs of methods at several settings.

Formula:
    The mean of n independent estimates with variance v and bias b has the error √(v/n + b²), so
    that a target e takes n = v/(e² − b²) of them, and is out of reach where b ≥ e.
"""

import numpy as np
import torch
from torch import Tensor

from benchmarks import intervals
from benchmarks.experiment import clocked
from benchmarks.likelihood_methods import KEPT, Method
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
        if not warm_up:
            self.nll.append(found.double())
            self.seconds.append(seconds)
            self.evaluations.append(problem.model.network.samples / len(x))

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


def estimates(noise: np.ndarray, bias: float, target: float) -> float:
    """Of how many independent estimates the mean has this error; averaging leaves the bias."""
    return max(1.0, float(np.square(noise).mean()) / (target**2 - bias**2))


def at_target(every: list[tuple[Runs, np.ndarray]], target: float, *, random: bool) -> dict:
    """The cheapest setting of each method that reaches an error, by name, from the fastest on.

    A random method may average several estimates for it, any other has to reach it in one.
    """
    able: dict[str, list[Runs]] = {}
    for runs, errors in every:
        left = runs.bias if random else np.sqrt(np.square(errors).mean())
        if runs.method.random == random and left < target:
            able.setdefault(runs.method.name, []).append(runs)

    def time(runs: Runs) -> float:
        return estimates(runs.noise(), runs.bias, target) * float(np.median(runs.seconds))

    def calls(runs: Runs) -> float:
        return estimates(runs.noise(), runs.bias, target) * float(np.mean(runs.evaluations))

    best = {name: min(each, key=time) for name, each in able.items()}
    fewest = {name: min(map(calls, each)) for name, each in able.items()}
    own = [name for name, runs in best.items() if runs.method.ours and name != KEPT]
    if not own:
        return {}
    base = min((best[name] for name in own), key=time)

    def row(name: str, runs: Runs) -> dict:
        def ratio(seconds, noise, own_seconds, own_noise) -> float:
            number = estimates(noise, runs.bias, target)
            own_number = estimates(own_noise, base.bias, target)
            return np.median(seconds) * number / np.median(own_seconds) / own_number

        samples = (runs.seconds, runs.noise(), base.seconds, base.noise())
        over, peer = intervals.bootstrap(ratio, *samples), not runs.method.ours
        return {
            "setting": runs.setting,
            "ours": runs.method.ours,
            "seconds": time(runs),
            "over_ours": over,
            "evaluations": fewest[name],
            "ahead": peer and over.high < 1,
            "fewer_evaluations": peer and fewest[name] < min(fewest[each] for each in own),
        }

    return {
        name: row(name, best[name]) for name in sorted(best, key=lambda name: time(best[name]))
    }
