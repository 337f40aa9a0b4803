r"""An adaptive solver for dy/ds = f(s, y) that gives every sample steps of its own.

Formula:
    The Runge-Kutta pair 5(4) of Tsitouras; the last stage is the first of the next step. A step is
    accepted where its error is at most 1 in the caller's norm, and the next one is
    h · min(5, max(0.2, 0.9 error^{−1/p})), p = 5 the order. Samples that have arrived leave the
    batch.

Source:
    Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
    assumption", Computers & Mathematics with Applications 62 (2011), table 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hosm_losses.likelihood.multistep import combine

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
ORDER = 5  # the error of a step goes as h⁵
FIRST_STEP = 0.05
SHRINK, GROW, SAFETY = 0.2, 5.0, 0.9


class AdaptiveSolution(NamedTuple):
    """What `adaptive` returns."""

    state: Tensor  # y at the end, (B, m); where it failed, as far as it came
    evaluations: Tensor  # calls of f in which the sample took part, (B,), int64
    error: Tensor  # sum of the absolute errors of the accepted steps, (B, m)
    failed: Tensor  # whether the cap was met, the step vanished or a value was not finite, (B,)


def adaptive(
    slope: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    span: tuple[float, float],
    norm: Callable[[Tensor], Tensor],
    max_evaluations: int,
) -> AdaptiveSolution:
    """Solve from y (B, m) at the start of the span to its larger end, never outside it.

    `slope` is dy/ds at (s, y, rows) for the rows (n,) of the batch still on their way, s of shape
    (n,) and y of shape (n, m). `norm` turns the errors (n, m) of a step into numbers (n,),
    acceptable up to 1. A sample fails at `max_evaluations`.
    """
    start, end = span
    rows = torch.arange(len(y), device=y.device)
    state, error = y, torch.zeros_like(y)
    arrived = failed = torch.zeros_like(rows, dtype=torch.bool)
    s = torch.full((len(y),), start, dtype=y.dtype, device=y.device)
    h = torch.full_like(s, FIRST_STEP * (end - start))
    smallest = (end - start) * 16 * torch.finfo(y.dtype).eps
    first, evaluations = slope(s, y, rows), torch.ones_like(rows)
    stuck = ~torch.isfinite(first.detach()).all(1)  # no step is small enough
    while True:
        failed = failed.index_copy(0, rows, stuck)
        leaving = arrived | stuck
        if bool(leaving.any()):
            state = state.index_copy(0, rows[leaving], y[leaving])
            rows, s, h, y, first = (each[~leaving] for each in (rows, s, h, y, first))
        if not len(rows):
            return AdaptiveSolution(state, evaluations, error, failed)
        last = h >= end - s
        h = torch.where(last, end - s, h)
        stages, new = [first], y
        for node, coefficients in zip(NODES[1:], STAGES, strict=True):
            new = y + h[:, None] * combine(coefficients, stages)
            stages.append(slope(torch.clamp(s + node * h, max=end), new, rows))
        local = (h[:, None] * combine(ERROR, stages)).detach().abs()
        size = norm(local)
        finite = torch.isfinite(size) & torch.isfinite(new.detach()).all(1)
        accepted = finite & (size <= 1)
        evaluations[rows] += len(STAGES)
        keep = accepted[:, None]
        y = torch.where(keep, new, y)
        first = torch.where(keep, stages[-1], first)
        error = error.index_add(0, rows, torch.where(keep, local, torch.zeros_like(local)))
        s = torch.where(accepted, torch.where(last, torch.full_like(s, end), s + h), s)
        factor = (SAFETY * size.clamp(min=1e-10) ** (-1 / ORDER)).clamp(SHRINK, GROW)
        h = h * torch.where(finite, factor, torch.full_like(factor, SHRINK))
        arrived = accepted & last
        stuck = ~arrived & ((evaluations[rows] + len(STAGES) > max_evaluations) | (h < smallest))
