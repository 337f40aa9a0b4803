"""What a step of order one costs with averaged targets, in pairs and at learnt times.

python -m benchmarks.quiet [NETWORK ...] [--dirty | --smoke]

Processor time over that of a plain step with as many rows of the network, all in turns in one
process of one thread. Pairs are of half as many samples. A call of `learn` is timed beside them
and spread over 25 steps. Into results/quiet.json. Two minutes.
"""

from collections.abc import Callable

import torch

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import Row, alone, environment, parser, times
from benchmarks.intervals import ratio_of_medians
from benchmarks.steps import NETWORKS, model_of

FILE = results.DIRECTORY / "quiet.json"
EVERY = 25  # steps for each call of `learn`
AVERAGED = {"targets": hosm.AveragedTargets()}
VARIANTS: dict[str, Row] = {
    "plain": {},
    "averaged": AVERAGED,
    "pairs": {"antithetic": True},
    "times": {"time_sampler": hosm.AdaptiveTimes()},
    "quiet": AVERAGED | {"antithetic": True, "time_sampler": hosm.AdaptiveTimes()},
}


def measure(name: str, rounds: int) -> Row:
    """Milliseconds of a plain step, and what the others and `learn` take in units of it."""
    torch.set_num_threads(1)
    model, (batch, *shape) = model_of(name), NETWORKS[name][1]
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
        objective.time_sampler.learn(objective, torch.randn(batch // 2, *shape), optimizer)

    routes = {key: route(options) for key, options in VARIANTS.items()} | {"learn": learn}
    times(routes, 2)
    seconds = times(routes, rounds)
    found: Row = {"ms": 1e3 * sorted(seconds["plain"])[rounds // 2], "steps": {}}
    for key in VARIANTS:
        found["steps"][key] = ratio_of_medians(seconds[key], seconds["plain"])
    spread = [seconds["learn"][i] / EVERY + seconds["quiet"][i] for i in range(rounds)]
    found["steps"]["quiet, learn"] = ratio_of_medians(spread, seconds["plain"])
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("networks", nargs="*", default=["mlp", "unet", "dit"])
    options = arguments.parse_args()
    for name in options.networks[: 1 if options.smoke else None]:
        where = environment(options)
        found = alone(measure, name, 2 if options.smoke else 40)
        print(name, found)
        if not options.smoke:
            results.keep(FILE, {name: found | {"environment": where}})


if __name__ == "__main__":
    main()
