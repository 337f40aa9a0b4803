"""How wrong is a likelihood, against its calls and against its time: ours, and others'?

python -m benchmarks likelihood [--full]

Every method solves the same samples of the same model (benchmarks.trained), with several settings,
in turns. Up to d = 64 the error is the root mean square of the difference to a reference, over
samples and seeds. Above that no reference can be had: the error of a random method is put together
from the standard deviation over seeds and the solver's error, which is measured apart
(benchmarks.likelihoods).

Evaluations are forward passes of the network a sample, counted. Each comes with passes back: one
for a probe, d for the exact divergence.
"""

import copy
import dataclasses

import numpy as np
from tests.oracles import ring
from torch import Tensor, nn
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import intervals
from benchmarks import likelihoods as ways
from benchmarks.experiment import Choose
from benchmarks.likelihoods import DCT, FRESH, KEPT, RECIPE, Runs, adaptive, at_target, fixed
from benchmarks.trained import Problem, trained
from benchmarks.trained import exact as exact_score

CASES = ("ring", "digits", "images", "large images")
DENSE = 64  # up to which d the exact divergence is taken
STEPS, REFERENCE_STEPS = 64, 512
PATHS = 4  # samples whose solver's error is taken
# Errors in nats to reach, of an exact result and of a random one, by the number of dimensions.
TARGETS = {2: (0.01, 0.1), DENSE: (0.1, 1.0), None: (None, 1.0)}


class Counted(nn.Module):
    """A network that counts the samples it is called with."""

    def __init__(self, network):
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, x, t):
        self.samples += len(x)
        return self.network(x, t)


def row_of(runs: Runs, errors: np.ndarray) -> dict:
    """What is kept of a method at a setting."""
    random = runs.method.random
    # What is not random has one error a sample: then samples are drawn again, and not seeds.
    return {
        "evaluations": float(np.mean(runs.evaluations)),
        "seconds": intervals.bootstrap(np.median, runs.seconds),
        "error": intervals.root_mean_square(errors if random else errors[:, :1].T),
        "solver_error": runs.bias if random else None,
    }


def reference_of(problem: Problem, x: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The adaptive method with exact divergence, and its distance to that on a fine grid."""
    steps = REFERENCE_STEPS if x[0].numel() <= 2 else REFERENCE_STEPS // 2
    fine = adaptive(problem, x, tolerance, 0)
    other = fixed(problem, x, steps, 0, divergence="exact")
    return fine, float((fine - other).abs().max())


def headlines(every: list[Runs]) -> dict:
    """Noise of the probes at 64 steps, and what the usual recipe takes for the same error."""
    chosen = {
        runs.method.name: runs
        for runs in every
        if (runs.method.unit == "steps" and runs.setting == STEPS)
        or (runs.method.name == RECIPE and runs.setting == 1e-5)
    }
    names = [name for name in (FRESH, DCT, KEPT, RECIPE) if name in chosen]
    values = {name: chosen[name].values() for name in names}
    variances = {name: intervals.mean_variance(values[name]) for name in names}
    result = {
        "noise": {name: [each**0.5 for each in variances[name]] for name in names},
        "kept over fresh": intervals.ratio_of_variances(values[KEPT], values[FRESH]),
    }

    def cost(seconds, nll, own_seconds, own_nll) -> float:
        above, below = (each.var(1, ddof=1).mean() for each in (nll, own_nll))
        return np.median(seconds) * above / np.median(own_seconds) / below

    if RECIPE in chosen:
        times = chosen[RECIPE].seconds, chosen[FRESH].seconds
        pairs = (times[0], values[RECIPE], times[1], values[FRESH])
        result["recipe"] = {
            "time": intervals.ratio_of_medians(*times),
            # A seed that is drawn twice counts in both, which makes no variance of zero.
            "time to a standard error": intervals.bootstrap(cost, *pairs),
        }
    return result


def add_solver_errors(
    every: list[Runs], problem: Problem, x: Tensor, finest: dict[str, float]
) -> None:
    """Of all random methods, against a much finer setting, which those of one kind share."""
    fine: dict[object, Tensor] = {}
    for runs in tqdm(every, "solver's errors", leave=False):
        method, solve = runs.method, runs.method.smooth or runs.method.solve
        if method.random:
            if solve not in fine:
                fine[solve] = solve(problem, x, finest[method.unit], 0)
            error = solve(problem, x, runs.setting, 0) - fine[solve]
            runs.bias = float(error.square().mean().sqrt())


def answer(name: str, choose: Choose) -> dict:
    """Errors and costs of every method on one kind of data."""
    steps = choose(5, 300 if name == "images" else None, None)
    problem = exact_score(ring()) if name == "ring" else trained(name, steps)
    model = hosm.ScoreModel(Counted(problem.model.network), problem.model.schedule)
    problem = dataclasses.replace(problem, model=model)
    elements = problem.data[0].numel()
    exact = elements <= DENSE
    x = problem.data[: choose(2, 8 if exact else 4, 4 if name == "large images" else 16)]
    rounds = choose(6, 6, {"ring": 16, "digits": 10}.get(name, 6))
    exact_rounds = choose(1, 2, 3)
    # On images a peer takes minutes, on the large ones ten.
    all_peers = exact or (name == "images" and choose(True, False, True))
    found = ways.peers(exact=exact)
    methods = ways.ours(elements, exact=exact)
    methods += [each for each in found if all_peers or each.name == RECIPE]
    # Without --full every other setting on the digits; in a smoke run what the headlines need.
    every = []
    for method in methods:
        some = method.settings[::2] if elements == DENSE else method.settings
        one = (STEPS,) if method.unit == "steps" else (1e-3,)
        every += [Runs(method, setting) for setting in choose(one, some, method.settings)]
    finest = {"steps": choose(128, 512, 512), "tolerance": choose(1e-4, 1e-7, 1e-7)}

    for seed in tqdm(range(-1, rounds), name, leave=False):
        for runs in tqdm(every, f"seed {seed}", leave=False):
            if runs.method.random or seed < exact_rounds:
                runs.run(problem, x, seed + 1, warm_up=seed < 0)
    wide = dataclasses.replace(problem, model=copy.deepcopy(problem.model).double())
    add_solver_errors(every, wide, x[:PATHS].double(), finest)
    reference = difference = None
    if exact:
        reference, difference = reference_of(wide, x.double(), choose(1e-3, 1e-5, 1e-6))
    pairs = [(runs, runs.errors(reference)) for runs in every]
    rows: dict[str, dict] = {}
    for runs, errors in pairs:
        rows.setdefault(runs.method.name, {})[f"{runs.setting:g}"] = row_of(runs, errors)
    few, many = TARGETS[elements if exact else None]
    targets = {f"random, {many:g} nat": at_target(pairs, many, random=True)}
    if exact:
        targets[f"exact, {few:g} nat"] = at_target(pairs, few, random=False)
    assert rows[FRESH][f"{STEPS}"]["evaluations"] == STEPS + 10
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
