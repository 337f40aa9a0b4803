r"""A uniform grid in log σ̂ with fresh probes at each node, for `FixedGrid` and `ToTolerance`.

It solves dy/ds = f(s, y), with a quadrature of q along the path, which may be noisy: in high
dimension the error of the probes is far larger than the solver's, and fresh ones average out.

Formula:
    Adams-Bashforth of order four, started by the classical Runge-Kutta method,
        y_{i+1} = y_i + h (55 f_i − 59 f_{i−1} + 37 f_{i−2} − 9 f_{i−3})/24;
    ∫ q ds by the trapezoid rule with Gregory's end corrections, of order four as well,
        weights 3/8, 7/6, 23/24, 1, …, 1, 23/24, 7/6, 3/8.
    The error δ_i of a step is 251/270 of its difference from the Adams-Moulton step through the
    same nodes (Milne), that of ∫ is 1/15 of its difference from every second node (Richardson).
    What the path's error does to the answer is estimated by p = max_{j≤k} |Σ_{i=j}^k g_iᵀδ_i|, the
    largest sum over a stretch of the path, where g_i is the covector of the node.
    A companion is the path with half the steps and the same probes. With P its p, D the difference
    of both answers, ∫ taken over every second node in both, r = (Σ_i (g_iᵀδ_i)²)^(1/2) and
    m = P / 32p, the estimate is
        max(r · clamp(m, 1/2, 7/5), D/8 · min(1, 1/m)⁴),
    and p where D is not finite. m is 1/2 where the companion resolves the path. Where it is large
    D says little, and errors add up to r or more. The constants do in benchmarks/coverage.py.

Why a stretch:
    δ_i changes its sign along the path. The whole sum is then small, but only as far as g_i is the
    true gradient of the answer, which it is for a network without error alone. Where the path
    stretches an error a hundred times on its way, no sum of local errors tells; a companion does.

Source:
    Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", II.1, III.1, III.9;
    Davis and Rabinowitz, "Methods of Numerical Integration", 2.9, for Gregory's rule.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from hosm_losses._checks import over_elements, warn
from hosm_losses._torch_internals import vmapped
from hosm_losses.likelihood.paths import Batch, NoiseLevel, Solved, Span
from hosm_losses.likelihood.result import solver_limit

BASHFORTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
MOULTON = (9 / 24, 19 / 24, -5 / 24, 1 / 24)
MILNE = 251 / 270
RICHARDSON = 1 / 15
GREGORY = (-1 / 8, 1 / 6, -1 / 24)
START = 3  # steps by the Runge-Kutta method
MINIMUM_STEPS = START + 1
# A solution of n steps takes n + 10: the last node, and three inner stages of each start step.
EXTRA_EVALUATIONS = 1 + 3 * START
# What ToTolerance chooses from. Below 32 steps the estimate of the error is no guide.
GRIDS = (32, 64, 128, 256, 512, 1024)


class Node(NamedTuple):
    """What is known at a node of the fixed grid."""

    slope: Tensor  # dy/ds, of the shape of y
    integrand: Tensor  # q, (B,), integrated along the path
    variance: Tensor  # of q as an estimate, (B,); 0 if it is exact
    covector: Tensor  # what a small error of y is multiplied with to be felt in the answer


def gregory_weights(steps: int) -> list[float]:
    """Weights of the corrected trapezoid rule on steps + 1 nodes, in units of the step."""
    weights = [0.5] + [1.0] * (steps - 1) + [0.5]
    for offset, correction in enumerate(GREGORY):
        weights[offset] += correction
        weights[-1 - offset] += correction
    return weights


class Walk:
    """The multistep method on its way: `y` at the node that is due, at last the state at the end.

    Places are counted in half steps of the finest walk from the start; `stride` is a half step.
    """

    def __init__(
        self, slope: Callable[[int, Tensor], Tensor], y: Tensor, h: float, steps: int, stride: int
    ) -> None:
        self.slope, self.h, self.steps, self.stride = slope, h, steps, stride
        self.y = self.before = y
        self.felt = self.lowest = self.highest = self.squares = y.new_zeros(len(y))
        self.slopes: list[Tensor] = []
        self.integrands: list[Tensor] = []
        self.variances: list[Tensor] = []

    def arrive(self, here: Node) -> None:
        """Take in what is known at the node that is due, and step to the next one if there is."""
        index, y, h = len(self.integrands), self.y, self.h
        self.integrands.append(here.integrand)
        self.variances.append(here.variance)
        self.slopes = slopes = [here.slope, *self.slopes[:3]]
        if index >= MINIMUM_STEPS:
            corrected = self.before + h * combine(MOULTON, slopes)
            local = (MILNE * (corrected - y)).detach()
            felt = over_elements(here.covector * local, 1)
            self.felt, self.squares = self.felt + felt, self.squares + felt.square()
            self.lowest = torch.minimum(self.lowest, self.felt)
            self.highest = torch.maximum(self.highest, self.felt)
        if index == self.steps:
            return
        self.before = y
        if index < START:
            place = 2 * self.stride * index
            second = self.slope(place + self.stride, y + h / 2 * slopes[0])
            third = self.slope(place + self.stride, y + h / 2 * second)
            fourth = self.slope(place + 2 * self.stride, y + h * third)
            self.y = y + h / 6 * (slopes[0] + 2 * second + 2 * third + fourth)
        else:
            self.y = y + h * combine(BASHFORTH, slopes)

    def integral(self, weights: Sequence[float]) -> Tensor:
        """∫ q ds by a rule, (B,)."""
        return self.h * combine(weights, self.integrands)

    def finish(self) -> Self:
        """Put together what is known at the end."""
        weights = gregory_weights(self.steps)
        self.whole = self.integral(weights)
        self.coarse = self.integral(_coarse_weights(self.steps))  # from every second node
        # Of the integral, from those of the nodes.
        self.variance = self.h**2 * combine([each**2 for each in weights], self.variances)
        self.path_error = self.highest - self.lowest  # p
        self.spread = self.squares.sqrt()  # r
        return self

    @property
    def quadrature_error(self) -> Tensor:
        """Estimate of the error of the integral, if q is smooth, (B,)."""
        return RICHARDSON * (self.whole - self.coarse).detach().abs()


def multistep(
    slope: Callable[[int, Tensor], Tensor],
    node: Callable[[int, Tensor], Node],
    y: Tensor,
    h: float,
    steps: int,
    companion: bool = False,
) -> tuple[Walk, Walk | None]:
    """Take at least four steps of length h, negative to go back, and estimate the errors.

    Places are counted in half steps from the start. `node` is called once at each even place;
    `slope`, which is dy/ds at (place, y), for the inner stages of the start. A companion takes
    half as many steps, without a graph; `node` is called for it right after, at the same place.
    """
    walk = Walk(slope, y, h, steps, 1)
    other = Walk(slope, y.detach(), 2 * h, steps // 2, 2) if companion else None
    for index in range(steps + 1):
        walk.arrive(node(2 * index, walk.y))
        if other is not None and index % 2 == 0:
            with torch.no_grad():
                other.arrive(node(2 * index, other.y))
    return walk.finish(), None if other is None else other.finish()


def combine(coefficients: Sequence[float], slopes: list[Tensor]) -> Tensor:
    """Σ_i c_i f_i, also for the stages of another method."""
    total = coefficients[0] * slopes[0]
    for coefficient, slope in zip(coefficients[1:], slopes[1:], strict=True):
        total = total + coefficient * slope
    return total


def _coarse_weights(steps: int) -> list[float]:
    """The same rule on every second node; where steps is odd the last step is integrated alone."""
    weights = [0.0] * (steps + 1)
    weights[: steps + 1 - steps % 2 : 2] = [2 * weight for weight in gregory_weights(steps // 2)]
    if steps % 2:
        for offset, weight in enumerate(MOULTON):
            weights[-1 - offset] += weight
    return weights


def solve_fixed(
    batch: Batch, z: Tensor, span: Span, steps: int, companion: bool = False
) -> Solved:
    """Solve from z at the start of a span of u = log σ̂ on a uniform grid, with fresh probes.

    A companion is for the way from data to latents, at whose end the prior is.
    """
    coordinates, divergence = batch.coordinates, batch.divergence
    grid = torch.linspace(*span, 2 * steps + 1, dtype=z.dtype, device=z.device)
    levels = coordinates.levels(grid)  # of the nodes, and of the midpoints between them
    count = steps + EXTRA_EVALUATIONS
    count += steps // 2 + EXTRA_EVALUATIONS if companion else 0

    def slope(place: int, z: Tensor) -> Tensor:
        here = levels(slice(place, place + 1))
        return coordinates.slope(z, batch.noise(coordinates.to_x(z, here), here), here)

    @lru_cache(1)  # a companion shares them
    def probes_of(_place: int) -> Tensor | None:
        batch.advance(len(z) / (steps + 1))
        return batch.draw_probes(z)

    def node(place: int, z: Tensor) -> Node:
        here = levels(slice(place, place + 1))
        noise, moved, integrand = batch.derivatives(z, here, probes_of(place))
        seen = integrand.detach()
        variance = seen.var(0) / len(seen) if len(seen) > 1 else torch.zeros_like(seen[0])
        covector = coordinates.covector(noise.detach(), here)
        return Node(moved, integrand.mean(0), variance, covector)

    h = (span[1] - span[0]) / steps
    found, other = multistep(slope, node, z, h, steps, companion)
    known = divergence == "exact" or (divergence is not None and divergence.count > 1)
    solver_error = found.path_error
    if other is not None:
        with torch.no_grad():
            solver_error = _guarded(batch, found, other, coordinates.ends(span)[1])
    if divergence == "exact":
        solver_error = solver_error + found.quadrature_error
    nfe, standard_error = torch.full((len(z),), count, device=z.device), found.variance.sqrt()
    errors = (standard_error if known else None, solver_error, torch.zeros_like(nfe).bool())
    return Solved(found.y, found.whole, nfe, *errors, steps)


def _guarded(batch: Batch, found: Walk, companion: Walk, far: NoiseLevel) -> Tensor:
    """The estimate of the path's error from a solution and its companion, that end at a level."""
    own, other = (
        batch.log_prior_at(batch.coordinates.to_x(each.y, far)) for each in (found, companion)
    )
    difference = (own - other + found.coarse - companion.whole).abs()
    return _estimate(found.path_error, found.spread, companion.path_error, difference)


def _estimate(path: Tensor, spread: Tensor, companion: Tensor, difference: Tensor) -> Tensor:
    """By the p and r of a path, the p of its companion and the difference of their answers."""
    m = torch.where(path > 0, companion / (32 * path), 0.5)
    by_difference = difference / 8 / m.clamp(min=1).pow(4)
    guarded = torch.maximum(spread * m.clamp(0.5, 1.4), by_difference)
    return torch.where(guarded.isfinite(), guarded, path)


def refuse_vmap(solver: str) -> None:
    """Raise ValueError under torch.func.vmap."""
    if vmapped():
        raise ValueError(
            f"solver: expected FixedGrid(steps) under torch.func.vmap; got {solver}, which looks "
            "at errors. Call it on a batch outside, and give FixedGrid the steps of the result."
        )


def fewest_steps(
    batch: Batch,
    z: Tensor,
    span: Span,
    *,
    tolerance: float,
    group: "dist.ProcessGroup | None",
    companion: bool,
) -> int:
    """The coarsest of GRIDS whose solver error on a batch is within a tolerance.

    Processes of a group agree after every trial, so that all take part in as many. Trials leave
    the generator alone. A sample that failed, and was lost on the grid before, does not count.
    """
    refuse_vmap("ToTolerance")
    # The path alone costs least. What is claimed of a quadrature has to do as well; a companion's
    # has random probes, which the trials draw from a generator of their own.
    whole = companion or batch.divergence == "exact"
    own = torch.Generator(z.device).manual_seed(0) if companion else None
    silent = replace(batch, advance=lambda _: None, generator=own)
    largest, lost = math.inf, torch.zeros(len(z), dtype=torch.bool, device=z.device)
    for steps in GRIDS:
        for kind in (None, batch.divergence) if whole else (None,):
            trial = replace(silent, divergence=kind)
            with torch.no_grad():
                error = solve_fixed(trial, z, span, steps, companion).solver_error
            failed = ~(error <= solver_limit(z[0].numel()))
            error = error.masked_fill(failed, math.inf).masked_fill(failed & lost, -math.inf)
            most = error.max()  # infinite where a sample failed; −∞ where none counts
            if group is not None:
                dist.all_reduce(most, dist.ReduceOp.MAX, group)
            largest = math.inf if most < 0 else float(most)
            if largest > tolerance:
                break
        else:
            return steps
        lost = failed
    got = f"{largest:.2g}" if math.isfinite(largest) else "no finite error of any sample"
    warn(
        f"solver: expected a solver_error of at most {tolerance:g} nats on a grid of at most "
        f"{GRIDS[-1]} steps; got {got} there. Give ToTolerance a larger tolerance, float64 where "
        "rounding is in the way, or take Adaptive(), and look at the network's outputs where no "
        "error is finite."
    )
    return GRIDS[-1]
