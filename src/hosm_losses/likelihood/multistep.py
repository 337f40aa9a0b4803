r"""Method "fixed": a uniform grid in log σ̂, with fresh probes at each node.

What:
    A multistep method for dy/ds = f(s, y), and a quadrature of q along the path, which may be
    noisy. In high dimension the error of the probes is far larger than the solver's. Fresh probes
    at every node average out along the path.

Formula:
    Adams-Bashforth of order four, started by the classical Runge-Kutta method,
        y_{i+1} = y_i + h (55 f_i − 59 f_{i−1} + 37 f_{i−2} − 9 f_{i−3})/24;
    ∫ q ds by the trapezoid rule with Gregory's end corrections, of order four as well,
        weights 3/8, 7/6, 23/24, 1, …, 1, 23/24, 7/6, 3/8.
    The error δ_i of a step is 251/270 of its difference from the Adams-Moulton step through the
    same nodes (Milne), that of ∫ is 1/15 of its difference from every second node (Richardson).
    What the path's error does to the answer is estimated by max_{j≤k} |Σ_{i=j}^k g_iᵀδ_i|, the
    largest sum over a stretch of the path, where g_i is the covector of the node.

Why a stretch:
    δ_i changes its sign along the path. The whole sum is then small, but only as far as g_i is the
    true gradient of the answer, which it is for a network without error alone.

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
from hosm_losses.likelihood.paths import Paths, Solved, solver_limit

BASHFORTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
MOULTON = (9 / 24, 19 / 24, -5 / 24, 1 / 24)
MILNE = 251 / 270
RICHARDSON = 1 / 15
GREGORY = (-1 / 8, 1 / 6, -1 / 24)
START = 3  # steps by the Runge-Kutta method
MINIMUM_STEPS = START + 1
# A solution of n steps takes n + 10: the last node, and three inner stages of each start step.
EXTRA_EVALUATIONS = 1 + 3 * START
# What steps=None chooses from. Below 32 steps the estimate of the error is no guide.
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
    path_error: Tensor  # estimate of what the errors of y do to the answer, (B,)
    quadrature_error: Tensor  # estimate of the error of the integral, if q is smooth, (B,)


def gregory_weights(steps: int) -> list[float]:
    """Weights of the corrected trapezoid rule on steps + 1 nodes, in units of the step."""
    weights = [0.5] + [1.0] * (steps - 1) + [0.5]
    for offset, correction in enumerate(GREGORY):
        weights[offset] += correction
        weights[-1 - offset] += correction
    return weights


def multistep(
    slope: Callable[[int, Tensor], Tensor],
    node: Callable[[int, Tensor], Node],
    y: Tensor,
    h: float,
    steps: int,
) -> MultistepSolution:
    """Take at least four steps of length h, negative to go back, and estimate the errors.

    Places are counted in half steps from the start. `node` is called once at each even place;
    `slope`, which is dy/ds at (place, y), for the inner stages of the start.
    """
    slopes: list[Tensor] = []
    integrands: list[Tensor] = []
    variances: list[Tensor] = []
    y_before, felt = y, y.new_zeros(len(y))
    lowest = highest = felt
    for index in range(steps + 1):
        place = 2 * index
        here = node(place, y)
        integrands.append(here.integrand)
        variances.append(here.variance)
        slopes = [here.slope, *slopes[:3]]
        if index >= MINIMUM_STEPS:
            corrected = y_before + h * combine(MOULTON, slopes)
            local = (MILNE * (corrected - y)).detach()
            felt = felt + over_elements(here.covector * local, 1)
            lowest, highest = torch.minimum(lowest, felt), torch.maximum(highest, felt)
        if index == steps:
            break
        y_before = y
        if index < START:
            second = slope(place + 1, y + h / 2 * slopes[0])
            third = slope(place + 1, y + h / 2 * second)
            fourth = slope(place + 2, y + h * third)
            y = y + h / 6 * (slopes[0] + 2 * second + 2 * third + fourth)
        else:
            y = y + h * combine(BASHFORTH, slopes)
    weights = gregory_weights(steps)
    integral = h * combine(weights, integrands)
    variance = h**2 * combine([weight**2 for weight in weights], variances)
    coarse = h * combine(_coarse_weights(steps), integrands)
    quadrature_error = RICHARDSON * (integral - coarse).detach()
    return MultistepSolution(y, integral, variance, highest - lowest, quadrature_error.abs())


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


def solve_fixed(paths: Paths, z: Tensor, span: tuple[float, float], steps: int) -> Solved:
    """Solve from z at the start of a span of u = log σ̂ on a uniform grid, with fresh probes."""
    batch, coordinates = paths.batch, paths.batch.coordinates
    grid = torch.linspace(*span, 2 * steps + 1, dtype=z.dtype, device=z.device)
    level = coordinates.levels(grid)  # of the nodes, and of the midpoints between them

    def slope(place: int, z: Tensor) -> Tensor:
        here = level(place)
        return coordinates.slope(z, batch.noise(coordinates.to_x(z, here), here), here)

    def node(place: int, z: Tensor) -> Node:
        batch.advance(len(z) / (steps + 1))
        here = level(place)
        noise, moved, integrand = paths.slope_and_integrand(z, here, paths.draw(z))
        seen = integrand.detach()
        variance = seen.var(0) / len(seen) if len(seen) > 1 else torch.zeros_like(seen[0])
        covector = coordinates.covector(noise.detach(), here)
        return Node(moved, integrand.mean(0), variance, covector)

    h = (span[1] - span[0]) / steps
    end, integral, variance, path_error, quadrature_error = multistep(slope, node, z, h, steps)
    nfe = torch.full((len(z),), steps + EXTRA_EVALUATIONS, device=z.device)
    exact = paths.probes == 0
    standard_error = variance.sqrt() if exact or (paths.probes or 0) > 1 else None
    solver_error = path_error + quadrature_error if exact else path_error
    failed = torch.zeros_like(nfe).bool()
    return Solved(end, integral, nfe, standard_error, solver_error, failed, steps)


class ToTolerance:
    """Solves on the coarsest of GRIDS whose solver error on the first batch is within a tolerance.

    The steps that were found are kept for the batches that follow. The processes of a group agree
    after every trial, so that all of them take part in as many. The trials draw no probe, so that
    the numbers are those of `solve_fixed` with these steps.
    """

    def __init__(self, tolerance: float, group: "dist.ProcessGroup | None") -> None:
        self.tolerance = tolerance
        self.group = group
        self.steps: int | None = None

    def __call__(self, paths: Paths, z: Tensor, span: tuple[float, float]) -> Solved:
        """Solve a batch as `solve_fixed` does, the first one on several grids."""
        if self.steps is None:
            if vmapped():
                raise ValueError(
                    "steps: expected a whole number under torch.func.vmap; got None, for which "
                    "errors have to be looked at. Find the steps outside, by a call on a batch."
                )
            with torch.no_grad():
                self.steps = self._found(paths, z, span)
        return solve_fixed(paths, z, span, self.steps)

    def _found(self, paths: Paths, z: Tensor, span: tuple[float, float]) -> int:
        silent = replace(paths.batch, advance=lambda _: None)
        # The path alone costs least. With the exact divergence the quadrature has to do as well.
        kinds = (None, 0) if paths.probes == 0 else (None,)
        largest, lost = math.inf, torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for steps in GRIDS:
            for kind in kinds:
                trial = replace(paths, batch=silent, probes=kind)
                error = solve_fixed(trial, z, span, steps).solver_error
                failed = ~(error <= solver_limit(z[0].numel()))
                largest = self._agreed(_largest(error, failed, lost))
                if largest > self.tolerance:
                    break
            else:
                return steps
            lost = failed
        got = f"{largest:.2g}" if math.isfinite(largest) else "no finite error of any sample"
        warnings.warn(
            f"steps=None: expected a solver_error of at most tolerance={self.tolerance:g} nats "
            f"on a grid of at most {GRIDS[-1]} steps; got {got} there. Give a larger tolerance, "
            "float64 where rounding is in the way, or method='adaptive', and look at the "
            "network's outputs where no error is finite.",
            stacklevel=users_level(),
        )
        return GRIDS[-1]

    def _agreed(self, largest: Tensor) -> float:
        if self.group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return float(largest)


def _largest(error: Tensor, failed: Tensor, lost: Tensor) -> Tensor:
    """The largest error, () of a batch; a sample that failed and was lost before does not count.

    Infinite where another sample failed, and where all of them are lost.
    """
    counted = error.masked_fill(failed, math.inf).masked_fill(failed & lost, 0.0)
    return counted.max().masked_fill((failed & lost).all(), math.inf)
