"""How wrong is a likelihood, against its calls and against its time: ours, and others'?

python -m benchmarks likelihood

Every method solves the same samples of the same model (benchmarks.trained), with several settings
of its own, steps or a tolerance, in turns. Each is called as its users call it, others' where they
are installed. Those without the exact divergence draw one Rademacher probe a sample. Evaluations
are forward passes of the network a sample, counted. Each comes with passes back: one for a probe,
d for the exact divergence.

Up to d = 64 the error is the root mean square of the difference to a reference, over samples and
seeds. Above that no reference can be had: the error of a random method is put together from the
standard deviation over seeds and the solver's error. That is what the same probes give at a
setting and at a much finer one, in float64. Averaging over seeds does not reduce it. On the fixed
grid the probes are kept along the path for that, since fresh ones would differ on another grid.

Formula:
    The mean of n independent estimates with variance v and bias b has the error √(v/n + b²), so
    that a target e takes n = v/(e² − b²) of them, and is out of reach where b ≥ e.
"""

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from tests.oracles import ring
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import intervals
from benchmarks.experiment import Choose, Row, calls_of, clocked, seeded
from benchmarks.peers import likelihoods as others
from benchmarks.trained import Problem, trained
from benchmarks.trained import exact as exact_score

CASES = ("ring", "digits", "images", "large images")
DENSE = 64  # up to which d the exact divergence is taken
PATHS = 4  # samples whose solver's error is taken
# Errors in nats to reach, of an exact result and of a random one, by the number of dimensions.
TARGETS = {2: (0.01, 0.1), DENSE: (0.1, 1.0), None: (None, 1.0)}
HEADLINE_STEPS = 64
STEPS = (16, 32, HEADLINE_STEPS, 128, 256)
TOLERANCES = (1e-2, 1e-3, 3e-4, 1e-4)
PEER_TOLERANCES = (1e-3, 1e-4, 1e-5)
FRESH, DCT, KEPT = "fixed grid, fresh signs", "fixed grid, fresh dct", "fixed grid, one probe kept"
RECIPE = "score_sde's recipe (scipy)"
Solve = Callable[[Problem, Tensor, float, int], Tensor]  # problem, x, setting, seed → nll (B,)
# A peer's package, its solver, and whether it offers the exact divergence.
PEERS: dict[str, tuple[str, Solve, bool]] = {
    RECIPE: ("scipy", others.by_scipy, False),
    "torchdiffeq": ("torchdiffeq", others.by_torchdiffeq, True),
}


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
    generator = seeded(seed)
    solver = hosm.FixedGrid(int(steps), data_std=problem.std)
    given = {"solver": solver, "generator": generator, "divergence": hosm.Hutchinson()}
    return hosm.ode_nll(problem.model, x, **given | options).nll


def kept_probe_nll(problem: Problem, x: Tensor, steps: float, seed: int) -> Tensor:
    """ode_nll on its fixed grid, but with one probe kept along the path."""
    generator = seeded(seed)

    def again(*_: Any) -> None:
        generator.manual_seed(seed)

    before = problem.model.network.register_forward_pre_hook(again)
    try:
        return fixed(problem, x, steps, seed, generator=generator)
    finally:
        before.remove()


def adaptive(problem: Problem, x: Tensor, tolerance: float, _seed: int) -> Tensor:
    """ode_nll with adaptive steps and the exact divergence."""
    solver = hosm.Adaptive(tolerance, data_std=problem.std)
    return hosm.ode_nll(problem.model, x, solver=solver, divergence="exact").nll


def ours(elements: int, *, exact: bool) -> Iterator[Method]:
    """Ours, those with the exact divergence where it can be paid for."""
    yield Method(FRESH, "steps", STEPS if exact else STEPS[1:4], fixed, smooth=kept_probe_nll)
    if elements > 2:
        dct = partial(fixed, divergence=hosm.Hutchinson(1, "dct"))
        several = STEPS if exact else (HEADLINE_STEPS,)
        yield Method(DCT, "steps", several, dct, smooth=kept_probe_nll)
    yield Method(KEPT, "steps", (HEADLINE_STEPS,), kept_probe_nll)
    if exact:
        solve = partial(fixed, divergence="exact")
        yield Method("fixed grid, exact", "steps", STEPS, solve, random=False)
        yield Method("adaptive, exact", "tolerance", TOLERANCES, adaptive, random=False)


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
        with calls_of(problem.model.network) as sizes:
            found, seconds = clocked(lambda: self.method.solve(problem, x, self.setting, seed))
        if not warm_up:
            self.nll.append(found.double())
            self.seconds.append(seconds)
            self.evaluations.append(sum(sizes) / len(x))

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

    def row(self, errors: np.ndarray) -> Row:
        """What is kept of it."""
        random = self.method.random
        # What is not random has one error a sample: then samples are drawn again, and not seeds.
        return {
            "evaluations": float(np.mean(self.evaluations)),
            "seconds": intervals.bootstrap(np.median, self.seconds),
            "error": intervals.root_mean_square(errors if random else errors[:, :1].T),
            "solver_error": self.bias if random else None,
        }


def estimates(noise: np.ndarray, bias: float, target: float) -> float:
    """Of how many independent estimates the mean has this error; averaging leaves the bias."""
    return max(1.0, float(np.square(noise).mean()) / (target**2 - bias**2))


def at_target(every: list[tuple[Runs, np.ndarray]], target: float, *, random: bool) -> Row:
    """The cheapest setting of each method that reaches an error, by name, from the fastest on.

    A random method may average several estimates for it, any other has to reach it in one.
    """

    def time(runs: Runs) -> float:
        return estimates(runs.noise(), runs.bias, target) * float(np.median(runs.seconds))

    def calls(runs: Runs) -> float:
        return estimates(runs.noise(), runs.bias, target) * float(np.mean(runs.evaluations))

    able: dict[str, list[Runs]] = {}
    for runs, errors in every:
        left = runs.bias if random else np.sqrt(np.square(errors).mean())
        if runs.method.random == random and left < target:
            able.setdefault(runs.method.name, []).append(runs)
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
            "fewer_evaluations": peer and fewest[name] < min(fewest[each] for each in own),
        }
    return found


def headlines(every: list[Runs]) -> Row:
    """Noise of the probes at 64 steps, and what the usual recipe takes for the same error."""
    settings = {FRESH: HEADLINE_STEPS, DCT: HEADLINE_STEPS, KEPT: HEADLINE_STEPS, RECIPE: 1e-5}
    named = {(runs.method.name, runs.setting): runs for runs in every}
    chosen = {name: named[name, each] for name, each in settings.items() if (name, each) in named}
    values = {name: runs.values() for name, runs in chosen.items()}
    variances = {name: intervals.mean_variance(each) for name, each in values.items()}
    result: Row = {
        "noise": {name: [each**0.5 for each in found] for name, found in variances.items()},
        # The mean of a test set has the variance of its samples as well, each with its own probes.
        "samples of a mean": intervals.bootstrap(
            lambda kept, fresh: kept.var(0).mean() / fresh.var(0).mean(),
            values[KEPT],
            values[FRESH],
        ),
    }

    def cost(seconds, nll, own_seconds, own_nll) -> float:
        above, below = (each.var(1, ddof=1).mean() for each in (nll, own_nll))
        return np.median(seconds) * above / np.median(own_seconds) / below

    if RECIPE in chosen:
        theirs, own = chosen[RECIPE].seconds, chosen[FRESH].seconds
        pairs = theirs, values[RECIPE], own, values[FRESH]
        result["recipe"] = {
            # A seed that is drawn twice counts in both, which makes no variance of zero.
            "time to a standard error": intervals.bootstrap(cost, *pairs),
        }
    return result


def add_solver_errors(every: list[Runs], problem: Problem, x: Tensor, finest: Row) -> None:
    """Of all random methods, against a much finer setting, which those of one kind share."""
    fine: dict[Solve, Tensor] = {}
    for runs in tqdm([each for each in every if each.method.random], "errors", leave=False):
        solve = runs.method.smooth or runs.method.solve
        if solve not in fine:
            fine[solve] = solve(problem, x, finest[runs.method.unit], 0)
        error = solve(problem, x, runs.setting, 0) - fine[solve]
        runs.bias = float(error.square().mean().sqrt())


def answer(name: str, choose: Choose) -> dict:
    """Errors and costs of every method on one kind of data."""
    problem = exact_score(ring()) if name == "ring" else trained(name, choose(5, None))
    elements = problem.data[0].numel()
    exact = elements <= DENSE
    x = problem.data[: choose(2, 4 if name == "large images" else 16)]
    rounds = choose(6, {"ring": 16, "digits": 10}.get(name, 6))
    exact_rounds = choose(1, 3)
    # On images a peer takes minutes, on the large ones ten.
    all_peers = exact or name == "images"
    found = [each for each in peers(exact=exact) if all_peers or each.name == RECIPE]
    methods = [*ours(elements, exact=exact), *found]
    every = []
    for method in methods:  # in a smoke run what the headlines need
        one = (HEADLINE_STEPS,) if method.unit == "steps" else (1e-3,)
        every += [Runs(method, setting) for setting in choose(one, method.settings)]
    finest = {"steps": choose(128, 512), "tolerance": choose(1e-4, 1e-7)}

    for seed in tqdm(range(-1, rounds), name, leave=False):
        for runs in tqdm(every, f"seed {seed}", leave=False):
            if runs.method.random or seed < exact_rounds:
                runs.run(problem, x, seed + 1, warm_up=seed < 0)
    wide = dataclasses.replace(problem, model=copy.deepcopy(problem.model).double())
    add_solver_errors(every, wide, x[:PATHS].double(), finest)
    reference = difference = None
    if exact:
        reference = adaptive(wide, x.double(), choose(1e-3, 1e-6), 0)
        fine = fixed(wide, x.double(), 512 if elements <= 2 else 256, 0, divergence="exact")
        difference = float((reference - fine).abs().max())
    pairs = [(runs, runs.errors(reference)) for runs in every]
    rows: dict[str, dict[str, Row]] = {}
    for runs, errors in pairs:
        rows.setdefault(runs.method.name, {})[f"{runs.setting:g}"] = runs.row(errors)
    few, many = TARGETS[elements if exact else None]
    targets = {f"random, {many:g} nat": at_target(pairs, many, random=True)}
    if exact:
        targets[f"exact, {few:g} nat"] = at_target(pairs, few, random=False)
    assert rows[FRESH][f"{HEADLINE_STEPS}"]["evaluations"] == HEADLINE_STEPS + 2
    assert all(np.isfinite(row["error"]).all() for each in rows.values() for row in each.values())
    return {
        name: {
            "elements": elements,
            "samples": len(x),
            "seeds": rounds,
            "reference_difference": difference,
            "rows": rows,
            "targets": targets,
            "headlines": headlines(every),
        }
    }
