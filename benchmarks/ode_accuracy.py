"""What error does a likelihood have after so many calls of the network: ours, and others'?

    python -m benchmarks.ode_accuracy [--dirty | --smoke]

Networks of width 96 learn three densities in two dimensions under five schedules, and eight more
learn under the flow schedule, in up to eight dimensions. All divergences are exact, in float64;
calls are counted at the network. Errors are root mean squares over 200 samples, against 1024 steps
of ours; `doubt` is how far torchdiffeq at its finest is from those.

Every solver has a curve: ours by steps, adaptive ones by tolerance, RK4 by steps, which are even
in t or in log σ̂, whichever errs less. "dopri5 in z" solves in our own variable and log σ̂. "within"
has the least error of each in at most so many calls. It takes half an hour on a core.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import Row, begin, calls_of, keep, parser, seeded, train
from benchmarks.peers.likelihoods import Field, dopri5, flow, follow, log_prior, units
from benchmarks.trained import Dense, Plane, Velocity
from benchmarks.worth_problems import CELLS, Checkerboard

FILE = results.DIRECTORY / "ode_accuracy.json"
SCHEDULES = {
    "flow": hosm.LinearFlowSchedule(),
    "VP": hosm.VPSchedule(),
    "VE": hosm.VESchedule(),
    "EDM": hosm.EDMSchedule(),
    "cosine": hosm.CosineSchedule(),
}
BATCH, SAMPLES = 256, 200
STEPS, FINEST = (18, 20, 30, 32, 38, 40, 64, 72, 128), 1024
WITHIN = (20, 32, 40, 66, 74, 130)  # calls of 18, 30, 38, 64, 72 and 128 steps of ours
TOLERANCES = tuple(10 ** (-power / 2) for power in range(2, 19))
Draw = Callable[[int, torch.Generator], Tensor]
SLOPES = 4  # calls of a step of RK4
LEAST = 1e-11  # the tolerance of the doubt


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two half circles of radius one, blurred by 0.05, (count, 2)."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)[:, None]
    return sign * upper + 0.05 * torch.randn(count, 2, generator=generator)


def pinwheel(count: int, generator: torch.Generator) -> Tensor:
    """Five arms that are bent by their radius, as in FFJORD, (count, 2)."""
    x = torch.randn(count, 2, generator=generator) * torch.tensor([0.3, 0.1])
    x = x + torch.tensor([1.0, 0.0])
    angle = 2 * math.pi / 5 * (torch.arange(count) % 5) + 0.25 * x[:, 0].exp()
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    return 2 * torch.einsum("ni,nij->nj", x, turned.reshape(-1, 2, 2))


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Uniform on eight of sixteen squares, (count, 2)."""
    u = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return 2 * Checkerboard().quantile(u).float()


def rings(count: int, generator: torch.Generator) -> Tensor:
    """Two circles of radius two, each in a plane of its own, blurred by 0.1, (count, 4)."""
    angle = 2 * math.pi * torch.rand(count, 2, generator=generator)
    circles = 2 * torch.stack([angle.cos(), angle.sin()], 2).flatten(1)
    return circles + 0.1 * torch.randn(count, 4, generator=generator)


class Setting(NamedTuple):
    """What is trained on what."""

    draw: Draw
    schedule: str
    network: Callable[[hosm.Schedule, float], nn.Module]
    steps: int = 3000
    seed: int = 0
    batch: int = BATCH


DATA = {"moons": moons, "pinwheel": pinwheel, "checkerboard": checkerboard}
SETTINGS = {
    f"{data}, {schedule}": Setting(draw, schedule, Velocity if schedule == "flow" else Plane)
    for (data, draw), schedule in product(DATA.items(), SCHEDULES)
}
WELLS, ROTATED = (CELLS[f"many-well, d = {name}"]().draw for name in ("4", "8, rotated"))
FLOWS = {
    "moons, 200 steps, flow": (moons, Velocity, 200),
    "pinwheel, seed 2, flow": (pinwheel, Velocity, 3000),
    "checkerboard, seed 3, flow": (checkerboard, Velocity, 3000),
    "checkerboard, LayerNorm, flow": (checkerboard, partial(Dense, elements=2, width=128), 3000),
    "rings, d = 4, flow": (rings, partial(Velocity, elements=4), 3000),
    "many-well, d = 4, flow": (WELLS, partial(Velocity, elements=4), 3000),
    "many-well, d = 4, LayerNorm, flow": (WELLS, partial(Dense, elements=4, width=128), 3000),
    "many-well, d = 8, rotated, flow": (ROTATED, partial(Velocity, elements=8), 10_000),
}
SETTINGS |= {
    name: Setting(draw, "flow", network, steps, seed)
    for seed, (name, (draw, network, steps)) in enumerate(FLOWS.items(), 1)
}


def trained(setting: Setting) -> hosm.ScoreModel:
    """The network after its steps on data that are drawn anew, in float64."""
    generator, chosen = seeded(setting.seed), SCHEDULES[setting.schedule]
    std, flows = float(setting.draw(4096, generator).std()), setting.schedule == "flow"
    torch.manual_seed(setting.seed)
    network = setting.network(chosen, std)
    model = hosm.ScoreModel(network, chosen, "velocity" if flows else "epsilon")

    def loss() -> Tensor:
        x0 = setting.draw(setting.batch, generator)
        weighting = "native" if flows else "noise"
        return hosm.first_order_dsm(model, x0, weighting=weighting, generator=generator)

    train(network, loss, setting.steps, rate=2e-3)
    return model.double()


def by_dopri5(
    model: hosm.ScoreModel, x: Tensor, tolerance: float, *, variable: str = "t"
) -> Tensor:
    """By torchdiffeq's default, in one of `VARIABLES`."""
    field = Field(model, variable, x.mean(0), x.var(0))
    return field.nll(partial(dopri5, field), x, units(x), tolerance, back=False)


def by_rk4(model: hosm.ScoreModel, x: Tensor, steps: int, *, logarithmic: bool) -> Tensor:
    """By torchdiffeq's RK4 on nodes that are even in t, or in log σ̂."""
    schedule = model.schedule
    nodes = torch.linspace(schedule.t_min, schedule.t_max, steps + 1, dtype=x.dtype)
    if logarithmic:
        levels = torch.linspace(*schedule.log_sigma_hat_range, steps + 1, dtype=x.dtype)
        nodes[1:-1] = schedule.time(levels)[1:-1]
    latent, gain = follow(partial(flow, model), x, nodes, units(x), method="rk4")
    return -(log_prior(model, latent) + gain)


def by_zuko(model: hosm.ScoreModel, x: Tensor, tolerance: float) -> Tensor:
    """By the transform of zuko's CNF."""
    from zuko.transforms import FreeFormJacobianTransform

    ends = model.schedule.t_min, model.schedule.t_max
    options = {"atol": tolerance, "rtol": tolerance}
    with torch.no_grad():
        transform = FreeFormJacobianTransform(lambda t, x: flow(model, x, t), *ends, **options)
        latent, gain = transform.call_and_ladj(x)
    return -(log_prior(model, latent) + gain)


# By name: the package, the settings, and what solves at one.
Solve = Callable[[hosm.ScoreModel, Tensor, Any], Tensor]
PEERS: dict[str, tuple[str, tuple[float, ...], tuple[Solve, ...]]] = {
    "torchdiffeq, dopri5": ("torchdiffeq", TOLERANCES, (by_dopri5,)),
    "torchdiffeq, dopri5 in z": (
        "torchdiffeq",
        TOLERANCES,
        (partial(by_dopri5, variable="log σ̂"),),
    ),
    "torchdiffeq, RK4": (
        "torchdiffeq",
        tuple(calls // SLOPES for calls in (20, 32, 40, 64, 128)),
        (partial(by_rk4, logarithmic=False), partial(by_rk4, logarithmic=True)),
    ),
    "zuko": ("zuko", TOLERANCES, (by_zuko,)),
}


def curves(model: hosm.ScoreModel, x: Tensor, moments: dict[str, Tensor]) -> dict[str, Any]:
    """Calls and error of every solver at every setting, the least error within so many calls."""

    def ours(model: hosm.ScoreModel, x: Tensor, steps: int) -> Tensor:
        solver = hosm.FixedGrid(steps, **moments)
        return hosm.ode_nll(model, x, solver=solver, divergence="exact").nll

    truth = ours(model, x, FINEST)

    def attempt(solve: Solve, setting: float) -> dict[str, float]:
        with calls_of(model.network) as calls:
            nll = solve(model, x, setting)
        return {"calls": len(calls), "error": float((nll - truth).square().mean().sqrt())}

    solvers = {"ours": ("torch", STEPS, (ours,))} | PEERS
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (package, settings, ways) in solvers.items():
        if not results.installed(package):
            continue
        found[name] = {}
        for setting in settings:
            row = min((attempt(solve, setting) for solve in ways), key=lambda row: row["error"])
            found[name][f"{setting:.3g}"] = row
            if row["calls"] > 1.2 * WITHIN[-1]:
                break
    within: dict[str, dict[str, float]] = {f"{most}": {} for most in WITHIN}
    for (most, best), (name, rows) in product(within.items(), found.items()):
        errors = [row["error"] for row in rows.values() if row["calls"] <= int(most)]
        if errors:
            best[name] = min(errors)
    answer: dict[str, Any] = {"curves": found, "within": within}
    if results.installed("torchdiffeq"):
        answer["doubt"] = attempt(by_dopri5, LEAST)["error"]
    return answer


def measure(setting: Setting) -> dict[str, Any]:
    """The curves on samples of the data, noised to t_min."""
    model, chosen = trained(setting), SCHEDULES[setting.schedule]
    generator = seeded(setting.seed + 1)
    drawn = setting.draw(SAMPLES, generator).double()
    alpha, sigma = chosen(torch.tensor(chosen.t_min, dtype=torch.float64))
    x = alpha * drawn + sigma * torch.randn(drawn.shape, generator=generator).double()
    return curves(model, x, {"data_mean": drawn.mean(0), "data_std": drawn.std(0)})


def main() -> None:
    options, where = begin(parser(__doc__))
    report: Row = {"environment": where, "found": {}}
    for name, setting in [*SETTINGS.items()][: 1 if options.smoke else None]:
        report["found"][name] = row = measure(
            setting._replace(steps=10) if options.smoke else setting
        )
        results.show(name, row["within"] | {"doubt": row.get("doubt")})
    keep(options, FILE, report)


if __name__ == "__main__":
    main()
