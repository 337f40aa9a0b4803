"""How many digits does a likelihood have for its network calls: ours, and others'?

    python -m benchmarks.ode_accuracy [--out DIRECTORY] [--before COMMIT] [--smoke]

Networks of width 96 learn three densities in two dimensions under five schedules. All divergences
are exact, all in float64, errors those of the median sample against 512 steps. Others run with
tolerances by half decades; of those that take at most 74 calls, and at most 138, the best counts.
`--out` keeps the networks. `--before` names the commit that is imported and measures nothing else.
It takes twenty minutes.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import parser, train_once, training
from benchmarks.peers.likelihoods import log_prior
from benchmarks.worth_problems import Checkerboard

FILE = results.DIRECTORY / "ode_accuracy.json"
SCHEDULES = {
    "flow": hosm.LinearFlowSchedule(),
    "VP": hosm.VPSchedule(),
    "VE": hosm.VESchedule(),
    "EDM": hosm.EDMSchedule(),
    "cosine": hosm.CosineSchedule(),
}
WIDTH, TRAINING, BATCH, SAMPLES = 96, 3000, 256, 200
STEPS, FINEST = (72, 136), 512
EXTRA = 2  # evaluations beside one a step
TOLERANCES = tuple(10 ** (-power / 2) for power in range(4, 17))


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


class Network(nn.Module):
    """Three hidden layers; x is scaled to unit size and t is log σ̂, but for a velocity."""

    def __init__(self, schedule: hosm.Schedule, std: float) -> None:
        super().__init__()
        self.schedule, self.std, sizes = schedule, std, [3, WIDTH, WIDTH, WIDTH]
        layers = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if isinstance(self.schedule, hosm.LinearFlowSchedule):
            return self.layers(torch.cat([x, t[:, None]], 1))
        alpha, sigma = (each[:, None] for each in self.schedule(t))
        size = torch.sqrt(alpha**2 * self.std**2 + sigma**2)
        level = self.schedule.log_sigma_hat(t)[:, None] / 4
        # The exact predictor for Gaussian data, and what the network adds.
        return sigma / size**2 * x + self.layers(torch.cat([x / size, level], 1))


def trained(data: str, schedule: str, steps: int, directory: Path | None) -> hosm.ScoreModel:
    """A network after training, in float64; from the directory if it is there."""
    generator, chosen = torch.Generator().manual_seed(0), SCHEDULES[schedule]
    std = float(DATA[data](4096, generator).std())
    torch.manual_seed(0)
    network = Network(chosen, std)
    prediction = "velocity" if schedule == "flow" else "epsilon"
    model = hosm.ScoreModel(network, chosen, prediction)
    file = directory / f"{data}-{schedule}-{steps}.pt" if directory else None

    def loss() -> Tensor:
        x0 = DATA[data](BATCH, generator)
        weighting = "native" if schedule == "flow" else "noise"
        return hosm.first_order_dsm(model, x0, weighting=weighting, generator=generator)

    train_once(network, training(network, loss, steps, 2e-3), file)
    return model.double()


def moved(model: hosm.ScoreModel, t: Tensor, x: Tensor) -> Tensor:
    """dx/dt, which a velocity is."""
    t = model.schedule.clip(t)  # by rounding
    times = t.expand(len(x))
    if model.prediction == "flow_prediction":
        return model.network(x, times)
    (alpha, sigma), (da, ds) = model.schedule(t), model.schedule.rates(t)
    return da / alpha * x + (ds - da / alpha * sigma) * model.noise(x, times)


def by_torchdiffeq(model: hosm.ScoreModel, x: Tensor, tolerance: float) -> Tensor:
    """As continuous normalising flows use it, dopri5 for state and density of the whole batch."""
    from torchdiffeq import odeint

    def right_side(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            value = moved(model, t, point)
            rows = [
                torch.autograd.grad(each.sum(), point, retain_graph=True)[0]
                for each in value.unbind(1)
            ]
        return value.detach(), rows[0][:, 0] + rows[1][:, 1]

    span = x.new_tensor([model.schedule.t_min, model.schedule.t_max])
    given: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
    given["options"] = {"step_t": span[-1:]}  # it would step over the end and interpolate
    with torch.no_grad():
        states, gains = odeint(right_side, (x, x.new_zeros(len(x))), span, **given)
    return -(log_prior(model, states[-1]) + gains[-1])


def by_zuko(model: hosm.ScoreModel, x: Tensor, tolerance: float) -> Tensor:
    """By the transform of zuko's CNF."""
    from zuko.transforms import FreeFormJacobianTransform

    ends = model.schedule.t_min, model.schedule.t_max
    given = {"atol": tolerance, "rtol": tolerance}
    with torch.no_grad():
        transform = FreeFormJacobianTransform(partial(moved, model), *ends, **given)
        latent, gain = transform.call_and_ladj(x)
    return -(log_prior(model, latent) + gain)


PEERS: dict[str, Callable[[hosm.ScoreModel, Tensor, float], Tensor]] = {
    "torchdiffeq": by_torchdiffeq,
    "zuko": by_zuko,
}


def measure(data: str, schedule: str, steps: int, directory: Path | None, *, before: bool) -> dict:
    """Median errors by solver and calls."""
    model = trained(data, schedule, steps, directory)
    generator, chosen = torch.Generator().manual_seed(1), SCHEDULES[schedule]
    drawn = DATA[data](SAMPLES, generator).double()
    alpha, sigma = chosen(torch.tensor(chosen.t_min, dtype=torch.float64))
    x = alpha * drawn + sigma * torch.randn(drawn.shape, generator=generator).double()
    moments = {"data_mean": drawn.mean(0), "data_std": drawn.std(0)}

    def ours(steps: int) -> Tensor:
        solver = hosm.FixedGrid(steps, **moments)
        return hosm.ode_nll(model, x, solver=solver, divergence="exact").nll

    def error(nll: Tensor) -> float:
        return float((nll - truth).abs().median())

    truth = ours(FINEST)
    found: dict[str, float] = {}
    for count in STEPS:
        if before:  # ten evaluations beside one a step
            found[f"before, {count + EXTRA} calls"] = error(ours(count + EXTRA - 10))
        else:
            found[f"ours, {count + EXTRA} calls"] = error(ours(count))
    for name, solve in PEERS.items():
        if before or not results.installed(name):
            continue
        calls: list[int] = []
        hook = model.network.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        best = dict.fromkeys(STEPS, math.inf)
        for tolerance in TOLERANCES:
            calls.clear()
            reached = error(solve(model, x, tolerance))
            best = {n: min(e, reached) if len(calls) <= n + EXTRA else e for n, e in best.items()}
            if len(calls) > STEPS[-1] + EXTRA:
                break
        hook.remove()
        reached_by = {n: each for n, each in best.items() if math.isfinite(each)}
        found |= {f"{name}, {count + EXTRA} calls": each for count, each in reached_by.items()}
        found[f"{name} at its finest, {len(calls)} calls"] = reached
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--out", type=Path, metavar="DIRECTORY", help="where networks are kept")
    arguments.add_argument("--before", metavar="COMMIT", help="whose grid is imported")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    kept = results.read(FILE)
    for data in [*DATA][: 1 if options.smoke else None]:
        for schedule in [*SCHEDULES][: 1 if options.smoke else None]:
            steps = 10 if options.smoke else TRAINING
            before = options.before is not None
            row = measure(data, schedule, steps, options.out, before=before)
            kept.setdefault("found", {}).setdefault(f"{data}, {schedule}", {}).update(row)
            results.show(f"{data}, {schedule}", {"errors": row})
            if not options.smoke:
                about = {"before": options.before} if before else {}
                peers = {name: results.installed(name) for name in PEERS}
                kept |= about or {"environment": results.environment() | {"peers": peers}}
                results.write(FILE, kept)


if __name__ == "__main__":
    main()
