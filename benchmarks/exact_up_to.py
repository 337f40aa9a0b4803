"""Up to which dimension is the exact divergence worth its products with the Jacobian?

    python -m benchmarks.exact_up_to [--smoke]

Residual networks of width 128 learn products of double wells in d dimensions. Of `ode_nll` with
the exact divergence and with one random probe it measures the time, in turns, and the standard
deviation of the one-probe answer for one sample. It takes two minutes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import parser, times, train_once, training
from benchmarks.intervals import ratio_of_medians
from benchmarks.trained import Dense
from benchmarks.worth_problems import many_well

DIMENSIONS, BATCH, STEPS, ROUNDS = (2, 4, 8, 16, 32, 64), 64, 1000, 5
FILE = results.DIRECTORY / "exact_up_to.json"


def measure(elements: int, steps: int, rounds: int) -> dict[str, Any]:
    """Time of exact over that of one probe, and the error of one probe, in nats."""
    torch.manual_seed(0)
    schedule, problem = hosm.VPSchedule(), many_well(elements)

    def data(count: int) -> Tensor:
        return problem.quantile(torch.rand(count, elements, dtype=torch.float64)).float()

    x = data(BATCH)
    std = float(x.std())
    model = hosm.ScoreModel(Dense(schedule, std, elements, 128), schedule)
    train_once(
        model, training(model, lambda: hosm.first_order_dsm(model, data(BATCH)), steps), None
    )
    model.eval()
    solver = hosm.FixedGrid(data_std=std)

    def nll(divergence: Any) -> Tensor:
        return hosm.ode_nll(model, x, solver=solver, divergence=divergence).nll

    exact, probe = partial(nll, "exact"), partial(nll, hosm.Hutchinson())
    seconds = times({"exact": exact, "probe": probe}, rounds)
    error = (probe() - exact()).square().mean().sqrt()
    return {"time": ratio_of_medians(seconds["exact"], seconds["probe"]), "nats": float(error)}


def main() -> None:
    smoke = parser(__doc__).parse_args().smoke
    torch.set_num_threads(1)
    found = {}
    for elements in DIMENSIONS[: 2 if smoke else None]:
        found[str(elements)] = measure(elements, *((2, 1) if smoke else (STEPS, ROUNDS)))
        results.show(f"d = {elements}", {"exact": found[str(elements)]})
    if not smoke:
        results.write(FILE, {"environment": results.environment(), "found": found})


if __name__ == "__main__":
    main()
