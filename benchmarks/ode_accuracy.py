"""What error does a likelihood have after so many calls of the network: ours, and others'?

    python -m benchmarks.ode_accuracy [--dirty | --smoke]

Networks of width 96 learn three densities in two dimensions under five schedules. All divergences
are exact, all in float64, calls are counted at the network. Errors are root mean squares over 200
samples, against 1024 steps of ours; `doubt` is how far torchdiffeq at its finest is from those.

Every solver has a curve: ours by steps, adaptive ones by tolerance, RK4 by steps, which are even
in t or in log σ̂, whichever errs less. "within" has the least error of each in at most so many
calls. It takes five minutes on a core.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import Row, calls_of, environment, parser, train
from benchmarks.peers.likelihoods import flow, follow, log_prior, units
from benchmarks.trained import Plane
from benchmarks.worth_problems import Checkerboard

FILE = results.DIRECTORY / "ode_accuracy.json"
SCHEDULES = {
    "flow": hosm.LinearFlowSchedule(),
    "VP": hosm.VPSchedule(),
    "VE": hosm.VESchedule(),
    "EDM": hosm.EDMSchedule(),
    "cosine": hosm.CosineSchedule(),
}
TRAINING, BATCH, SAMPLES = 3000, 256, 200
STEPS, FINEST = (20, 32, 40, 64, 128), 1024
WITHIN = (22, 66, 130)  # calls of 20, 64 and 128 steps of ours
TOLERANCES = tuple(10 ** (-power / 2) for power in range(2, 19))
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


DATA = {"moons": moons, "pinwheel": pinwheel, "checkerboard": checkerboard}


class Velocity(Plane):
    """The same layers, of x and t as they are."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def trained(data: str, schedule: str, steps: int) -> hosm.ScoreModel:
    """The network of a schedule after so many steps on data that are drawn anew, in float64."""
    generator, chosen = torch.Generator().manual_seed(0), SCHEDULES[schedule]
    std, flows = float(DATA[data](4096, generator).std()), schedule == "flow"
    torch.manual_seed(0)
    network = (Velocity if flows else Plane)(chosen, std)
    model = hosm.ScoreModel(network, chosen, "velocity" if flows else "epsilon")

    def loss() -> Tensor:
        x0 = DATA[data](BATCH, generator)
        weighting = "native" if flows else "noise"
        return hosm.first_order_dsm(model, x0, weighting=weighting, generator=generator)

    train(network, loss, steps, rate=2e-3)
    return model.double()


def by_torchdiffeq(model: hosm.ScoreModel, x: Tensor, span: Tensor, **options: Any) -> Tensor:
    latent, gain = follow(model, x, span, units(x), **options)
    return -(log_prior(model, latent) + gain)


def by_dopri5(model: hosm.ScoreModel, x: Tensor, tolerance: float) -> Tensor:
    """By torchdiffeq's default."""
    span = x.new_tensor([model.schedule.t_min, model.schedule.t_max])
    # It would step over the end and interpolate.
    options = {"rtol": tolerance, "atol": tolerance, "options": {"step_t": span[-1:]}}
    return by_torchdiffeq(model, x, span, method="dopri5", **options)


def by_rk4(model: hosm.ScoreModel, x: Tensor, steps: int, *, logarithmic: bool) -> Tensor:
    """By torchdiffeq's RK4 on nodes that are even in t, or in log σ̂."""
    schedule = model.schedule
    nodes = torch.linspace(schedule.t_min, schedule.t_max, steps + 1, dtype=x.dtype)
    if logarithmic:
        levels = torch.linspace(*schedule.log_sigma_hat_range, steps + 1, dtype=x.dtype)
        nodes[1:-1] = schedule.time(levels)[1:-1]
    return by_torchdiffeq(model, x, nodes, method="rk4")


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


def measure(data: str, schedule: str, steps: int) -> dict[str, Any]:
    """The curves on samples of the data, noised to t_min."""
    model = trained(data, schedule, steps)
    generator, chosen = torch.Generator().manual_seed(1), SCHEDULES[schedule]
    drawn = DATA[data](SAMPLES, generator).double()
    alpha, sigma = chosen(torch.tensor(chosen.t_min, dtype=torch.float64))
    x = alpha * drawn + sigma * torch.randn(drawn.shape, generator=generator).double()
    return curves(model, x, {"data_mean": drawn.mean(0), "data_std": drawn.std(0)})


def main() -> None:
    options = parser(__doc__).parse_args()
    where = environment(options)
    torch.set_num_threads(1)
    report: Row = {"environment": where, "found": {}}
    for data in [*DATA][: 1 if options.smoke else None]:
        for schedule in [*SCHEDULES][: 1 if options.smoke else None]:
            steps = 10 if options.smoke else TRAINING
            report["found"][f"{data}, {schedule}"] = row = measure(data, schedule, steps)
            results.show(f"{data}, {schedule}", row["within"] | {"doubt": row.get("doubt")})
    if not options.smoke:
        results.write(FILE, report)


if __name__ == "__main__":
    main()
