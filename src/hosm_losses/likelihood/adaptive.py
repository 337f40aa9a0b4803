r"""A Runge-Kutta solver with a separate step size for each sample, used by `Adaptive`.

Purpose:
    The solver integrates dy/ds = f(s, y). The method needs a smooth integrand, so the probes for a
    sample are the same along its whole path.

Formula:
    The method is Tsitouras' 5(4) Runge-Kutta pair. The last stage of a step is also the
    first stage of the next step. The caller computes the error of each step relative to the
    tolerance. A step is accepted if this ratio is at most 1. After a step of size h, the
    size of the next step is h · min(5, max(0.2, 0.9 error^{−1/p})), where p = 5 is the order.
    Samples that have reached the end of the span are no longer evaluated.

Rounding:
    Suppose that the network's outputs are rounded to numbers with a relative spacing of ε. The
    estimated error of a step then includes a rounding error of about 0.2 ε · I, where I is the
    integral of |integrand| over the step. The factor 0.2 is the product of 1/√12 and 0.75: the
    root mean square of the relative rounding error is ε/√12, and the norm of ERROR is 0.75.

    `MAX_EVALUATIONS` allows 1666 steps. Even if the data are one-dimensional, the integral of
    |integrand| over the whole path is about 8 nats. The second solution therefore cannot meet a
    tolerance below 0.001 ε. Its tolerance is a tenth of the first solution's, so the first
    solution's tolerance has to be at least 0.01 ε, which is 1.2e-9 in float32. Only networks with
    outputs near zero can meet tolerances below this bound. The ε of a dtype narrower than float32
    is too large to be used in the bound. For such dtypes, the bound for float32 is used instead.

    In float32 measurements, the smallest tolerance that could be met was between 2e-9 and 3e-8 for
    linear networks, and between 3e-8 and 3e-6 for other networks. Moreover, `solver_error` is
    never below 1e-6 in float32.

Source:
    Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
    assumption", Computers & Mathematics with Applications 62 (2011), table 1; Abramowitz and
    Stegun, "Handbook of Mathematical Functions", 26.7.5, for Student's t-distribution.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import error_message, sum_elements
from hosm_losses.likelihood.divergence import NO_DIVERGENCE
from hosm_losses.likelihood.multistep import combine
from hosm_losses.likelihood.paths import Paths, Span, rounding
from hosm_losses.likelihood.result import Cause, ODESolution, all_finite, solver_limit

NODES = (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0)
# fmt: off
STAGES = (
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159,
     -0.071584973281401, -0.028269050394068383),
    (0.09646076681806523, 0.01, 0.4798896504144996,
     1.379008574103742, -3.290069515436081, 2.324710524099774),
)
ERROR = (
    -0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995,
    -0.1447110071732629, 0.5823571654525552, -0.45808210592918697, 1 / 66,
)
# fmt: on
ORDER = 5  # the error of a step is proportional to h⁵
FIRST_STEP = 0.003
MAX_EVALUATIONS = 10_000
STATE_TOLERANCE = 0.03
FINER = 10  # the second solution divides the tolerance by this number
LEAST_TOLERANCE = 0.01  # in units of ε, see Rounding
# Two signs of kinks: the factor by which the number of evaluations grows at a tenth of the
# tolerance, and the fraction of the evaluations spent on rejected steps. Sharp densities show only
# the first sign, with factors up to 1.85; smooth networks show only the second.
KINK_COST, KINK_REJECTED = 1.45, 0.3
MINIMUM_PATHS = 4
# Coefficients of t/2 − 1 in powers of 1/ν, where t is the quantile of Student's t-distribution
# that corresponds to the normal quantile 2.
STUDENT = (5 / 4, 49 / 32, 183 / 128, 5665 / 6144)
SHRINK, GROW, SAFETY = 0.2, 5.0, 0.9


class AdaptiveSolution(NamedTuple):
    """Solutions of dy/ds = f at the end of the span, with their cost and error."""

    state: Tensor  # y at the end, (B, m), or at the last accepted step after a failure
    evaluations: Tensor  # calls of f that included the sample, (B,), int64
    error: Tensor  # sum of the errors of the accepted steps, (B,)
    cause: Tensor  # the `Cause` of a failure, (B,); 0 without a failure
    rejected: Tensor  # fraction of the evaluations spent on rejected steps, (B,)


def adaptive(
    slope: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    y: Tensor,
    span: tuple[float, float],
    judge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    max_evaluations: int,
) -> AdaptiveSolution:
    """Solve dy/ds = f for increasing s, from y (B, m) at the start of a span to its end.

    `slope(s, y, rows)` returns three tensors: the slope dy/ds, the covector that is passed to
    `judge`, and the cause of a non-finite value (0 if all values are finite). `rows` (n,) holds
    the indices of the samples that have neither reached the end nor failed. The shape of s is
    (n,), and s never leaves the span. The shape of y is (n, m).

    `judge(errors, covector)` receives the errors (n, m) of a step and the covector at the end of
    the step. It returns two numbers per row: the error relative to the tolerance, and the error in
    nats. A step is accepted if its error, relative to the tolerance, is at most 1. The errors in
    nats are summed over the accepted steps.

    A sample fails if its first slope is not finite, if its step size becomes too small, or if it
    needs more than `max_evaluations` evaluations.
    """
    start, end = span
    rows = torch.arange(len(y), device=y.device)
    state, error = y, y.new_zeros(len(y))
    arrived = torch.zeros_like(rows, dtype=torch.bool)
    cause = torch.zeros_like(rows, dtype=torch.uint8)
    s = torch.full((len(y),), start, dtype=y.dtype, device=y.device)
    h = torch.full_like(s, FIRST_STEP * (end - start))
    smallest = (end - start) * 16 * torch.finfo(y.dtype).eps
    (first, _, reason), evaluations = slope(s, y, rows), torch.ones_like(rows)
    rejected = torch.zeros_like(rows)
    stuck = ~torch.isfinite(first.detach()).all(1)  # no step is small enough
    while True:
        reason = reason.masked_fill(reason == 0, Cause.ARRIVAL).masked_fill(~stuck, 0)
        cause = cause.index_copy(0, rows, reason)
        leaving = arrived | stuck
        if bool(leaving.any()):
            state = state.index_copy(0, rows[leaving], y[leaving])
            remaining = ~leaving
            rows, s, h, y, first = (part[remaining] for part in (rows, s, h, y, first))
        if not len(rows):
            share = len(STAGES) * rejected / evaluations
            return AdaptiveSolution(state, evaluations, error, cause, share)
        last = h >= end - s
        h = torch.where(last, end - s, h)
        stages, new, covector, reason = [first], y, y, torch.zeros_like(cause[rows])
        for node, coefficients in zip(NODES[1:], STAGES, strict=True):
            new = y + h[:, None] * combine(coefficients, stages)
            stage, covector, why = slope(torch.clamp(s + node * h, max=end), new, rows)
            stages.append(stage)
            reason = torch.where(reason == 0, why, reason)  # the first of the causes
        size, error_in_nats = judge((h[:, None] * combine(ERROR, stages)).detach(), covector)
        finite = torch.isfinite(size) & torch.isfinite(new.detach()).all(1)
        accepted = finite & (size <= 1)
        evaluations[rows] += len(STAGES)
        rejected[rows] += ~accepted
        keep = accepted[:, None]
        y = torch.where(keep, new, y)
        first = torch.where(keep, stages[-1], first)
        step_error = torch.where(accepted, error_in_nats, torch.zeros_like(error_in_nats))
        error = error.index_add(0, rows, step_error)
        s = torch.where(accepted, torch.where(last, torch.full_like(s, end), s + h), s)
        factor = (SAFETY * size.clamp(min=1e-10) ** (-1 / ORDER)).clamp(SHRINK, GROW)
        h = h * torch.where(finite, factor, torch.full_like(factor, SHRINK))
        arrived = accepted & last
        stuck = ~arrived & ((evaluations[rows] + len(STAGES) > max_evaluations) | (h < smallest))


def solve_adaptive(paths: Paths, z: Tensor, span: Span, *, tolerance: float) -> ODESolution:
    """Solve the ODE over a span, in either direction, with a separate step size for each sample.

    The ODE is solved twice, the second time with a tenth of the tolerance, and the second solution
    is returned. `solver_error` is the larger of two estimates: the difference between the two
    solutions, and the sum of the second solution's step errors. If a path seems to have kinks, its
    step errors are unreliable, so its `solver_error` is tripled. If no divergence is computed,
    only the second solution is computed, and `solver_error` is 0.
    """
    size, probes = z[0].numel(), paths.draw_probes(z)
    if paths.divergence.is_random and probes is None:
        expected = "FixedGrid(steps) with a divergence that draws anew in each evaluation"
        remedy = "An adaptive solver takes such noise for error of its steps."
        raise ValueError(error_message("solver", expected, None, remedy, got="Adaptive"))
    if paths.divergence is NO_DIVERGENCE:  # no density, and no estimate of its error
        fine = _solve(paths, z, span, None, tolerance / FINER)
        end, zero = fine.state[:, :size].reshape(z.shape), torch.zeros_like(fine.error)
        return ODESolution(
            end,
            zero,
            nfe=fine.evaluations,
            solver_error=zero,
            cause=fine.cause,
        )
    paths = paths.at_half_speed()
    with torch.no_grad():
        coarse = _solve(paths, z, span, probes, tolerance)
    fine = _solve(paths, z, span, probes, tolerance / FINER, coarse.cause > 0)
    end, integrals = fine.state[:, :size].reshape(z.shape), fine.state[:, size:]
    coarse_end, coarse_integrals = coarse.state[:, :size].reshape(z.shape), coarse.state[:, size:]
    with torch.no_grad():
        difference = (integrals - coarse_integrals).mean(1)
        difference = difference + _difference_of_ends(paths, end, coarse_end, span)
    kinks = fine.evaluations > KINK_COST * coarse.evaluations
    kinks = kinks & (fine.rejected > KINK_REJECTED)
    solver_error = torch.maximum(difference.abs(), fine.error) * (1 + 2 * kinks)
    standard_error, widening, count = None, 1.0, integrals.shape[1]
    if probes is None:
        standard_error = torch.zeros_like(solver_error)
    elif count >= MINIMUM_PATHS:
        widening = student_factor(count - 1)
        standard_error = widening * integrals.detach().std(1) / count**0.5
    evaluations = fine.evaluations + coarse.evaluations
    return ODESolution(
        end,
        integrals.mean(1),
        nfe=evaluations + (span[1] < span[0]),  # one more in `_difference_of_ends`
        products=evaluations * paths.divergence.products,
        standard_error=standard_error,
        solver_error=solver_error.clamp(min=rounding(paths.dtype)),
        cause=torch.where(coarse.cause == 0, fine.cause, coarse.cause),
        widening=widening,
        kinks=kinks,
    )


def _difference_of_ends(paths: Paths, end: Tensor, coarse_end: Tensor, span: Span) -> Tensor:
    """Return the difference in log-density, (B,), between the end points of two solutions."""
    coordinates = paths.coordinates
    _, level = coordinates.ends(span)
    x = coordinates.to_x(end, level)
    if span[1] > span[0]:
        return paths.log_prior_at(x) - paths.log_prior_at(coordinates.to_x(coarse_end, level))
    covector = coordinates.covector(paths.noise_at(x, level), level)
    return sum_elements(covector * (end - coarse_end), 1)


def _solve(
    paths: Paths,
    z: Tensor,
    span: Span,
    probes: Tensor | None,
    tolerance: float,
    failed: Tensor | None = None,
) -> AdaptiveSolution:
    """Solve the ODE in r = σ̂/(σ̂ + s), where s is the geometric mean of data_std.

    Since u = log σ̂, du = dr/(r (1 − r)). Both ends of the span are finite in r. A step is
    accepted if it meets all of these conditions:

    - Its error in the integral is at most `tolerance` nats.
    - Its error in the state changes the log-density by at most `tolerance` nats.
    - The root mean square of its error in the state is at most 0.03 times `tolerance`.

    Samples that are marked in `failed` (B,) are dropped after one evaluation.
    """
    coordinates, active, elements = paths.coordinates, len(z), z[0].numel()
    rounded = z.new_zeros(active)
    reference = float(sum_elements(coordinates.std.log(), 1).mean()) / paths.dimensions
    low, high = (1 / (1 + math.exp(reference - u)) for u in span)
    sign = 1.0 if high > low else -1.0  # s has to increase, so s is −r if r decreases

    def slope(s: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal active, rounded
        r = sign * s
        paths.advance(active - len(rows))
        active = len(rows)
        level = coordinates.level(torch.logit(r) + reference)
        state = y[:, :elements].reshape(len(y), *z.shape[1:])
        row_probes = None if probes is None else probes[:, rows]
        noise, dz_du, integrand = paths.slope_at(state, level, row_probes, rows)
        if (error := paths.rounding_error(state, integrand.mean(0), level)) is not None:
            rounded = rounded.index_copy(0, rows, torch.maximum(rounded[rows], error))
        dy_du = torch.cat([dz_du.reshape(len(y), -1), integrand.T], 1)
        covector = coordinates.covector(noise.detach(), level).reshape(len(y), -1)
        # If rounding the state alone changes the answer beyond the limit, no step is small enough.
        rounding = torch.finfo(y.dtype).eps * (covector * y[:, :elements].detach()).abs().sum(1)
        hopeless = rounding > solver_limit(paths.dimensions)
        hopeless = hopeless if failed is None else hopeless | failed[rows]
        dy_du = dy_du.masked_fill(hopeless[:, None], math.nan)
        cause = torch.zeros_like(rows, dtype=torch.uint8).masked_fill(hopeless, Cause.ROUNDING)
        cause = cause.masked_fill(~integrand.isfinite().all(0), Cause.DIVERGENCE)
        cause = cause.masked_fill(~all_finite(noise), Cause.OUTPUT)
        return sign * dy_du / (r * (1 - r))[:, None], covector, cause

    def judge(error: Tensor, covector: Tensor) -> tuple[Tensor, Tensor]:
        state, integral = error[:, :elements], error[:, elements:].abs().mean(1)
        by_state = (covector * state).sum(1).abs()
        root_mean_square = (state.square().sum(1) / paths.dimensions).sqrt() / STATE_TOLERANCE
        errors = torch.stack([integral, by_state, root_mean_square])
        return errors.amax(0) / tolerance, integral + by_state

    count = 1 if probes is None else len(probes)
    start = torch.cat([z.reshape(len(z), -1), z.new_zeros(len(z), count)], 1)
    solution = adaptive(slope, start, (sign * low, sign * high), judge, MAX_EVALUATIONS)
    paths.advance(active)
    return solution._replace(error=solution.error + rounded)


def least_tolerance(dtype: torch.dtype) -> float:
    """Return the smallest step_tolerance that rounding in a network of this dtype permits."""
    return LEAST_TOLERANCE * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def student_factor(freedom: int) -> float:
    """Return the factor by which to widen a standard error with ν degrees of freedom.

    After widening, an interval of ±2 standard errors covers the true value with a probability of
    95.45 %. Without the factor, the probability is 86 % for ν = 3. The factor is computed from an
    expansion in 1/ν; for ν = 3, the computed factor is 0.2 % too small.
    """
    return 1 + sum(term / freedom**power for power, term in enumerate(STUDENT, 1))
