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
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hosm_losses._checks import over_elements, users_level
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


class MultistepSolution(NamedTuple):
    """What `multistep` returns."""

    state: Tensor  # y at the end
    integral: Tensor  # ∫ q ds, (B,)
    variance: Tensor  # of the integral, from those of the nodes, (B,)
    path_error: Tensor  # estimate of what the errors of y do to the answer, p, (B,)
    spread: Tensor  # root of the sum of squares of what each does by itself, r, (B,)
    coarse: Tensor  # ∫ q ds from every second node, (B,)
    companion: "MultistepSolution | None" = None

    @property
    def quadrature_error(self) -> Tensor:
        """Estimate of the error of the integral, if q is smooth, (B,)."""
        return RICHARDSON * (self.integral - self.coarse).detach().abs()


def gregory_weights(steps: int) -> list[float]:
    """Weights of the corrected trapezoid rule on steps + 1 nodes, in units of the step."""
    weights = [0.5] + [1.0] * (steps - 1) + [0.5]
    for offset, correction in enumerate(GREGORY):
        weights[offset] += correction
        weights[-1 - offset] += correction
    return weights


class _Walk:
    """The multistep method on its way: `y` at the node that is due.

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

    def solution(self) -> MultistepSolution:
        """What is known at the end."""
        weights, h = gregory_weights(self.steps), self.h
        return MultistepSolution(
            state=self.y,
            integral=h * combine(weights, self.integrands),
            variance=h**2 * combine([weight**2 for weight in weights], self.variances),
            path_error=self.highest - self.lowest,
            spread=self.squares.sqrt(),
            coarse=h * combine(_coarse_weights(self.steps), self.integrands),
        )


def multistep(
    slope: Callable[[int, Tensor], Tensor],
    node: Callable[[int, Tensor], Node],
    y: Tensor,
    h: float,
    steps: int,
    companion: bool = False,
) -> MultistepSolution:
    """Take at least four steps of length h, negative to go back, and estimate the errors.

    Places are counted in half steps from the start. `node` is called once at each even place;
    `slope`, which is dy/ds at (place, y), for the inner stages of the start. A companion takes
    half as many steps, without a graph; `node` is called for it right after, at the same place.
    """
    walk = _Walk(slope, y, h, steps, 1)
    other = _Walk(slope, y.detach(), 2 * h, steps // 2, 2) if companion else None
    for index in range(steps + 1):
        walk.arrive(node(2 * index, walk.y))
        if other is not None and index % 2 == 0:
            with torch.no_grad():
                other.arrive(node(2 * index, other.y))
    return walk.solution()._replace(companion=None if other is None else other.solution())


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
    batch: Batch, z: Tensor, span: Span, *, steps: int, companion: bool = False
) -> Solved:
    """Solve from z at the start of a span of u = log σ̂ on a uniform grid, with fresh probes.

    A companion is for the way from data to latents, at whose end the prior is.
    """
    coordinates, divergence = batch.coordinates, batch.divergence
    grid = torch.linspace(*span, 2 * steps + 1, dtype=z.dtype, device=z.device)
    level = coordinates.levels(grid)  # of the nodes, and of the midpoints between them
    count = steps + EXTRA_EVALUATIONS
    count += steps // 2 + EXTRA_EVALUATIONS if companion else 0
    drawn: dict[int, Tensor | None] = {}  # of the place that is due

    def slope(place: int, z: Tensor) -> Tensor:
        here = level(place)
        return coordinates.slope(z, batch.noise(coordinates.to_x(z, here), here), here)

    def node(place: int, z: Tensor) -> Node:
        if place not in drawn:
            drawn.clear()
            drawn[place] = batch.draw_probes(z)
            batch.advance(len(z) / (steps + 1))
        here = level(place)
        noise, moved, integrand = batch.derivatives(z, here, drawn[place])
        seen = integrand.detach()
        variance = seen.var(0) / len(seen) if len(seen) > 1 else torch.zeros_like(seen[0])
        covector = coordinates.covector(noise.detach(), here)
        return Node(moved, integrand.mean(0), variance, covector)

    h = (span[1] - span[0]) / steps
    found = multistep(slope, node, z, h, steps, companion)
    known = divergence == "exact" or (divergence is not None and divergence.count > 1)
    solver_error = found.path_error
    if found.companion is not None:
        with torch.no_grad():
            solver_error = _guarded(batch, found, found.companion, coordinates.ends(span)[1])
    if divergence == "exact":
        solver_error = solver_error + found.quadrature_error
    return Solved(
        found.state,
        found.integral,
        nfe=torch.full((len(z),), count, device=z.device),
        standard_error=found.variance.sqrt() if known else None,
        solver_error=solver_error,
        failed=torch.zeros(len(z), dtype=torch.bool, device=z.device),
        steps=steps,
    )


def _guarded(
    batch: Batch, found: MultistepSolution, companion: MultistepSolution, far: NoiseLevel
) -> Tensor:
    """The estimate of the path's error from a solution and its companion, that end at a level."""
    ends = (batch.coordinates.to_x(each.state, far) for each in (found, companion))
    own, other = map(batch.log_prior_at, ends)
    difference = (own - other + found.coarse - companion.integral).abs()
    return _estimate(found, companion.path_error, difference)


def _estimate(found: MultistepSolution, companion: Tensor, difference: Tensor) -> Tensor:
    """By the path, the p of its companion and the difference of their answers."""
    path = found.path_error
    m = torch.where(path > 0, companion / (32 * path), 0.5)
    by_difference = difference / 8 / m.clamp(min=1).pow(4)
    guarded = torch.maximum(found.spread * m.clamp(0.5, 1.4), by_difference)
    return torch.where(guarded.isfinite(), guarded, path)


class FewestSteps:
    """Solves on the coarsest of GRIDS whose solver error on the first batch is within a tolerance.

    The steps found are kept for later batches. Processes of a group agree after every trial, so
    that all take part in as many. Trials leave the generator alone: the numbers are those of
    `solve_fixed`.
    """

    def __init__(
        self, tolerance: float, group: "dist.ProcessGroup | None", companion: bool
    ) -> None:
        self.tolerance, self.group, self.companion = tolerance, group, companion
        self.steps: int | None = None

    def __call__(self, batch: Batch, z: Tensor, span: Span) -> Solved:
        """Solve a batch as `solve_fixed` does, the first one on several grids."""
        if self.steps is None:
            if vmapped():
                raise ValueError(
                    "solver: expected FixedGrid(steps) under torch.func.vmap; got ToTolerance, "
                    "which looks at errors. Find the steps outside, by a call on a batch."
                )
            with torch.no_grad():
                self.steps = self._find(batch, z, span)
        return solve_fixed(batch, z, span, steps=self.steps, companion=self.companion)

    def _find(self, batch: Batch, z: Tensor, span: Span) -> int:
        # The path alone costs least. What is claimed of a quadrature has to do as well; a
        # companion's has random probes, which the trials draw from a generator of their own.
        whole = self.companion or batch.divergence == "exact"
        kinds = (None, batch.divergence) if whole else (None,)
        own = torch.Generator(z.device).manual_seed(0) if self.companion else None
        silent = replace(batch, advance=lambda _: None, generator=own)
        largest, lost = math.inf, torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for steps in GRIDS:
            for kind in kinds:
                trial = replace(silent, divergence=kind)
                solved = solve_fixed(trial, z, span, steps=steps, companion=self.companion)
                error = solved.solver_error
                failed = ~(error <= solver_limit(z[0].numel()))
                largest = self._agreed(_largest(error, failed, lost))
                if largest > self.tolerance:
                    break
            else:
                return steps
            lost = failed
        got = f"{largest:.2g}" if math.isfinite(largest) else "no finite error of any sample"
        warnings.warn(
            f"solver: expected a solver_error of at most {self.tolerance:g} nats on a grid of at "
            f"most {GRIDS[-1]} steps; got {got} there. Give ToTolerance a larger tolerance, "
            "float64 where rounding is in the way, or take Adaptive(), and look at the "
            "network's outputs where no error is finite.",
            stacklevel=users_level(),
        )
        return GRIDS[-1]

    def _agreed(self, largest: Tensor) -> float:
        if self.group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        found = float(largest)
        return math.inf if found < 0 else found  # no sample of any process counts


def _largest(error: Tensor, failed: Tensor, lost: Tensor) -> Tensor:
    """The largest error, () of a batch; a sample that failed and was lost before does not count.

    Infinite where another sample failed, and −∞, below all of other processes, where none counts.
    """
    return error.masked_fill(failed, math.inf).masked_fill(failed & lost, -math.inf).max()
