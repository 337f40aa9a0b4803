"""Ways to the likelihood of one model, and what each costs at a target error.

Ways are ours, and those of others where they are installed. Each is called as its users call it,
with a setting of its own, steps or a tolerance, and returns the negative log-likelihood. Those
without the exact divergence draw one Rademacher probe a sample.

The solver's error of a random method is what the same probes give at its setting and at a much
finer one, in float64. Averaging over seeds does not reduce it. On the fixed grid the probes are
kept along the path for that, since fresh ones would differ on another grid.

Formula:
    The mean of n independent estimates with variance v and bias b has the error √(v/n + b²), so
    that a target e takes n = v/(e² − b²) of them, and is out of reach where b ≥ e.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks import intervals
from benchmarks.experiment import clocked
from benchmarks.peers import likelihoods as others
from benchmarks.trained import Problem

STEPS = (16, 32, 64, 128, 256)
TOLERANCES = (1e-2, 1e-3, 3e-4, 1e-4)
PEER_TOLERANCES = (1e-3, 1e-4, 1e-5)
FRESH, DCT, KEPT = "fixed grid, fresh signs", "fixed grid, fresh dct", "fixed grid, one probe kept"
RECIPE = "score_sde's recipe (scipy)"
Solve = Callable[[Problem, Tensor, float, int], Tensor]  # problem, x, setting, seed → nll (B,)


class Method(NamedTuple):
    """A way to the likelihood, with settings to be tried from coarse to fine."""

    name: str
    unit: str  # of its settings, "steps" or "tolerance"
    settings: tuple[float, ...]
    solve: Solve
    ours: bool = True
    random: bool = True  # whether its result depends on the seed
    smooth: Solve | None = None  # the same with one probe kept, where it does not keep its own


def fixed(problem: Problem, x: Tensor, steps: float, seed: int, **options: Any) -> Tensor:
    """ode_nll on its fixed grid."""
    generator = torch.Generator().manual_seed(seed)
    given = {"data_std": problem.std, "generator": generator, "steps": int(steps)}
    return hosm.ode_nll(problem.model, x, **given | options).nll


def kept_probe_nll(problem: Problem, x: Tensor, steps: float, seed: int) -> Tensor:
    """ode_nll on its fixed grid, but with one probe kept along the path."""
    generator = torch.Generator().manual_seed(seed)

    def again(*_: Any) -> None:
        generator.manual_seed(seed)

    before = problem.model.network.register_forward_pre_hook(again)
    try:
        return fixed(problem, x, steps, seed, generator=generator)
    finally:
        before.remove()


def adaptive(problem: Problem, x: Tensor, tolerance: float, seed: int) -> Tensor:
    """ode_nll with adaptive steps and the exact divergence."""
    del seed
    options = {"method": "adaptive", "divergence": "exact", "data_std": problem.std}
    return hosm.ode_nll(problem.model, x, tolerance=tolerance, **options).nll


def ours(elements: int, *, exact: bool) -> list[Method]:
    """Ours, those with the exact divergence where it can be paid for."""
    dct = partial(fixed, distribution="dct")
    found = [Method(FRESH, "steps", STEPS if exact else STEPS[1:4], fixed, smooth=kept_probe_nll)]
    if elements > 2:
        several = STEPS if exact else (64,)
        found.append(Method(DCT, "steps", several, dct, smooth=kept_probe_nll))
    found.append(Method(KEPT, "steps", (64,), kept_probe_nll))
    if exact:
        solve = partial(fixed, divergence="exact")
        found.append(Method("fixed grid, exact", "steps", STEPS, solve, random=False))
        found.append(Method("adaptive, exact", "tolerance", TOLERANCES, adaptive, random=False))
    return found


# A peer's package, its solver, and whether it offers the exact divergence.
PEERS: dict[str, tuple[str, Solve, bool]] = {
    RECIPE: ("scipy", others.by_scipy, False),
    "k-diffusion": ("k_diffusion", others.by_k_diffusion, False),
    "torchdiffeq": ("torchdiffeq", others.by_torchdiffeq, True),
    "flow_matching": ("flow_matching", others.by_flow_matching, True),
}


def peers(*, exact: bool) -> Iterator[Method]:
    """Those that are installed, each also with its exact divergence where it has one."""
    several = PEER_TOLERANCES if exact else PEER_TOLERANCES[1:]
    common = partial(Method, unit="tolerance", settings=several, ours=False)
    for name, (package, solve, has_exact) in PEERS.items():
        if importlib.util.find_spec(package) is not None:
            yield common(name, solve=solve)
            if exact and has_exact:
                yield common(f"{name}, exact", solve=partial(solve, exact=True), random=False)


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

    found = {}
    for name, runs in sorted(best.items(), key=lambda item: time(item[1])):

        def ratio(seconds, noise, own_seconds, own_noise, bias=runs.bias) -> float:
            number = estimates(noise, bias, target) / estimates(own_noise, base.bias, target)
            return number * np.median(seconds) / np.median(own_seconds)

        samples = (runs.seconds, runs.noise(), base.seconds, base.noise())
        over, peer = intervals.bootstrap(ratio, *samples), not runs.method.ours
        found[name] = {
            "setting": runs.setting,
            "ours": runs.method.ours,
            "seconds": time(runs),
            "over_ours": over,
            "evaluations": fewest[name],
            "ahead": peer and over.high < 1,
            "fewer_evaluations": peer and fewest[name] < min(fewest[each] for each in own),
        }
    return found
