"""Ways to the likelihood of one model: ours, and those of others where they are installed.

Each is called as its users call it, with a setting of its own, steps or a tolerance, and returns
the negative log-likelihood. Those without the exact divergence draw one Rademacher probe a sample.

The solver's error of a random method is what the same probes give at its setting and at a much
finer one, in float64. Averaging over seeds does not reduce it. On the fixed grid the probes are
kept along the path for that, since fresh ones would differ on another grid.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks.peers import flow_matching, k_diffusion, score_sde, torchdiffeq
from benchmarks.trained import Problem

STEPS = (16, 32, 64, 128, 256)
TOLERANCES = (1e-2, 1e-3, 3e-4, 1e-4)
PEER_TOLERANCES = (1e-3, 1e-4, 1e-5)
FRESH, DCT, KEPT = "fixed grid, fresh signs", "fixed grid, fresh dct", "fixed grid, one probe kept"
EXACT, ADAPTIVE = "fixed grid, exact", "adaptive, exact"
RECIPE = "score_sde's recipe (scipy)"
Solve = Callable[[Problem, Tensor, float, int], Tensor]  # problem, x, setting, seed → nll (B,)


class Method(NamedTuple):
    """A way to the likelihood, with settings to be tried from coarse to fine."""

    name: str
    unit: str  # of its settings, "steps" or "tolerance"
    settings: tuple[float, ...]
    solve: Solve
    ours: bool = True
    random: bool = True  # whether its result depends on the seed
    smooth: Solve | None = None  # the same with one probe kept, where it does not keep its own


def fixed(problem: Problem, x: Tensor, steps: float, seed: int, **options: Any) -> Tensor:
    """ode_nll on its fixed grid."""
    generator = torch.Generator().manual_seed(seed)
    given = {"data_std": problem.std, "generator": generator, "steps": int(steps)}
    return hosm.ode_nll(problem.model, x, **given | options).nll


def kept_probe_nll(problem: Problem, x: Tensor, steps: float, seed: int) -> Tensor:
    """ode_nll on its fixed grid, but with one probe kept along the path."""
    generator = torch.Generator().manual_seed(seed)

    def again(*_: Any) -> None:
        generator.manual_seed(seed)

    before = problem.model.network.register_forward_pre_hook(again)
    try:
        return fixed(problem, x, steps, seed, generator=generator)
    finally:
        before.remove()


def adaptive(problem: Problem, x: Tensor, tolerance: float, seed: int) -> Tensor:
    """ode_nll with adaptive steps and the exact divergence."""
    del seed
    options = {"method": "adaptive", "divergence": "exact", "data_std": problem.std}
    return hosm.ode_nll(problem.model, x, tolerance=tolerance, **options).nll


def ours(elements: int, *, exact: bool) -> list[Method]:
    """Ours, those with the exact divergence where it can be paid for."""
    dct = partial(fixed, distribution="dct")
    found = [Method(FRESH, "steps", STEPS if exact else STEPS[1:4], fixed, smooth=kept_probe_nll)]
    if elements > 2:
        several = STEPS if exact else (64,)
        found.append(Method(DCT, "steps", several, dct, smooth=kept_probe_nll))
    found.append(Method(KEPT, "steps", (64,), kept_probe_nll))
    if exact:
        solve = partial(fixed, divergence="exact")
        found.append(Method(EXACT, "steps", STEPS, solve, random=False))
        found.append(Method(ADAPTIVE, "tolerance", TOLERANCES, adaptive, random=False))
    return found


# A peer's package, its solver, and whether it offers the exact divergence.
PEERS: dict[str, tuple[str, Solve, bool]] = {
    RECIPE: ("scipy", score_sde.nll, False),
    "k-diffusion": ("k_diffusion", k_diffusion.nll, False),
    "torchdiffeq": ("torchdiffeq", torchdiffeq.nll, True),
    "flow_matching": ("flow_matching", flow_matching.nll, True),
}


def peers(*, exact: bool) -> Iterator[Method]:
    """Those that are installed, each also with its exact divergence where it has one."""
    several = PEER_TOLERANCES if exact else PEER_TOLERANCES[1:]
    common = partial(Method, unit="tolerance", settings=several, ours=False)
    for name, (package, solve, has_exact) in PEERS.items():
        if importlib.util.find_spec(package) is not None:
            yield common(name, solve=solve)
            if exact and has_exact:
                yield common(f"{name}, exact", solve=partial(solve, exact=True), random=False)
