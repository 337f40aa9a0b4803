"""What a step of order one costs with averaged targets, in pairs and at learnt times.

python -m benchmarks.quiet [CASE ...] [--dirty | --smoke]

Processor time over that of a plain step with as many rows of the network, all in turns in one
process of one thread. Pairs are of half as many samples. A call of `learn` is timed after them
and spread over 25 steps. A step of the cases with fewer rows takes some 20 ms.
Into results/quiet.json. Three minutes.
"""

from collections.abc import Callable

import torch

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import Row, alone, begin, keep, parser, times
from benchmarks.intervals import ratio_of_medians
from benchmarks.steps import NETWORKS, model_of

FILE = results.DIRECTORY / "quiet.json"
EVERY = 25  # steps for each call of `learn`
# The network, and the rows of a batch; None is what other benchmarks take.
CASES: dict[str, tuple[str, int | None]] = {
    "mlp": ("mlp", None),
    "mlp, 512 rows": ("mlp", 512),
    "convolutional, 4 rows": ("convolutional", 4),
    "unet": ("unet", None),
    "dit": ("dit", None),
}
AVERAGED = {"targets": hosm.AveragedTargets()}
VARIANTS: dict[str, Row] = {
    "plain": {},
    "averaged": AVERAGED,
    "pairs": {"antithetic": True},
    "times": {"time_sampler": hosm.AdaptiveTimes()},
    "pairs, times": {"antithetic": True, "time_sampler": hosm.AdaptiveTimes()},
    "quiet": AVERAGED | {"antithetic": True, "time_sampler": hosm.AdaptiveTimes()},
}


def measure(case: str, rounds: int) -> Row:
    """Milliseconds of a plain step, and what the others and `learn` take in units of it."""
    torch.set_num_threads(1)
    name, rows = CASES[case]
    model, (batch, *shape) = model_of(name), NETWORKS[name][1]
    batch = rows or batch
    optimizer = torch.optim.Adam(model.parameters())

    def route(options: Row) -> Callable[[], None]:
        loss = hosm.FirstOrderDSM(model, **options)

        def step() -> None:
            optimizer.zero_grad()
            loss(torch.randn(batch // (1 + loss.options.antithetic), *shape)).backward()
            optimizer.step()

        return step

    def learn() -> None:
        objective = hosm.FirstOrderDSM(model, **VARIANTS["quiet"])
        objective.time_sampler.learn(objective, torch.randn(batch, *shape), optimizer)

    routes = {key: route(options) for key, options in VARIANTS.items()}
    times(routes, 2)
    seconds = times(routes, rounds)
    seconds |= times({"learn": learn}, rounds)  # apart: a step after it waits for memory
    found: Row = {"ms": 1e3 * sorted(seconds["plain"])[rounds // 2], "steps": {}}
    for key in VARIANTS:
        found["steps"][key] = ratio_of_medians(seconds[key], seconds["plain"])
    found["learn"] = ratio_of_medians(seconds["learn"], seconds["plain"])
    for key in ("pairs, times", "quiet"):
        spread = [seconds["learn"][i] / EVERY + seconds[key][i] for i in range(rounds)]
        found["steps"][f"{key}, learn"] = ratio_of_medians(spread, seconds["plain"])
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("cases", nargs="*", default=list(CASES))
    options, where = begin(arguments)
    for name in options.cases[: 1 if options.smoke else None]:
        found = alone(measure, name, 2 if options.smoke else 40)
        print(name, found)
        keep(options, FILE, {name: found | {"environment": where}})


if __name__ == "__main__":
    main()
