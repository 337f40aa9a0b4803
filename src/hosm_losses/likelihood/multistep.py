r"""A fixed grid for dy/ds = f(s, y), and a quadrature along the path.

What:
    The whole batch shares a uniform grid. The number of evaluations is known in advance, nothing
    waits for the device, and q may be noisy: it does not steer.

Formula:
    Adams-Bashforth of order four, started by the classical Runge-Kutta method,
        y_{i+1} = y_i + h (55 f_i − 59 f_{i−1} + 37 f_{i−2} − 9 f_{i−3})/24;
    ∫ q ds by the trapezoid rule with Gregory's end corrections, of order four as well,
        weights 3/8, 7/6, 23/24, 1, …, 1, 23/24, 7/6, 3/8.
    The error of a step is 251/270 of its difference from the Adams-Moulton step through the same
    nodes (Milne), that of ∫ is 1/15 of its difference from every second node (Richardson).

Source:
    Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", II.1, III.1, III.9;
    Davis and Rabinowitz, "Methods of Numerical Integration", 2.9, for Gregory's rule.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hosm_losses._checks import over_elements

BASHFORTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
MOULTON = (9 / 24, 19 / 24, -5 / 24, 1 / 24)
MILNE = 251 / 270
RICHARDSON = 1 / 15
GREGORY = (-1 / 8, 1 / 6, -1 / 24)
START = 3
MINIMUM_STEPS = START + 1


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
    path_error: Tensor  # first-order estimate of what the errors of y do to the answer, (B,)
    quadrature_error: Tensor  # estimate of the error of the integral, if q is smooth, (B,)


def multistep_evaluations(steps: int) -> int:
    """Evaluations of `multistep`: one a node, and three more a Runge-Kutta start step."""
    return steps + 1 + 3 * START


def gregory_weights(steps: int) -> list[float]:
    """Weights of the corrected trapezoid rule on steps + 1 nodes, in units of the step."""
    weights = [0.5] + [1.0] * (steps - 1) + [0.5]
    for offset, correction in enumerate(GREGORY):
        weights[offset] += correction
        weights[-1 - offset] += correction
    return weights


def multistep(
    slope: Callable[[float, Tensor], Tensor],
    node: Callable[[float, Tensor], Node],
    y: Tensor,
    span: tuple[float, float],
    steps: int,
) -> MultistepSolution:
    """Solve on a uniform grid of at least four steps, and estimate the errors on the way.

    `slope` is dy/ds at (s, y), for the inner stages of the start; `node` is called once a node.
    The end of the span may be the smaller.
    """
    start, end = span
    h = (end - start) / steps
    fine, coarse = gregory_weights(steps), _coarse_weights(steps)
    slopes: list[Tensor] = []
    y_before = y
    integral = variance = path_error = difference = y.new_zeros(len(y))
    for index in range(steps + 1):
        s = start + index * h if index < steps else end
        here = node(s, y)
        integral = integral + h * fine[index] * here.integrand
        difference = difference + h * (fine[index] - coarse[index]) * here.integrand
        variance = variance + (h * fine[index]) ** 2 * here.variance
        slopes = [here.slope, *slopes[:3]]
        if index >= MINIMUM_STEPS:
            corrected = y_before + h * combine(MOULTON, slopes)
            local = MILNE * (corrected - y)
            path_error = path_error + over_elements(here.covector * local, 1)
        if index == steps:
            break
        y_before = y
        if index < START:
            second = slope(s + h / 2, y + h / 2 * slopes[0])
            third = slope(s + h / 2, y + h / 2 * second)
            fourth = slope(s + h, y + h * third)
            y = y + h / 6 * (slopes[0] + 2 * second + 2 * third + fourth)
        else:
            y = y + h * combine(BASHFORTH, slopes)
    quadrature_error = RICHARDSON * difference.abs()
    return MultistepSolution(y, integral, variance, path_error.abs(), quadrature_error)


def combine(coefficients: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
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
