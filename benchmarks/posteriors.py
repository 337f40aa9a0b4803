"""How close are posteriors of a network and of zuko's spline flow, at equal processor time?

    python -m benchmarks.posteriors [--rows REGEX] [--dirty | --smoke]

θ ~ N(0, I) in ten dimensions or two. A simulator sees pairs (a, b) of the coordinates of a rotated
θ: x = (a + u, b + a² + v/10) with normal u and v, so that the posterior of each pair is a banana.
Its evidence is an integral over a, which a sum over a fine grid gives to rounding.

A row trains by Adam on fresh simulations, in batches of 256, for a minute of a core, simulations
included; the rate falls to zero in that time. One seed, which is not reported, chooses the rate.
`kl` is the mean of log p(θ | x) − log q(θ | x) over the test's pairs: the KL divergence, in the
mean over x. `density` is the time for a thousand densities, in seconds. zuko's flow has its
defaults, or hidden layers like those of ours, which is the network of `benchmarks.densities`.
Scores are those of the simulator, which is not a black box then. The committed results come
from a machine that other loads shared. It takes three quarters of an hour of a core.
"""

import math
import re
import time
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hosm_losses as hosm
from benchmarks import results
from benchmarks.densities import Network
from benchmarks.experiment import Row, begin, clocked, keep, parser, seeded
from benchmarks.intervals import over_seeds

FILE = results.DIRECTORY / "posteriors.json"
NOISE = torch.tensor([1.0, 0.1])
BATCH, EVERY = 256, 100  # EVERY: steps between calls of `learn`
RATES = (1e-3, 3e-3, 1e-2)
SEEDS, SPARE = (0, 1, 2), 3
PLANE = ", d = 2"
ROWS = (
    "zuko",
    "zuko, wider",
    "ours, pairs, times",
    "ours, pairs, times, scores",
    "zuko" + PLANE,
    "ours, pairs, times" + PLANE,
)
Density = Callable[[Tensor, Tensor], Tensor]  # of θ and x, log q(θ | x)


class Size(NamedTuple):
    seconds: float = 60.0  # of training
    test: int = 2000
    width: int = 128
    elements: int = 10  # of θ


@cache
def rotation(elements: int) -> Tensor:
    return torch.linalg.qr(torch.randn(elements, elements, generator=seeded(0))).Q


def curved(theta: Tensor) -> Tensor:
    """What is seen of θ (N, d) without noise, in pairs (N, d/2, 2)."""
    a, b = (theta @ rotation(theta.shape[1]).to(theta)).unflatten(1, (-1, 2)).unbind(-1)
    return torch.stack([a, b + a**2], -1)


def simulate(count: int, elements: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """θ and x, each (N, d)."""
    theta = torch.randn(count, elements, generator=generator)
    seen = curved(theta)
    return theta, (seen + NOISE * torch.randn(seen.shape, generator=generator)).flatten(1)


def log_normal(x: Tensor, std: Tensor | float) -> Tensor:
    return torch.distributions.Normal(torch.zeros_like(x), std).log_prob(x)


def log_joint(theta: Tensor, x: Tensor) -> Tensor:
    """log p(θ, x), (N,)."""
    noise = x.unflatten(1, (-1, 2)) - curved(theta)
    return log_normal(theta, 1.0).sum(1) + log_normal(noise, NOISE.to(theta)).sum((1, 2))


def log_evidence(x: Tensor) -> Tensor:
    """log p(x), (N,), by the trapezoidal rule over a, given which the second part is normal."""
    first, second = x.double().unflatten(1, (-1, 2))[..., None].unbind(2)
    a = torch.linspace(-10, 10, 1001, dtype=torch.float64)
    spread = (1 + NOISE.double() ** 2).sqrt()
    log_seen = log_normal(first - a, NOISE[0]) + log_normal(second - a**2, spread[1])
    return ((log_normal(a, 1.0) + log_seen).logsumexp(-1) + math.log(0.02)).sum(1)


def score(theta: Tensor, x: Tensor) -> Tensor:
    """∇ log p(θ | x) for θ, of a simulator that is known."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(log_joint(theta, x).sum(), theta)[0]


def train(
    seconds: float,
    rate: float,
    network: nn.Module,
    step: Callable[[int, torch.optim.Adam], Tensor],
) -> int:
    """Take steps until so many seconds of this process are spent; the number of them."""
    optimizer, start, steps = torch.optim.Adam(network.parameters()), time.process_time(), 0
    while (share := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * math.cos(math.pi / 2 * share) ** 2
        optimizer.zero_grad()
        step(steps, optimizer).backward()
        optimizer.step()
        steps += 1
    return steps


def ours(row: str, size: Size, rate: float, seed: int) -> tuple[int, Density]:
    """Steps, and log q(θ | x) of a network trained by order one."""
    schedule, draws = hosm.VESchedule(sigma_min=0.003, sigma_max=10.0), seeded(seed)
    d = size.elements
    network = Network(schedule, torch.zeros(d), torch.ones(d), size.width, 2 * d, 0)
    model = hosm.ScoreModel(network, schedule)
    sampler = hosm.AdaptiveTimes()
    objective = hosm.FirstOrderDSM(model, antithetic=True, time_sampler=sampler)

    def batch() -> Row:
        theta, x = simulate(BATCH // 2, d, draws)
        call: Row = {"x0": theta, "model_kwargs": {"y": x}, "generator": draws}
        if "scores" in row:
            call["targets"] = hosm.TargetScores(score(theta, x))
        return call

    def step(count: int, optimizer: torch.optim.Adam) -> Tensor:
        if count % EVERY == EVERY - 1:
            sampler.learn(objective, optimizer=optimizer, **batch())
        return objective(**batch())

    steps = train(size.seconds, rate, model, step)
    model.requires_grad_(False)

    def log_q(theta: Tensor, x: Tensor) -> Tensor:
        solver, kwargs = hosm.FixedGrid(data_std=1.0), {"y": x}
        return -hosm.ode_nll(
            model, theta, solver=solver, divergence="exact", batch_size=250, model_kwargs=kwargs
        ).nll

    return steps, log_q


def zuko_flow(row: str, size: Size, rate: float, seed: int) -> tuple[int, Density]:
    """Steps, and log q(θ | x) of a neural spline flow trained by its likelihood."""
    from zuko.flows import NSF

    wider = {"hidden_features": [size.width] * 3} if "wider" in row else {}
    d = size.elements
    flow, draws = NSF(d, d, **wider), seeded(seed)

    def log_q(theta: Tensor, x: Tensor) -> Tensor:
        return flow(x).log_prob(theta)

    steps = train(size.seconds, rate, flow, lambda *_: -log_q(*simulate(BATCH, d, draws)).mean())
    flow.requires_grad_(False)
    return steps, log_q


def measure(row: str, size: Size, rate: float, seed: int) -> Row:
    """log p(θ | x) − log q(θ | x) at the test's points, and what it took."""
    torch.manual_seed(seed)
    steps, log_q = (zuko_flow if "zuko" in row else ours)(row, size, rate, seed)
    theta, x = simulate(size.test, size.elements, seeded(100))
    found, seconds = clocked(lambda: log_q(theta, x).double())
    off = log_joint(theta.double(), x.double()) - log_evidence(x) - found
    print(row, rate, steps, float(off.mean()), flush=True)
    return {"off": off.tolist(), "steps": steps, "density": 1000 * seconds / len(off)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", default="", metavar="REGEX", help="default: all")
    options, where = begin(arguments)
    spent = Size(0.001, 8, 8) if options.smoke else Size()
    for row in filter(partial(re.search, options.rows), ROWS):
        size = spent._replace(elements=2) if PLANE in row else spent
        searched = [np.mean(measure(row, size, rate, SPARE)["off"]) for rate in RATES]
        rate = RATES[int(np.argmin(searched))]
        seeds = [measure(row, size, rate, seed) for seed in SEEDS]
        found: Row = {"kl": [*over_seeds([seed["off"] for seed in seeds])], "rate": rate}
        found["searched"] = [float(kl) for kl in searched]
        for key in ("steps", "density"):
            found[key] = float(np.mean([seed[key] for seed in seeds]))
        keep(options, FILE, {row: found | {"environment": where}})


if __name__ == "__main__":
    main()
