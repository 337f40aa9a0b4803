"""How many seconds does a density take, at an error of 1e-2, 1e-3 and 1e-4 nats?

    python -m benchmarks.seconds [--cells REGEX] [--dirty | --smoke]

Networks are trained for a minute at most: an MLP of three layers of 128 in 2, 8 and 64 dimensions
(VP), two of these under VE and the flow schedule, one of 512 in 16 dimensions, and a U-Net of
136,000 parameters on the 8×8 digits, told log σ̂ as in EDM. Divergences are exact up to 16
dimensions; beyond, all solvers share one probe for each sample, kept along the path. A cell is a
network, a batch of 64 or 1,024, and the densities of points or samples with their densities. All
is in float32 on a core.

Errors are root mean squares over the first 64 samples, against 512 steps of ours in float64;
`doubt` is how far torchdiffeq's dopri5 at a tolerance of 1e-8 is from those. Ours is `FixedGrid`
as it is, and `compiled`. Others have tolerances by half decades, dopri5 (torchdiffeq) or the best
of tsit5, dopri5 and dopri8 (diffrax, compiled), in the best of t, log σ̂ and σ̂/(σ̂ + c), where c
is the data's size; the last two follow our z. They differentiate in reverse mode.

With a batch of 64, each solver has the setting that takes least time among those that meet a
target; a batch of 1,024 takes these settings over, and the error is measured anew. What is chosen
is then timed in turns, by processor time, after a first call. zuko's spline flow, not trained,
stands beside as a scale.

`CURVES` are networks in 64 dimensions, two of which make it hard: one sees x as it is, the other t
in sines of up to 1000 t, as in DDPM. Their errors are taken in float64 and over 16 samples against
dopri5 at 1e-8, with at most 18, 34, 66 or 130 evaluations, which are 16 to 128 steps of ours.

Each cell is written to results/seconds.json at once, and a second run goes on where the first one
stopped. To measure a cell anew, remove it from the file. All take two hours.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks import results
from benchmarks.experiment import (
    Row,
    alone,
    begin,
    calls_of,
    clocked,
    keep,
    parser,
    seeded,
    times,
)
from benchmarks.intervals import bootstrap, ratio_of_medians
from benchmarks.networks import UNet
from benchmarks.ode_accuracy import Setting, trained
from benchmarks.peers.likelihoods import VARIABLES, Field, dopri5, signs, units
from benchmarks.trained import Plane, Velocity, digits

FILE = results.DIRECTORY / "seconds.json"
TARGETS = (1e-2, 1e-3, 1e-4)
STEPS = (12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256)
TOLERANCES = tuple(10 ** (-power / 2) for power in range(3, 15))
LARGEST_EXACT = 16  # elements; beyond, one probe
BATCHES, WAYS = (64, 1024), ("densities", "samples")
ROUNDS, FEWEST, LIMIT = 7, 2, 120.0  # rounds, fewer if they take more seconds than the limit
FINEST, LEAST, CHECKED = 512, 1e-8, 64  # steps of the reference, dopri5's tolerance, samples
WITHIN, TRACED = (18, 34, 66, 130), 16  # evaluations and samples of the curves
Solve = Callable[[Tensor, Any], Tensor]  # points or latents (B, *), a setting → nll (B,)
Chosen = dict[str, dict[str, tuple[str, Any]]]  # target, solver → variant, setting


def bent(elements: int, count: int, generator: torch.Generator) -> Tensor:
    """Six Gaussians that a sine of the next element bends, (count, elements)."""
    centres = torch.randn(6, elements, generator=seeded(elements)) * 0.8
    x = centres[torch.randint(6, (count,), generator=generator)]
    x = x + 0.2 * torch.randn(count, elements, generator=generator)
    return x + 0.3 * torch.sin(3 * x.roll(1, 1))


def pictures(count: int, generator: torch.Generator) -> Tensor:
    """The 8×8 digits, again and again, (count, 1, 8, 8)."""
    rows = [digits(1797, generator) for _ in range(-(-count // 1797))]
    return torch.cat(rows)[:count].reshape(-1, 1, 8, 8)


class Raw(Plane):
    """The layers of `Plane`, of x as it is and four sines and cosines of log σ̂."""

    def __init__(self, schedule: hosm.Schedule, _: float) -> None:
        super().__init__(schedule, 1.0, elements=64, width=128)
        self.layers[0] = nn.Linear(64 + 9, 128)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = self.schedule.log_sigma_hat(t)[:, None] / 4
        waves = level * torch.arange(1, 5).to(x)
        return self.layers(torch.cat([x, level, waves.sin(), waves.cos()], 1))


class Told(UNet):
    """A U-Net told t as sines of up to 1000 t."""

    def __init__(self, schedule: hosm.Schedule, _: float) -> None:
        super().__init__(32, (1, 1), blocks=1, channels=1)
        self.schedule = schedule


class Levelled(Told):
    """The same told sines of up to log σ̂/4, as in EDM."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, self.schedule.log_sigma_hat(t) / 4000)


def mlp(elements: int, schedule: str, width: int = 128, steps: int = 2500) -> Setting:
    kind = Velocity if schedule == "flow" else Plane
    network = partial(kind, elements=elements, width=width)
    return Setting(partial(bent, elements), schedule, network, steps)


def unet(network: Callable[[hosm.Schedule, float], nn.Module]) -> Setting:
    return Setting(pictures, "VP", network, 500, batch=64)


NETWORKS = {
    "MLP, d = 2, VP": mlp(2, "VP"),
    "MLP, d = 8, VP": mlp(8, "VP"),
    "MLP, d = 64, VP": mlp(64, "VP"),
    "MLP, d = 8, VE": mlp(8, "VE"),
    "MLP, d = 2, flow": mlp(2, "flow"),
    "MLP, d = 8, flow": mlp(8, "flow"),
    "MLP of width 512, d = 16, VP": mlp(16, "VP", 512, 1000),
    "U-Net, d = 64, VP": unet(Levelled),
}
CURVES = {
    "MLP": NETWORKS["MLP, d = 64, VP"],
    "MLP of x as it is": NETWORKS["MLP, d = 64, VP"]._replace(network=Raw),
    "U-Net": NETWORKS["U-Net, d = 64, VP"],
    "U-Net told 1000 t": unet(Told),
}


@dataclass(frozen=True, eq=False)
class Kept(hosm.Hutchinson):
    """Hutchinson's estimator with one probe that is always the same."""

    probe: Tensor | None = None

    def draw(self, x: Tensor, _: Any) -> Tensor:
        assert self.probe is not None
        return self.probe[None].to(x)


def by_dopri5(field: Field) -> Callable[..., Any]:
    return partial(dopri5, field)


@dataclass
class Cell:
    """What is solved: a model, what its data's moments are, points or latents, and a probe."""

    model: hosm.ScoreModel
    mean: Tensor
    std: Tensor
    given: Tensor
    back: bool

    @property
    def exact(self) -> bool:
        return self.mean.numel() <= LARGEST_EXACT

    @property
    def probe(self) -> Tensor:
        return signs(self.given, 0)

    def double(self) -> "Cell":
        """The first samples, in float64."""
        model = deepcopy(self.model).double()
        wide = (each.double() for each in (self.mean, self.std, self.given[:CHECKED]))
        return Cell(model, *wide, self.back)

    def ours(self, compiled: bool) -> Solve:
        """By `FixedGrid`, with a setting of so many steps."""
        divergence = "exact" if self.exact else Kept(probe=self.probe)
        moments = {"data_mean": self.mean, "data_std": self.std}

        def solve(given: Tensor, steps: int) -> Tensor:
            solver = hosm.FixedGrid(steps, compiled=compiled, **moments)
            call = hosm.ode_sample if self.back else hosm.ode_nll
            return call(self.model, given, solver=solver, divergence=divergence).nll

        return solve

    def theirs(self, variable: str, follower_of: Callable[[Field], Callable[..., Any]]) -> Solve:
        """By a peer's solver, with a tolerance as the setting."""
        var = self.std.square()
        if not self.exact:  # vᵀ C⁻¹ J C v is vᵀ J v of one probe v only where C is a multiple of 1
            var = var.mean().expand_as(var)
        field = Field(self.model, variable, self.mean, var)
        follower = follower_of(field)
        probes = units(self.given) if self.exact else self.probe[None]

        def solve(given: Tensor, tolerance: float) -> Tensor:
            return field.nll(follower, given, probes, tolerance, back=self.back)

        return solve

    def peers(self) -> dict[str, dict[str, Callable[[], Solve]]]:
        """Of each peer that is installed, what makes its variants."""
        found: dict[str, dict[str, Callable[[], Solve]]] = {}
        if results.installed("torchdiffeq"):
            found["torchdiffeq"] = {
                f"dopri5, {each}": partial(self.theirs, each, by_dopri5) for each in VARIABLES
            }
        if results.installed("diffrax"):
            from benchmarks.peers.in_diffrax import METHODS, follower

            found["diffrax"] = {
                f"{method}, {each}": partial(self.theirs, each, partial(follower, method=method))
                for method, each in product(METHODS, VARIABLES)
            }
        return found


def cell_of(setting: Setting, model: hosm.ScoreModel, way: str, batch: int) -> Cell:
    """Data noised to t_min, or latents at t_max."""
    drawn, schedule = setting.draw(4096, seeded(1)), model.schedule
    if way == "samples":
        given = schedule.prior_std * torch.randn(batch, *drawn.shape[1:], generator=seeded(2))
    else:
        x0 = setting.draw(batch, seeded(2))
        alpha, sigma = schedule(torch.tensor(schedule.t_min))
        given = alpha * x0 + sigma * torch.randn(x0.shape, generator=seeded(3))
    return Cell(model, drawn.mean(0), drawn.std(0), given, way == "samples")


def distance(nll: Tensor, truth: Tensor) -> float:
    """The root mean square over the first samples; infinite where it is not a number."""
    error = (nll[: len(truth)] - truth).square().mean().sqrt()
    return float(torch.nan_to_num(error, nan=torch.inf))


def search(cell: Cell, truth: Tensor, smoke: bool) -> Chosen:
    """For each target, the setting of each solver that takes least time to meet it."""
    best: dict[tuple[str, str], tuple[float, str, Any]] = {}

    def attempt(name: str, variant: str, solve: Solve, setting: Any) -> tuple[float, float]:
        nll, seconds = clocked(lambda: solve(cell.given, setting))
        error = distance(nll, truth)
        for target in (each for each in TARGETS if error <= each):
            found = best.get((f"{target:g}", name))
            if found is None or seconds < found[0]:
                best[f"{target:g}", name] = seconds, variant, setting
        return error, seconds

    solve = cell.ours(False)
    for steps in STEPS[:2] if smoke else STEPS:
        error, patience = attempt("ours", "", solve, steps)
        if error <= TARGETS[-1]:
            break
    for name, variants in cell.peers().items():
        for variant, make in [*variants.items()][: 1 if smoke else None]:
            solve = make()
            solve(cell.given, TOLERANCES[0])
            for tolerance in TOLERANCES[:2] if smoke else TOLERANCES:
                error, seconds = attempt(name, variant, solve, tolerance)
                if error <= TARGETS[-1] or seconds > 10 * patience:
                    break
    chosen: Chosen = {f"{target:g}": {} for target in TARGETS}
    for (target, name), (_, *rest) in best.items():
        chosen[target][name] = tuple(rest)
    return chosen


def zuko_of(cell: Cell) -> Callable[[], object]:
    """The densities by zuko's neural spline flow, or samples with them."""
    from zuko.flows import NSF

    flat = cell.given.flatten(1)
    density = NSF(flat.shape[1])()
    if cell.back:
        return torch.no_grad()(partial(density.rsample_and_log_prob, (len(flat),)))
    return torch.no_grad()(partial(density.log_prob, flat))


def measure(
    name: str, model: hosm.ScoreModel, way: str, batch: int, chosen: Chosen | None, smoke: bool
) -> Row:
    """Errors and seconds of each solver at each target."""
    torch.set_num_threads(1)
    cell = cell_of(NETWORKS[name], model, way, batch)
    wide = cell.double()
    truth = wide.ours(False)(wide.given, FINEST)
    found: Row = {"targets": {}}
    if chosen is None and results.installed("torchdiffeq") and not smoke:
        nll = wide.theirs("log σ̂", by_dopri5)(wide.given, LEAST)
        found["doubt"] = distance(nll, truth)
    if chosen is None:
        chosen = search(cell, truth, smoke)
    solvers: dict[tuple[str, str], Solve] = {("ours", ""): cell.ours(False)}
    solvers["compiled", ""] = cell.ours(True)
    routes: dict[Any, Callable[[], object]] = {}
    for target, each in chosen.items():
        every = dict(each)
        if "ours" in every and not smoke:
            every["compiled"] = every["ours"]
        found["targets"][target] = row = {}
        for solver, (variant, given) in every.items():
            key = solver, variant
            if key not in solvers:
                solvers[key] = cell.peers()[solver][variant]()
            nll = solvers[key](cell.given, given)
            row[solver] = {"setting": given, "error": distance(nll, truth)}
            if variant:
                row[solver]["variant"] = variant
            routes[target, solver] = partial(solvers[key], cell.given, given)
    if results.installed("zuko"):
        routes["zuko"] = zuko_of(cell)
        routes["zuko"]()
    once = sum(spent for (spent,) in times(routes, 1).values())
    rounds = 1 if smoke else min(ROUNDS, max(FEWEST, int(LIMIT / once)))
    seconds = times(routes, rounds)
    for target, row in found["targets"].items():
        for solver, each in row.items():
            own = seconds[target, solver]
            each["seconds"] = bootstrap(np.median, own)
            if "compiled" in row:
                each["ratio"] = ratio_of_medians(own, seconds[target, "compiled"])
    if "zuko" in routes:
        found["zuko"] = {"seconds": bootstrap(np.median, seconds["zuko"])}
    return found | {"rounds": rounds, "chosen": chosen}


def curve(model: hosm.ScoreModel, setting: Setting, smoke: bool) -> Row:
    """The least error of our grid and of dopri5 within so many evaluations."""
    cell = cell_of(setting, model, "densities", 2 if smoke else TRACED).double()
    found: Row = {f"{most}": {} for most in WITHIN}
    if not results.installed("torchdiffeq"):
        return found
    truth = cell.theirs("log σ̂", by_dopri5)(cell.given, 1e-2 if smoke else LEAST)
    solvers = [("ours", cell.ours(False), [most - 2 for most in WITHIN])]
    for variable in VARIABLES:
        solvers.append(("dopri5", cell.theirs(variable, by_dopri5), [*TOLERANCES]))
    for name, solve, settings in solvers:
        for each in settings[: 1 if smoke else None]:
            with calls_of(cell.model.network) as sizes:
                error = distance(solve(cell.given, each), truth)
            if len(sizes) > WITHIN[-1]:
                break
            for most in (each for each in WITHIN if len(sizes) <= each):
                row = found[f"{most}"]
                row[name] = min(error, row.get(name, torch.inf))
    return found


def model_of(setting: Setting, smoke: bool) -> hosm.ScoreModel:
    model = trained(setting._replace(steps=2 if smoke else setting.steps)).float()
    return model.eval().requires_grad_(False)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cells", default="", metavar="REGEX", help="default: all")
    options, where = begin(arguments)
    file = {} if options.smoke else results.read(FILE)

    def wanted(cell: str) -> bool:
        return cell not in file and bool(re.search(options.cells, cell))

    def done(cell: str, found: Row) -> None:
        file[cell] = found | {"environment": where}
        keep(options, FILE, {cell: file[cell]})

    for name, setting in CURVES.items():
        if wanted(f"{name}, curve"):
            found = alone(curve, model_of(setting, options.smoke), setting, options.smoke)
            results.show(name, found)
            done(f"{name}, curve", {"within": found})
    models: dict[str, hosm.ScoreModel] = {}
    for batch, way, name in product(BATCHES, WAYS, NETWORKS):
        cell, small = f"{name}, {way}, {batch}", f"{name}, {way}, {BATCHES[0]}"
        if not wanted(cell):
            continue
        if name not in models:
            models[name] = model_of(NETWORKS[name], options.smoke)
        chosen = file[small]["chosen"] if small != cell and small in file else None
        found = alone(measure, name, models[name], way, batch, chosen, options.smoke)
        results.show(cell, found["targets"] | {"zuko": found.get("zuko")})
        done(cell, found)


if __name__ == "__main__":
    main()
