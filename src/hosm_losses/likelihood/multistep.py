r"""A uniform grid for dy/ds = f(s, y), and a quadrature of q along the path, which may be noisy.

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

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from hosm_losses._checks import over_elements

BASHFORTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
MOULTON = (9 / 24, 19 / 24, -5 / 24, 1 / 24)
MILNE = 251 / 270
RICHARDSON = 1 / 15
GREGORY = (-1 / 8, 1 / 6, -1 / 24)
START = 3  # steps by the Runge-Kutta method
MINIMUM_STEPS = START + 1
# A solution of n steps takes n + 10: the last node, and three inner stages of each start step.
EXTRA_EVALUATIONS = 1 + 3 * START


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
    y_before, path_error = y, y.new_zeros(len(y))
    for index in range(steps + 1):
        place = 2 * index
        here = node(place, y)
        integrands.append(here.integrand)
        variances.append(here.variance)
        slopes = [here.slope, *slopes[:3]]
        if index >= MINIMUM_STEPS:
            corrected = y_before + h * combine(MOULTON, slopes)
            local = MILNE * (corrected - y)
            path_error = path_error + over_elements(here.covector * local, 1)
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
    quadrature_error = RICHARDSON * (integral - h * combine(_coarse_weights(steps), integrands))
    return MultistepSolution(y, integral, variance, path_error.abs(), quadrature_error.abs())


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
