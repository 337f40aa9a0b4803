"""Are errors as large as `standard_error` and `solver_error` claim?

    python -m benchmarks.calibration [--dirty | --smoke]

Ratios |error| / claim of single samples: the error of random probes against the exact divergence
on the same grid, and that of the grid, with and without a companion, against a much finer one.
It takes a minute or two on a core.
"""

import hosm_losses as hosm
from benchmarks import results
from benchmarks.coverage import models
from benchmarks.experiment import begin, keep, parser, seeded

FILE = results.DIRECTORY / "calibration.json"
STEPS = 200  # of training
# The schedules, samples and steps of the truth of each problem of `coverage`.
PROBLEMS = {
    "ring, d = 2": (("VP", "EDM", "flow"), 100, 384),
    "digits, d = 64": (("VP",), 60, 160),
}


def measure(name: str, key: str, samples: int, finest: int) -> dict[str, list[float]]:
    """The ratios of one network."""
    model, x, moments = models(name, key, STEPS, samples=samples)
    generator = seeded(0)

    def solve(steps: int, companion: bool = False, divergence: object = "exact") -> hosm.NLLResult:
        solver = hosm.FixedGrid(steps, companion=companion, **moments)
        return hosm.ode_nll(
            model, x, solver=solver, divergence=divergence, generator=generator, batch_size=20
        )

    truth, grid = solve(finest).nll, solve(64)
    companion, random = solve(64, True), solve(64, divergence=hosm.Hutchinson())
    ratios = {
        "solver_error": (grid.nll - truth).abs() / grid.solver_error,
        "solver_error, companion": (companion.nll - truth).abs() / companion.solver_error,
        "standard_error": (random.nll - grid.nll).abs() / random.standard_error,
    }
    return {claim: ratio.tolist() for claim, ratio in ratios.items()}


def main() -> None:
    options, where = begin(parser(__doc__))
    found: dict[str, dict[str, list[float]]] = {}
    for name, (schedules, samples, finest) in PROBLEMS.items():
        for key in schedules[: 1 if options.smoke else None]:
            sizes = (4, 96) if options.smoke else (samples, finest)
            found[f"{name}, {key}"] = measure(name, key, *sizes)
    results.show("calibration", found)
    keep(options, FILE, {"environment": where, "found": found})


if __name__ == "__main__":
    main()
