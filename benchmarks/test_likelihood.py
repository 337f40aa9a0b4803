"""How wrong is a likelihood, against its calls and against its time: ours, and others'?

python -m pytest benchmarks/test_likelihood.py [--full]

Every method solves the same samples of the same model (benchmarks.likelihood_problems), with
several settings, in turns. Up to d = 64 the error is the root mean square of the difference to a
reference, over samples and seeds. Above that no reference can be had: the standard deviation over
seeds stands for it, and the solver's error is measured apart, with one probe on a coarse and on a
fine grid.

Evaluations are forward passes of the network a sample, counted. Each comes with passes back: one
for a probe, d for the exact divergence.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import intervals
from benchmarks.likelihood_methods import (
    DCT,
    FRESH,
    KEPT,
    RECIPE,
    Method,
    adaptive,
    fixed,
    kept_probe_nll,
    missing,
    ours,
    peers,
)
from benchmarks.likelihood_problems import counted, in_double, line, problem, ring
from benchmarks.timing import clocked
from benchmarks.trained import Problem

DENSE = 64  # up to which d the exact divergence is taken
STEPS, REFERENCE_STEPS = 64, 512
EVALUATIONS = STEPS + 10
# Errors in nats to reach, of an exact result and of a random one, by the number of dimensions.
TARGETS = {2: (0.01, 0.1), DENSE: (0.1, 1.0), None: (None, 1.0)}


class Runs:
    """A method at a setting: what it returned and what it took, seed by seed."""

    def __init__(self, method: Method, setting: float) -> None:
        self.method, self.setting = method, setting
        self.nll: list[Tensor] = []
        self.seconds: list[float] = []
        self.evaluations = 0.0

    def run(self, problem: Problem, x: Tensor, seed: int) -> None:
        """Solve once; the first time is a warm-up and counts the evaluations."""
        problem.model.network.samples = 0
        (found, *told), seconds = clocked(
            lambda: self.result(self.method.solve(problem, x, self.setting, seed))
        )
        if self.evaluations:
            self.nll.append(found.double())
            self.seconds.append(seconds)
        self.evaluations = float(told[0] if told else problem.model.network.samples / len(x))

    @staticmethod
    def result(found: Tensor | tuple[Tensor, int]) -> tuple:
        return found if isinstance(found, tuple) else (found,)

    def errors(self, reference: Tensor | None) -> np.ndarray:
        """Differences (B, n) to the reference, or, made unbiased, to the mean over seeds."""
        values = torch.stack(self.nll, 1)
        if reference is not None:
            return (values - reference[:, None]).numpy()
        seeds = values.shape[1]
        centred = values - values.mean(1, keepdim=True)
        return (centred * (seeds / (seeds - 1)) ** 0.5).numpy()


def row_of(runs: Runs, errors: np.ndarray) -> dict:
    """What is kept of a method at a setting."""
    method = runs.method
    # What is not random has one error a sample: then samples are drawn again, and not seeds.
    drawn = errors if method.random else errors[:, :1].T
    return {
        "method": method.name,
        "setting": runs.setting,
        "unit": method.unit,
        "ours": method.ours,
        "random": method.random,
        "evaluations": runs.evaluations,
        "seconds": intervals.median(runs.seconds),
        "error": intervals.root_mean_square(drawn),
    }


def time_to(target: float):
    """Time to an error: that of as many estimates as bring it down to the target."""

    def statistic(seconds: np.ndarray, errors: np.ndarray) -> float:
        return float(np.median(seconds) * max(1.0, np.square(errors).mean() / target**2))

    return statistic


def at_target(every: list[tuple[Runs, np.ndarray]], target: float, *, random: bool) -> dict:
    """The cheapest setting of each method that reaches an error, and its time over ours.

    A random method may average several estimates for it, any other has to reach it in one.
    """
    best: dict[str, tuple[float, Runs, np.ndarray]] = {}
    for runs, errors in every:
        size = float(np.sqrt(np.square(errors).mean()))
        if runs.method.random != random or (not random and size > target):
            continue
        factor = max(1.0, (size / target) ** 2) if random else 1.0
        cost = float(np.median(runs.seconds)) * factor
        if runs.method.name not in best or cost < best[runs.method.name][0]:
            best[runs.method.name] = (cost, runs, errors)
    own = {name: found for name, found in best.items() if found[1].method.ours and name != KEPT}
    if not own:
        return {"error": target, "random": random, "rows": []}
    _, base, base_errors = own[min(own, key=lambda name: own[name][0])]
    calls = min(runs.evaluations * max(1.0, share(e, target)) for _, runs, e in own.values())
    rows = []
    for name, (cost, runs, errors) in best.items():

        def statistic(seconds, errors, own_seconds, own_errors) -> float:
            of = time_to(target) if random else lambda seconds, _: float(np.median(seconds))
            return of(seconds, errors) / of(own_seconds, own_errors)

        over = intervals.bootstrap(statistic, runs.seconds, errors, base.seconds, base_errors)
        evaluations = runs.evaluations * (max(1.0, share(errors, target)) if random else 1.0)
        peer = not runs.method.ours
        rows.append(
            {
                "method": name,
                "setting": runs.setting,
                "unit": runs.method.unit,
                "ours": runs.method.ours,
                "seconds": cost,
                "over_ours": over,
                "evaluations": evaluations,
                "ahead": peer and over.high < 1,
                "fewer_evaluations": peer and evaluations < calls,
            }
        )
    rows.sort(key=lambda row: row["seconds"])
    return {"error": target, "random": random, "rows": rows}


def share(errors: np.ndarray, target: float) -> float:
    """How many independent estimates bring the error to the target."""
    return float(np.square(errors).mean()) / target**2


def reference_of(problem: Problem, x: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The exact divergence in float64 on a fine grid, and its distance to the adaptive method."""
    wide, x = in_double(problem), x.double()
    steps = REFERENCE_STEPS if x[0].numel() <= 2 else REFERENCE_STEPS // 2
    fine = adaptive(wide, x, tolerance, 0)
    other = fixed(wide, x, steps, 0, divergence="exact")
    return fine, float((fine - other).abs().max())


def solver_errors(problem: Problem, x: Tensor, chosen: dict[str, Method]) -> dict:
    """Of methods with random probes: the same probes again, on a much finer grid."""
    ends = [kept_probe_nll(problem, x, steps, 0) for steps in (STEPS, REFERENCE_STEPS)]
    found = {FRESH: (ends[0] - ends[1]).abs()}
    if RECIPE in chosen:
        solve = chosen[RECIPE].solve
        coarse, fine = (solve(problem, x, tolerance, 0) for tolerance in (1e-5, 1e-7))
        found[RECIPE] = (coarse - fine).abs()
    return {
        name: {"mean": float(errors.mean()), "largest": float(errors.max())}
        for name, errors in found.items()
    }


def headlines(every: list[tuple[Runs, np.ndarray]]) -> dict:
    """Noise of the probes at 64 steps, and what the usual recipe takes for the same error."""
    chosen = {
        runs.method.name: (runs, errors)
        for runs, errors in every
        if (runs.method.unit == "steps" and runs.setting == STEPS)
        or (runs.method.name == RECIPE and runs.setting == 1e-5)
    }
    values = {name: torch.stack(runs.nll, 1).numpy() for name, (runs, _) in chosen.items()}
    found = {
        name: [each**0.5 for each in intervals.mean_variance(values[name])]
        for name in (FRESH, DCT, KEPT, RECIPE)
        if name in chosen
    }
    fresh = chosen[FRESH][0]
    result = {
        "evaluations": fresh.evaluations,
        "noise": found,
        "kept over fresh": intervals.ratio_of_variances(values[KEPT], values[FRESH]),
    }
    if RECIPE in chosen:
        recipe = chosen[RECIPE][0]

        def cost(seconds, nll, own_seconds, own_nll) -> float:
            variances = [each.var(1, ddof=1).mean() for each in (nll, own_nll)]
            return np.median(seconds) * variances[0] / np.median(own_seconds) / variances[1]

        pairs = (recipe.seconds, values[RECIPE], fresh.seconds, values[FRESH])
        result["recipe"] = {
            "evaluations": recipe.evaluations,
            "time": intervals.ratio_of_medians(recipe.seconds, fresh.seconds),
            # A seed that is drawn twice counts in both, which makes no variance of zero.
            "time to a standard error": intervals.bootstrap(cost, *pairs),
        }
    return result


@pytest.mark.parametrize("name", ["ring", "digits", "images", "large images"])
def test_error_against_cost(benchmark, choose, name):
    if name == "large images" and not choose(False, False, True):
        pytest.skip("with --full")
    steps = choose(5, 300 if name == "images" else None, None)
    solved = counted(problem(name, None if name == "ring" else steps))
    elements = solved.data[0].numel()
    exact = elements <= DENSE
    x = solved.data[: choose(2, 8, 8 if name == "large images" else 16)]
    rounds = choose(6, 8, {"ring": 16, "digits": 10, "images": 8, "large images": 6}[name])
    exact_rounds = choose(1, 3, 3)
    methods = [*ours(elements, exact=exact), *peers(exact=exact)]
    if name == "large images":  # where one estimate of a peer takes a minute
        methods = [m for m in methods if m.ours or m.name in (RECIPE, "torchdiffeq", "diffrax")]
    if not choose(False, exact, True):
        methods = [m for m in methods if m.ours or m.name == RECIPE or choose(True, False, False)]
    methods = [
        m._replace(settings=choose(m.settings[-1:], m.settings, m.settings)) for m in methods
    ]
    if choose(True, False, False):  # nothing fine in a smoke run, but what the headlines need
        methods = [
            m._replace(settings=(STEPS,) if m.unit == "steps" else (1e-3,)) for m in methods
        ]
    every = [Runs(method, setting) for method in methods for setting in method.settings]

    def measure() -> dict:
        for seed in tqdm(range(-1, rounds), name, leave=False):
            for runs in tqdm(every, f"seed {seed}", leave=False):
                if runs.method.random or seed < exact_rounds:
                    runs.run(solved, x, seed + 1)
        reference = difference = None
        if exact:
            reference, difference = reference_of(solved, x, choose(1e-3, 1e-5, 1e-6))
        pairs = [(runs, runs.errors(reference)) for runs in every]
        few, many = TARGETS[elements if exact else None]
        targets = [at_target(pairs, many, random=True)]
        targets += [at_target(pairs, few, random=False)] if exact else []
        named = {method.name: method for method in methods}
        return {
            "elements": elements,
            "samples": len(x),
            "seeds": rounds,
            "nll_std": float(torch.stack(every[0].nll).mean(0).std()),
            "reference_difference": difference,
            "solver": None if exact else solver_errors(solved, x, named),
            "rows": [row_of(*pair) for pair in pairs],
            "targets": targets,
            "headlines": headlines(pairs),
            "skipped": missing(),
        }

    found = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(found)
    assert found["headlines"]["evaluations"] == EVALUATIONS
    assert all(np.isfinite(row["error"]).all() for row in found["rows"])


@pytest.mark.parametrize("method", [*peers(exact=True)], ids=lambda method: method.name)
def test_every_peer_is_right(method):
    """In one dimension a probe of signs is exact; in two the divergence has to be."""
    for solved in [line()] if method.random else [line(), ring()]:
        small = dataclasses.replace(solved, data=solved.data[:4])
        expected = adaptive(small, small.data, 1e-7, 0)
        found = Runs.result(method.solve(small, small.data, 1e-8, 0))[0]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_the_reference_is_the_density():
    """The model of the ring is exact, so that its likelihood is known but for the prior."""
    solved = ring()
    from tests.oracles import ring as mixture

    x, schedule = solved.data[:4], solved.model.schedule
    start, end = (torch.tensor([t], dtype=x.dtype) for t in (schedule.t_min, schedule.t_max))
    truth = mixture().log_density(x, *(part.expand(4) for part in schedule(start)))
    result = hosm.ode_nll(
        solved.model,
        x,
        method="adaptive",
        divergence="exact",
        tolerance=1e-7,
        log_prior=lambda x: mixture().log_density(x, *(p.expand(4) for p in schedule(end))),
    )
    torch.testing.assert_close(-result.nll, truth, rtol=0, atol=1e-5)
