"""How wrong is a likelihood, against its calls and against its time: ours, and others'?

python -m pytest benchmarks/test_likelihood.py [--full]

Every method solves the same samples of the same model (benchmarks.likelihood_problems), with
several settings, in turns. Up to d = 64 the error is the root mean square of the difference to a
reference, over samples and seeds. Above that no reference can be had: the error of a random method
is put together from the standard deviation over seeds and the solver's error, which is measured
apart (benchmarks.likelihood_methods).

Evaluations are forward passes of the network a sample, counted. Each comes with passes back: one
for a probe, d for the exact divergence.
"""

import dataclasses

import numpy as np
import pytest
import torch
from tests.oracles import ring as mixture
from torch import Tensor
from tqdm import tqdm

import hosm_losses as hosm
from benchmarks import intervals
from benchmarks import likelihood_methods as ways
from benchmarks.likelihood_methods import DCT, FRESH, KEPT, RECIPE, adaptive, fixed, value_of
from benchmarks.likelihood_problems import counted, in_double, line, problem, ring
from benchmarks.likelihood_targets import Runs, at_target
from benchmarks.trained import Problem

DENSE = 64  # up to which d the exact divergence is taken
STEPS, REFERENCE_STEPS = 64, 512
EVALUATIONS = STEPS + 10
PATHS = 4  # samples whose solver's error is taken
# Errors in nats to reach, of an exact result and of a random one, by the number of dimensions.
TARGETS = {2: (0.01, 0.1), DENSE: (0.1, 1.0), None: (None, 1.0)}


def row_of(runs: Runs, errors: np.ndarray) -> dict:
    """What is kept of a method at a setting."""
    random = runs.method.random
    # What is not random has one error a sample: then samples are drawn again, and not seeds.
    return runs.row() | {
        "random": random,
        "evaluations": float(np.mean(runs.evaluations)),
        "seconds": intervals.median(runs.seconds),
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
    values = {name: runs.values() for name, runs in chosen.items()}
    fresh, recipe = chosen[FRESH], chosen.get(RECIPE)
    result = {
        "evaluations": float(np.mean(fresh.evaluations)),
        "solver_error": fresh.bias,
        "noise": {
            name: [each**0.5 for each in intervals.mean_variance(values[name])]
            for name in (FRESH, DCT, KEPT, RECIPE)
            if name in chosen
        },
        "kept over fresh": intervals.ratio_of_variances(values[KEPT], values[FRESH]),
    }

    def cost(seconds, nll, own_seconds, own_nll) -> float:
        variances = [each.var(1, ddof=1).mean() for each in (nll, own_nll)]
        return np.median(seconds) * variances[0] / np.median(own_seconds) / variances[1]

    if recipe is not None:
        pairs = (recipe.seconds, values[RECIPE], fresh.seconds, values[FRESH])
        result["recipe"] = {
            "evaluations": float(np.mean(recipe.evaluations)),
            "time": intervals.ratio_of_medians(recipe.seconds, fresh.seconds),
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
        method, kind = runs.method, runs.method.smooth or runs.method.solve
        if method.random:
            if kind not in fine:
                fine[kind] = method.with_one_probe(problem, x, finest[method.unit])
            error = method.with_one_probe(problem, x, runs.setting) - fine[kind]
            runs.bias = float(error.square().mean().sqrt())


def taken(name: str, peer: str, choose) -> bool:
    """Whether a peer takes part: an estimate takes seconds on images, on the large ones ten."""
    if name == "large images":
        return peer == RECIPE
    return name != "images" or peer == RECIPE or choose(True, False, True)


@pytest.mark.parametrize("name", ["ring", "digits", "images", "large images"])
def test_error_against_cost(benchmark, choose, name):
    if name == "large images" and not choose(False, False, True):
        pytest.skip("with --full")
    steps = choose(5, 300 if name == "images" else None, None)
    solved = counted(problem(name, None if name == "ring" else steps))
    elements = solved.data[0].numel()
    exact = elements <= DENSE
    x = solved.data[: choose(2, 8 if exact else 4, 4 if name == "large images" else 16)]
    rounds = choose(6, 6, {"ring": 16, "digits": 10}.get(name, 6))
    exact_rounds = choose(1, 2, 3)
    methods, left_out = ways.ours(elements, exact=exact), {}
    for method in ways.peers(exact=exact):
        peer = method.name.removesuffix(", exact")
        if taken(name, peer, choose):
            methods.append(method)
        else:
            left_out[peer] = "left out at this size, to save time"
    jax = "diffrax" in {method.name for method in methods}
    # Without --full every other setting on the digits; in a smoke run what the headlines need.
    every = []
    for method in methods:
        some = method.settings[::2] if elements == DENSE else method.settings
        one = (STEPS,) if method.unit == "steps" else (1e-3,)
        every += [Runs(method, setting) for setting in choose(one, some, method.settings)]
    finest = {"steps": choose(128, 512, 512), "tolerance": choose(1e-4, 1e-7, 1e-7)}

    def measure() -> dict:
        for seed in tqdm(range(-1, rounds), name, leave=False):
            for runs in tqdm(every, f"seed {seed}", leave=False):
                if runs.method.random or seed < exact_rounds:
                    runs.run(solved, x, seed + 1, warm_up=seed < 0)
        wide = in_double(solved)
        add_solver_errors(every, wide, x[:PATHS].double(), finest)
        reference = difference = None
        if exact:
            reference, difference = reference_of(wide, x.double(), choose(1e-3, 1e-5, 1e-6))
        pairs = [(runs, runs.errors(reference)) for runs in every]
        few, many = TARGETS[elements if exact else None]
        targets = [at_target(pairs, many, random=True)]
        targets += [at_target(pairs, few, random=False)] if exact else []
        return {
            "elements": elements,
            "samples": len(x),
            "seeds": rounds,
            "reference_difference": difference,
            "rows": [row_of(*pair) for pair in pairs],
            "targets": targets,
            "headlines": headlines(every),
            "compile_seconds": ways.compile_seconds(solved, x, exact=exact) if jax else None,
            "skipped": ways.missing() | left_out,
        }

    found = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(found)
    assert found["headlines"]["evaluations"] == EVALUATIONS
    assert all(np.isfinite(row["error"]).all() for row in found["rows"])


@pytest.mark.parametrize("method", [*ways.peers(exact=True)], ids=lambda method: method.name)
def test_every_peer_is_right(method):
    """In one dimension a probe of signs is exact; in two the divergence has to be."""
    for solved in [line()] if method.random else [line(), ring()]:
        small = dataclasses.replace(solved, data=solved.data[:4])
        expected = adaptive(small, small.data, 1e-7, 0)
        found = value_of(method.solve(small, small.data, 1e-8, 0))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_the_reference_is_the_density():
    """The model of the ring is exact, so that its likelihood is known but for the prior."""
    solved = ring()
    x, schedule = solved.data[:4], solved.model.schedule

    def log_density(x: Tensor, t: float) -> Tensor:
        return mixture().log_density(x, *schedule(x.new_full((4,), t)))

    options = {"method": "adaptive", "divergence": "exact", "tolerance": 1e-7}
    found = hosm.ode_nll(
        solved.model, x, **options, log_prior=lambda x: log_density(x, schedule.t_max)
    )
    torch.testing.assert_close(-found.nll, log_density(x, schedule.t_min), rtol=0, atol=1e-5)
