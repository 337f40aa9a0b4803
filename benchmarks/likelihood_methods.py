"""Ways to the likelihood of one model: ours, and those of others where they are installed.

Each is called as its users call it, with a setting of its own, steps or a tolerance, and returns
the negative log-likelihood. Those without an exact divergence, or not asked for it, draw one
Rademacher probe a sample.

The solver's error of a random method is what the same probes give at its setting and at a much
finer one, in float64. Averaging over seeds does not reduce it. On the fixed grid the probes are
kept along the path for that, since fresh ones would differ on another grid.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hosm_losses as hosm
from benchmarks.peers import flow_matching, k_diffusion, score_sde, torchdiffeq
from benchmarks.trained import Problem
from hosm_losses.likelihood.inputs import data_coordinates
from hosm_losses.likelihood.ode import _nll
from hosm_losses.likelihood.paths import Paths, solve_fixed
from hosm_losses.model import condition

STEPS = (16, 32, 64, 128, 256)
TOLERANCES = (1e-2, 1e-3, 3e-4, 1e-4)
PEER_TOLERANCES = (1e-3, 1e-4, 1e-5)
FRESH, DCT, KEPT = "fixed grid, fresh signs", "fixed grid, fresh dct", "fixed grid, one probe kept"
EXACT, ADAPTIVE = "fixed grid, exact", "adaptive, exact"
RECIPE = "score_sde's recipe (scipy)"
Solve = Callable[[Problem, Tensor, float, int], Tensor | tuple[Tensor, int]]


class Method(NamedTuple):
    """A way to the likelihood.

    Attributes:
        name: what it is called in the results.
        unit: of its settings, "steps" or "tolerance".
        settings: to be tried, from coarse to fine.
        solve: problem, x, setting, seed → nll (B,), with the evaluations where the network cannot
            count them.
        ours: whether it is ours.
        random: whether its result depends on the seed.
        smooth: the same with one probe kept, for the solver's error; None where it keeps its own.
    """

    name: str
    unit: str
    settings: tuple[float, ...]
    solve: Solve
    ours: bool = True
    random: bool = True
    smooth: Solve | None = None

    def with_one_probe(self, problem: Problem, x: Tensor, setting: float) -> Tensor:
        """The likelihood at a setting with the same probes at every setting, (B,)."""
        return value_of((self.smooth or self.solve)(problem, x, setting, 0))


def value_of(found: Tensor | tuple[Tensor, int]) -> Tensor:
    """The likelihood, without what a method says of its evaluations."""
    return found[0] if isinstance(found, tuple) else found


class KeptProbe(Paths):
    """Paths whose first probes serve at every node."""

    def draw(self, z: Tensor) -> Tensor | None:
        if "kept" not in self.__dict__:
            self.__dict__["kept"] = super().draw(z)
        return self.__dict__["kept"]


def kept_probe_nll(problem: Problem, x: Tensor, steps: float, seed: int) -> Tensor:
    """ode_nll on its fixed grid, but with one probe kept along the path."""
    paths = KeptProbe(
        condition(problem.model, len(x), primitives=False),
        data_coordinates(problem.model, x, 0.0, problem.std),
        x.dtype,
        1,
        "rademacher",
        torch.Generator().manual_seed(seed),
        lambda _: None,
    )
    with torch.no_grad():
        return _nll(paths, x.double(), partial(solve_fixed, steps=int(steps)), None).nll


def fixed(problem: Problem, x: Tensor, steps: float, seed: int, **options: Any) -> Tensor:
    """ode_nll on its fixed grid."""
    generator = torch.Generator().manual_seed(seed)
    given = {"data_std": problem.std, "generator": generator, "steps": int(steps)}
    return hosm.ode_nll(problem.model, x, **given, **options).nll


def adaptive(problem: Problem, x: Tensor, tolerance: float, seed: int) -> Tensor:
    """ode_nll with adaptive steps and the exact divergence."""
    del seed
    options = {"method": "adaptive", "divergence": "exact", "data_std": problem.std}
    return hosm.ode_nll(problem.model, x, tolerance=tolerance, **options).nll


def ours(elements: int, *, exact: bool) -> list[Method]:
    """Ours, those with the exact divergence where it can be paid for."""
    several = STEPS if exact else STEPS[1:4]
    dct = partial(fixed, distribution="dct")
    found = [
        Method(FRESH, "steps", several, fixed, smooth=kept_probe_nll),
        Method(DCT, "steps", STEPS if exact else (64,), dct, smooth=kept_probe_nll),
        Method(KEPT, "steps", (64,), kept_probe_nll),
    ]
    if exact:
        solve = partial(fixed, divergence="exact")
        found.append(Method(EXACT, "steps", STEPS, solve, random=False))
        found.append(Method(ADAPTIVE, "tolerance", TOLERANCES, adaptive, random=False))
    return [method for method in found if elements > 2 or method.name != DCT]


def missing() -> dict[str, str]:
    """The peers that cannot take part, with the reason."""
    packages = {
        RECIPE: "scipy",
        "torchdiffeq": "torchdiffeq",
        "k-diffusion": "k_diffusion",
        "flow_matching": "flow_matching",
        "diffrax": "diffrax",
    }
    found = {
        name: "not installed"
        for name, package in packages.items()
        if importlib.util.find_spec(package) is None
    }
    if "diffrax" not in found and os.environ.get("NPROC") != "1":
        found["diffrax"] = "NPROC is not 1, so that XLA would take every core"
    return found


def diffrax_nll(
    problem: Problem, x: Tensor, tolerance: float, seed: int, **options: Any
) -> tuple[Tensor, int]:
    """That of diffrax, which is imported when it is called, as it imports JAX."""
    from benchmarks.peers import diffrax

    model = problem.model
    inner = getattr(model.network, "network", model.network)
    bare = hosm.ScoreModel(inner, model.schedule)
    return diffrax.nll(bare, x, seed, tolerance, **options)


def compile_seconds(problem: Problem, x: Tensor, *, exact: bool) -> float:
    """What diffrax took to compile for this problem, before anything was timed."""
    from benchmarks.peers import diffrax

    network = problem.model.network.network
    kinds = (False, True) if exact else (False,)
    return sum(diffrax.compiled(network, x.shape, x.dtype, kind)[1] for kind in kinds)


def of_model(
    function: Callable[..., Tensor],
    problem: Problem,
    x: Tensor,
    tolerance: float,
    seed: int,
    **options: Any,
) -> Tensor:
    """A peer in PyTorch."""
    return function(problem.model, x, seed, tolerance, **options)


def peers(*, exact: bool) -> Iterator[Method]:
    """Those that are installed, each also with its exact divergence where it has one."""
    without, several = missing(), PEER_TOLERANCES if exact else PEER_TOLERANCES[1:]
    simple = {RECIPE: score_sde.nll, "k-diffusion": k_diffusion.nll}
    both: dict[str, Solve] = {
        "torchdiffeq": partial(of_model, torchdiffeq.nll),
        "flow_matching": partial(of_model, flow_matching.nll),
        "diffrax": diffrax_nll,
    }
    for name, function in simple.items():
        if name not in without:
            solve = partial(of_model, function)
            yield Method(name, "tolerance", several, solve, ours=False)
    for name, solve in both.items():
        if name in without:
            continue
        yield Method(name, "tolerance", several, solve, ours=False)
        if exact:
            exactly = partial(solve, exact=True)
            yield Method(
                f"{name}, exact", "tolerance", PEER_TOLERANCES, exactly, ours=False, random=False
            )
