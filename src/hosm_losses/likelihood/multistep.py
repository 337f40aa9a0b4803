r"""A solver that uses one grid for the whole batch and draws fresh probes at each node.

This solver solves dy/du = f(u, y) and integrates q along the path. The integrand q may be noisy:
in high dimensions, random probes cause a far larger error than the solver does. Fresh probes are
drawn at each node, so the errors due to the probes average out along the path.

Grid:
    The nodes u(i/n) are evenly spaced in s = i/n, with step size h = 1/n. The density of the nodes
    in u = log σ̂ is an equal mixture of two distributions, both truncated to the range of u:

    - the uniform distribution;
    - the logistic distribution with scale WIDTH, centred at the log of the root mean square of
      data_std.

    A network that predicts the velocity of a linear flow is smooth in the flow's time,
    σ̂/(1 + σ̂). For such a network, the nodes are evenly spaced in r, which is defined by
        σ̂/(c + σ̂) = r² (2 − r²),    c/(c + σ̂) = (1 − r²)²,
    where c is the root mean square of data_std. At the data end, the steps in the flow's time are
    short because the solver of `ode_nll` starts there with methods of low order. At the noise end,
    they are short because the network may depend on log σ̂, which changes fast there.

Formula:
    The Adams-Bashforth predictor of order k computes ŷ, and the Adams-Moulton corrector computes
    y. With the backward differences ∇f_i = f_i − f_{i−1}, ∇²f_i = ∇f_i − ∇f_{i−1}, …,
        ŷ_{i+1} = y_i + h Σ_{j<k} γ_j ∇ʲf_i,
        y_{i+1} = ŷ_{i+1} + h γ_k ∇ᵏf_{i+1},
        γ = 1, 1/2, 5/12, 3/8, 251/720, 95/288.
    f_i is the slope dy/ds at ŷ_i. ∫ q ds is computed with the trapezoid rule and Gregory's end
    corrections up to fourth differences. The order of this corrected rule is six.

Order:
    The order k is 4 if there are fewer than 64 steps, and 5 otherwise. Evaluating f at ŷ limits
    the method's stability. For a decaying linear slope f = λ y, the method is stable only if −h λ
    is below 0.165 at order four, or below 0.09 at order five. Unstable solutions oscillate from
    node to node. A sample's next step therefore uses order four if both ∇³f and ∇⁴f reverse
    direction, that is, if the scalar product of each with its value at the previous node is
    negative.

    On the mesh for velocities, k is 5 if there are at least 36 steps. With k = 5 and fewer than
    64 steps, each step is a weighted average of the steps of orders five and four. The weight of
    the step of order five is 1/(1 + (‖∇⁴f‖/(¾ ‖∇³f‖))⁴). On this mesh, a bend in a path spans
    only a few nodes. Wherever ∇⁴f is at least as large as ∇³f, order five is less accurate than
    order four. As long as the order stays the same, the errors of a path's steps nearly cancel. A
    sudden change of order adds an error, so the weight varies continuously. If the factor ¾ were
    replaced by 1, the errors for two of nine mixtures (exact networks, 40 steps) would be three
    times those of the order-four method.

Start:
    - The first steps use methods of lower order; the first predictor is Euler's method.
    - Node 1 is evaluated a second time, at the corrected state y₁.
    - At order five, the states at nodes 2 to 4 are predicted with methods of lower order. The
      slopes at these nodes are therefore corrected without another evaluation: λ (y_i − ŷ_i) is
      added to f_i. Here, λ = c₁ᵀ Δf₁/‖c₁‖² is the secant slope at node 1, where c₁ = y₁ − ŷ₁ and
      Δf₁ is the change in f from ŷ₁ to y₁. Without these corrections, the error of a path that
      starts outside a narrow data distribution can reach 3.6 times the error at order four.
    - y₄ is recomputed with Boole's rule, which has order six:
          y₄ = y₀ + h (14 f₀ + 64 f₁ + 24 f₂ + 64 f₃ + 14 f₄)/45
             = y₀ + h (4 f₄ − 8 ∇f₄ + 20/3 ∇²f₄ − 8/3 ∇³f₄ + 14/45 ∇⁴f₄).
    - If σ̂ at the start of a path is close to the data's scale, the state changes noticeably
      in the first steps. The path then begins with two steps of the classical Runge-Kutta method.
      Node 3, the first predicted node, is then evaluated twice, and node 1 only once.

Error of the path:
    Let g be the gradient of the log-density with respect to y, and let c_i = y_i − ŷ_i be the
    correction. The error of the step to node i changes the log-density by
        e_i = g_iᵀ γ* h ∇ᵏ⁺¹f_i + (g_i − g_{i−1})ᵀ c_i,    γ* = 3/160 or 863/60480.
    The first part of e_i comes from the next term in the corrector's series of backward
    differences, and is omitted if i ≤ k. The second part arises because f and q are evaluated at
    ŷ_i instead of y_i. Its formula follows from dg/ds = −(∂f/∂y)ᵀ g − ∇q. The path's error is
    estimated as the largest absolute sum of the e_i over any stretch of the path,
        p = max_{j≤m} |Σ_{i=j}^m e_i|.

    In this estimate, g at each node is replaced by the node's covector, which is the network's
    score. The error of the score is the network's error divided by σ̂. Near the data, this error
    makes the second part of e_i far too large. The second parts of all e_i are therefore reduced:

    - Let Δf and Δq be the changes in f and q from the first to the second evaluation at node 1.
      They determine how large (g₁ − g₀)ᵀ c₁ should be. The reduction factor is therefore
          ρ = min(1, 2 |h (Δq + g₁ᵀ Δf)|/|(g₁ − g₀)ᵀ c₁|),
      where 0/0 is 1. The numerator uses g₁ from the second evaluation, and the denominator
      uses g₁ from the first.
    - e₁ is omitted, because node 1 is evaluated again at y₁.
    - The second parts of e₂ and e₃ are multiplied by ρ.
    - The score's error decreases as σ̂ grows. The second parts of the later e_i are therefore
      multiplied by max(r, ρ), where r = min(1, 2(i − 4)/n)² rises from 0 at node 4 to 1 just
      past the middle of the path.
    - After a Runge-Kutta start, ρ is 1, and e₁ and e₂ are omitted.

Error of the integral:
    The error of ∫ q ds is estimated as max(d/15, h ‖∇⁷q‖/30). The divisor 30 is replaced by 45 at
    order five and by 20 if orders are averaged. These three divisors were chosen from
    measurements on trained networks.

    - d is the difference between the integral computed from all nodes and the integral computed
      from every second node. This difference may be small by chance.
    - ‖∇⁷q‖ is the norm of the seventh differences of q along the path. This norm reveals kinks and
      all other features that the nodes do not resolve. If q jumps by J at a random place, the
      root mean square of the error is h J/√12, and ‖∇⁷q‖ is about 30 J.

    If there is only one probe per node, the variance of q_i is estimated from three adjacent nodes
    as (q_{i−1} − 2 q_i + q_{i+1})²/6.

Companion:
    A companion of a path from data to a latent is a second solution of the ODE, with the same
    probes but half as many steps as the first solution. Let D be the difference between the two
    log-densities. For D, both integrals of q use only the nodes that the two grids share. The
    path's error is estimated as max(p, |D|/5), or as p if D is not finite.

Cancellation:
    The e_i change sign along the path, so their sum over the whole path is small. This small sum
    would be a reliable estimate only if g_i were the true gradient of the log-density, which would
    require an exact network. If the path amplifies an error a hundredfold, no sum of local errors
    reveals the amplification, but a companion does.

Source:
    Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", II.1, III.1, III.9;
    Davis and Rabinowitz, "Methods of Numerical Integration", 2.9, for Gregory's rule.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import expand_right, sum_elements
from hosm_losses.likelihood.compiled import Programs
from hosm_losses.likelihood.divergence import NO_DIVERGENCE
from hosm_losses.likelihood.paths import NoiseLevel, Paths, Span, rounding
from hosm_losses.likelihood.result import ODESolution
from hosm_losses.schedules import LinearFlowSchedule

WIDTH = 1.0  # scale of the logistic distribution
# Coefficients of the backward differences.
ADAMS = dict(enumerate((1, 1 / 2, 5 / 12, 3 / 8, 251 / 720, 95 / 288)))
NEXT_TERM = {5: 3 / 160, 6: 863 / 60480}
BOOLE = (4, -8, 20 / 3, -8 / 3, 14 / 45)
ORDER_FIVE = 64  # the order is five if there are at least this many steps
VELOCITY_ORDER_FIVE = 36  # the same on the mesh for velocities; averaged below ORDER_FIVE
FALL = 0.75  # ratio of differences at which orders five and four have the same weight
GREGORY = (1 / 12, -1 / 24, 19 / 720, -3 / 160)  # coefficients of the differences at either end
BISECTIONS, NEWTON_STEPS = 20, 2  # bisection to 1e-6 of the span; each Newton step squares it
# With fewer steps, the order is unknown, so the estimate is the difference of two integrals.
KNOWN_ORDER = 16
RUNGE_KUTTA = 2  # number of Runge-Kutta steps if a path starts in the middle
MIDDLE = 3.0  # a start is in the middle if |log σ̂ − log of the data's size| < MIDDLE
MINIMUM_STEPS = 4
GROUP = 4  # the number of steps in a compiled function; more take longer to compile


class Rule(NamedTuple):
    """Which multistep method is used."""

    order: int  # k
    runge_kutta: int  # number of Runge-Kutta steps at the start
    blends: bool  # whether growing differences reduce the weight of order five


class Node(NamedTuple):
    """What is known about a node before the network is evaluated there."""

    level: NoiseLevel
    rate: Tensor  # du/ds times the length of a step
    probes: Tensor | None
    least_share: Tensor  # max(r, ρ) is at least this r


class NodeValue(NamedTuple):
    """The values at one node of the fixed grid; `slope` and `integrand` are per step."""

    slope: Tensor  # h dy/ds, in the shape of y
    integrand: Tensor  # h q, (B,); its sum is the integral along the path
    variance: Tensor | None  # variance of the estimate h q, (B,), from several probes
    covector: Tensor  # estimate of the log-density's gradient with respect to y


class Carry(NamedTuple):
    """What a step needs to know about the earlier nodes."""

    y: Tensor  # the corrected state
    differences: tuple[Tensor, ...]  # h f, h ∇f, …
    covector: Tensor
    share: Tensor  # ρ


def mesh_points(span: Span, s: Tensor, centre: float) -> tuple[Tensor, Tensor]:
    """Return u and du/ds, (n,), at s in [0, 1]; the logistic distribution peaks at `centre`."""
    start, end = span
    low, high = torch.full_like(s, start), torch.full_like(s, end)
    logistic_start = torch.sigmoid((low - centre) / WIDTH)
    mass = torch.sigmoid((high - centre) / WIDTH) - logistic_start

    def share_below(u: Tensor) -> Tensor:
        logistic = torch.sigmoid((u - centre) / WIDTH)
        return ((u - start) / (end - start) + (logistic - logistic_start) / mass) / 2

    def rate(u: Tensor) -> Tensor:
        density = torch.sigmoid((u - centre) / WIDTH) * torch.sigmoid((centre - u) / WIDTH) / WIDTH
        return 2 / (1 / (end - start) + density / mass)

    for _ in range(BISECTIONS):
        u = (low + high) / 2
        is_below = share_below(u) < s
        low, high = torch.where(is_below, u, low), torch.where(is_below, high, u)
    for _ in range(NEWTON_STEPS):
        low = (low + rate(low) * (s - share_below(low))).clamp(*sorted(span))
    return low, rate(low)


def velocity_mesh_points(span: Span, s: Tensor, centre: float) -> tuple[Tensor, Tensor]:
    """Return u and du/ds, (n,), for a network that predicts the velocity of a linear flow."""
    ends = torch.linspace(*span, 2, dtype=s.dtype, device=s.device)
    t = torch.sigmoid(ends - centre)  # σ̂/(c + σ̂)
    start, end = torch.sqrt(t / (1 + torch.sqrt(1 - t)))
    r = start + (end - start) * s
    square = r.square()
    u = centre + torch.log(square * (2 - square)) - 2 * torch.log(1 - square)
    return u.clamp(*sorted(span)), 4 * (end - start) / (r * (2 - square) * (1 - square))


def gregory_weights(steps: int) -> list[float]:
    """Return the weights of the corrected trapezoid rule at steps + 1 nodes, in units of h."""
    weights = [0.5] + [1.0] * (steps - 1) + [0.5]
    for order, term in enumerate(GREGORY[:steps], 1):
        for offset in range(order + 1):
            correction = term * (-1) ** (order - offset) * math.comb(order, offset)
            weights[offset] += correction
            weights[-1 - offset] += correction
    return weights


class Quadrature:
    """∫ q ds over a grid of `steps` steps of length h, and the errors of this integral."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.values: list[Tensor] = []  # h q at the nodes so far
        self.variances: list[Tensor] = []  # of h q, if there are several probes per node

    def store(self, integrand: Tensor, variance: Tensor | None, *, again: bool = False) -> None:
        """Store h q at the next node or, if `again` is True, replace h q at the latest node."""
        kept = len(self.values) - again
        self.values = [*self.values[:kept], integrand]
        if variance is not None:
            self.variances = [*self.variances[:kept], variance]

    def integral(self, stride: int = 1, steps: int | None = None) -> Tensor:
        """Return ∫ q ds, (B,), computed from every `stride`-th node.

        `steps` is the number of intervals between these nodes, or None for all steps of the grid.
        """
        steps = self.steps if steps is None else steps
        chosen = self.values[: stride * steps + 1 : stride]
        return stride * weighted_sum(gregory_weights(steps), chosen)

    def variance(self) -> Tensor:
        """Return the integral's variance (B,), from several probes or from adjacent nodes."""
        variances = self.variances
        if not variances:  # one probe per node
            q = torch.stack(self.values).detach()
            inner = (q[:-2] - 2 * q[1:-1] + q[2:]).square() / 6
            variances = [inner[0], *inner, inner[-1]]
        return weighted_sum([weight**2 for weight in gregory_weights(self.steps)], variances)

    def error(self, divisor: float) -> Tensor:
        """Return an estimate (B,) of the integral's error, valid only if q is free of noise."""
        count, q = self.steps // 2, torch.stack(self.values).detach()
        difference = (self.integral(1, 2 * count) - self.integral(2, count)).detach().abs()
        if self.steps < KNOWN_ORDER:
            return difference
        rough = q.diff(n=7, dim=0).norm(dim=0)
        return torch.maximum(difference / 15, rough / divisor)


class PathError:
    """The effects e_i of the steps' errors on the log-density."""

    def __init__(self, y: Tensor) -> None:
        self.covector = y  # the covector at the latest node
        self.share = y.new_ones(len(y))  # ρ
        self.effects: list[Tensor] = []  # e_i

    def add(
        self, covector: Tensor, correction: Tensor, omitted: Tensor | None, least_share: Tensor
    ) -> None:
        """Append the next e_i; h · `omitted` is the first term that the corrector omits."""
        share = torch.maximum(self.share, least_share)
        effect = expand_right(share, covector) * (covector - self.covector) * correction
        if omitted is not None:
            effect = effect + covector * omitted
        self.effects.append(sum_elements(effect, 1))

    def replace_first(self, size: Tensor) -> None:
        """Omit e₁, and let ρ be the ratio of its known size (B,) to e₁."""
        self.share = (size / self.effects.pop().abs()).nan_to_num(1.0).clamp(max=1.0)

    def largest_sum(self) -> Tensor:
        """Return the estimate p of the path's error, (B,)."""
        sums = torch.stack(self.effects).cumsum(0)
        return sums.amax(0).clamp(min=0) - sums.amin(0).clamp(max=0)


class AdamsSolver:
    """The state of the multistep method: `y` is the state at the latest node or the next one."""

    def __init__(self, y: Tensor, steps: int, rule: Rule) -> None:
        self.steps, self.rule = steps, rule
        self.y = self.first = y
        self.index = 0  # the number of nodes so far
        self.quadrature, self.error = Quadrature(steps), PathError(y)
        self.differences: list[Tensor] = []  # h f, h ∇f, … at the latest node
        self.correction = y  # c at the latest node
        self.secant: Tensor | None = None  # λ h, (B, 1, …), at order five
        self.weight: Tensor | None = None  # weight of order five in this step, (B,)

    @property
    def first_group(self) -> int:
        """The node at which the groups start; no step is left over at the end."""
        alike = max(self.rule.order + 1, self.rule.runge_kutta) + 1
        return alike + (self.steps + 1 - alike) % GROUP

    @property
    def carry(self) -> Carry:
        """What a later node needs, once all nodes are alike."""
        kept = tuple(self.differences[: self.rule.order + 1])
        return Carry(self.y, kept, self.error.covector, self.error.share)

    def resume(self, carry: Carry) -> None:
        """Go on from a `carry`."""
        self.y, differences, self.error.covector, self.error.share = carry
        self.differences = [*differences]

    def correct(self, node: NodeValue, least_share: Tensor) -> None:
        """Store the values at the next node, and correct the state there if it was predicted."""
        index, order = self.index, self.rule.order
        self.quadrature.store(node.integrand, node.variance)
        earlier, self.differences = self.differences[: order + 1], [node.slope]
        for difference in earlier:
            self.differences.append(self.differences[-1] - difference)
        if index > self.rule.runge_kutta:
            corrected = self.y + self._term(ADAMS, min(index, order))
            if index == 4:
                corrected = self.first + combine(BOOLE, self.differences)
            self.correction, self.y = corrected - self.y, corrected
            omitted = None
            if index > order:
                omitted = self._term(NEXT_TERM, order + 1).detach()
            self.error.add(node.covector, self.correction.detach(), omitted, least_share)
            if self.secant is not None and index <= 4:
                self._move_slope(self.secant * self.correction)
        self.error.covector = node.covector
        self.index += 1

    def correct_again(self, node: NodeValue, _: Tensor) -> None:
        """Replace the values at the latest node with values computed at the corrected state."""
        change = node.slope - self.differences[0]
        if not self.rule.runge_kutta:
            if self.rule.order == 5:
                square = sum_elements(self.correction.square(), 1)
                square = square.clamp(min=torch.finfo(change.dtype).tiny)
                product = sum_elements(self.correction * change, 1)
                self.secant = expand_right(product / square, change)
            with torch.no_grad():
                moved = node.integrand - self.quadrature.values[1]
                moved = moved + sum_elements(node.covector * change, 1)
                self.error.replace_first(2 * moved.abs())
        self.quadrature.store(node.integrand, node.variance, again=True)
        self._move_slope(change)
        self.error.covector = node.covector

    def _move_slope(self, change: Tensor) -> None:
        """Add `change` to h f at the latest node, and thereby to all backward differences."""
        self.differences = [difference + change for difference in self.differences]

    def take(self, carry: Carry, effects: list[Tensor], values: list[NodeValue]) -> None:
        """Store the result of `take_steps`."""
        self.resume(carry)
        self.error.effects.extend(effects)
        for value in values:
            self.quadrature.store(value.integrand, value.variance)
        self.index += len(values)

    def predict(self) -> None:
        """Predict the state at the next node."""
        terms = self.differences[: self.rule.order]
        if self.rule.order == 5 and len(self.differences) > 5:
            self.weight = self._weight_of_order_five()
            terms[4] = expand_right(self.weight, terms[4]) * terms[4]
        for power, difference in enumerate(terms):
            self.y = self.y.add(difference, alpha=ADAMS[power])

    def _term(self, coefficients: Mapping[int, float], power: int) -> Tensor:
        """Return c_k h ∇ᵏf for k = `power`.

        If `weight` is set, the result is the mean of the terms for k and k − 1, with the weights
        `weight` and 1 − `weight`.
        """
        term = coefficients[power] * self.differences[power]
        if self.weight is None:
            return term
        lower = coefficients[power - 1] * self.differences[power - 1]
        return torch.lerp(lower, term, expand_right(self.weight, term))

    def _weight_of_order_five(self) -> Tensor:
        """Return the weight w (B,) of order five in the next step; order four has weight 1 − w."""
        weight = (~(self._turned(3) & self._turned(4))).to(self.y.dtype)
        if not self.rule.blends:
            return weight
        third, fourth = (sum_elements(each.square(), 1) for each in self.differences[3:5])
        ratio = fourth / (FALL**2 * third).clamp(min=torch.finfo(third.dtype).tiny)
        return weight / (1 + ratio.square())

    def _turned(self, k: int) -> Tensor:
        """Return whether ∇ᵏf has turned by more than 90° since the previous node, (B,)."""
        now, change = (each.detach() for each in self.differences[k : k + 2])
        return sum_elements(now * (now - change), 1) < 0

    def quadrature_error(self) -> Tensor:
        """Return an estimate (B,) of the integral's error, valid only if q is free of noise."""
        order, _, blends = self.rule
        return self.quadrature.error(30 if order == 4 else 20 if blends else 45)


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return Σ_i w_i q_i, (B,), for one weight w_i and one value q_i (B,) per node."""
    total = torch.stack([*values]).sum(0)
    for weight, value in zip(weights, values, strict=True):
        if weight != 1.0:  # all but a few at either end; a list of weights would be copied
            total = total + (weight - 1) * value
    return total


def combine(coefficients: Sequence[float], slopes: list[Tensor]) -> Tensor:
    """Return the sum of c_i f_i over all coefficients c_i; surplus slopes are ignored."""
    total = coefficients[0] * slopes[0]
    for coefficient, slope in zip(coefficients[1:], slopes[1:], strict=False):
        total = total + coefficient * slope
    return total


def plainly(_: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that is not compiled, as `Programs.run` calls one that is."""
    return function(*arguments)


def evaluate(paths: Paths, y: Tensor, node: Node) -> NodeValue:
    """Evaluate the network at the states y of a node."""
    noise, dz_du, integrands = paths.slope_at(y, node.level, node.probes)
    integrands, count = node.rate * integrands, len(integrands)
    integrand, variance = integrands[0], None
    if count > 1:
        integrand = integrands.mean(0)
        variance = integrands.detach().var(0) / count
    covector = paths.coordinates.covector(noise.detach(), node.level)
    return NodeValue(node.rate * dz_du, integrand, variance, covector)


def take_steps(
    paths: Paths, rule: Rule, carry: Carry, nodes: list[Node]
) -> tuple[Carry, list[Tensor], list[Tensor], list[NodeValue]]:
    """Take steps to nodes that are like all later ones.

    Return what the next step needs, the effects e_i, the predicted states and the values there.
    """
    solver = AdamsSolver(carry.y, 0, rule)
    solver.resume(carry)
    solver.index = rule.order + 2
    states: list[Tensor] = []
    values: list[NodeValue] = []
    for node in nodes:
        solver.predict()
        states.append(solver.y)
        values.append(evaluate(paths, solver.y, node))
        solver.correct(values[-1], node.least_share)
    return solver.carry, solver.error.effects, states, values


def least_shares(y: Tensor, steps: int) -> list[Tensor]:
    """Return r for every node of a grid of so many steps."""
    index = torch.arange(steps + 1, dtype=y.dtype, device=y.device)
    return [*(2 * (index - 4) / steps).clamp(0, 1).square()]


def solve_on_grid(
    paths: Paths, z: Tensor, span: Span, steps: int, *, companion: bool, compiled: bool
) -> ODESolution:
    """Solve the ODE from z over a span of u = log σ̂, with fresh probes at each node.

    If `compiled` is True, all nodes but the first are computed by compiled functions.
    """
    coordinates, divergence = paths.coordinates, paths.divergence
    # The nodes, and the midpoints between them: place 2 i is node i.
    s = torch.linspace(0, 1, 2 * steps + 1, dtype=z.dtype, device=z.device)
    is_flow = isinstance(coordinates.schedule, LinearFlowSchedule)
    is_velocity = is_flow and coordinates.model.prediction == "velocity"
    # Clamped to the span, because the logistic part has no mass far from its centre.
    centre = sorted((*span, coordinates.log_size))[1]
    grid, rates = (velocity_mesh_points if is_velocity else mesh_points)(span, s, centre)
    levels = coordinates.levels(grid)
    # Where σ̂ is far from the data's size, z hardly moves, so low orders suffice at the start.
    runge_kutta = RUNGE_KUTTA if abs(span[0] - coordinates.log_size) < MIDDLE else 0
    order = 5 if steps >= (VELOCITY_ORDER_FIVE if is_velocity else ORDER_FIVE) else 4
    rule = Rule(order, runge_kutta, steps < ORDER_FIVE)
    solution, coarse = AdamsSolver(z, steps, rule), None
    if companion:  # half as many steps, without a graph
        coarse = AdamsSolver(z.detach(), steps // 2, rule)
    solvers = [(solution, 2)] if coarse is None else [(solution, 2), (coarse, 4)]
    groups: dict[int, list[Node]] = {2: [], 4: []}
    lengths = {stride: (rates / each.steps).unbind() for each, stride in solvers}
    shares = {stride: least_shares(z, each.steps) for each, stride in solvers}
    programs = Programs.of(paths.model.owner) if compiled else None

    def slope(z: Tensor, place: int, stride: int) -> Tensor:
        level = levels(slice(place, place + 1))
        noise = paths.noise_at(coordinates.to_x(z, level), level)
        return lengths[stride][place] * coordinates.slope(z, noise, level)

    rounded = z.new_zeros(len(z))
    for place in range(0, 2 * steps + 1, 2):
        paths.advance(len(z) / (steps + 1))
        level = levels(slice(place, place + 1))
        probes = paths.draw_probes(z)
        for solver, stride in solvers:
            index, surplus = divmod(place, stride)
            if surplus:
                continue
            node = Node(level, lengths[stride][place], probes, shares[stride][index])
            nodes: list[Node] = []
            values: list[NodeValue] = []
            states: list[Tensor] = []
            run = programs.run if programs and index else plainly
            with torch.set_grad_enabled(torch.is_grad_enabled() and solver is solution):
                if programs and index >= solver.first_group:
                    group = groups[stride]
                    group.append(node)
                    if len(group) < GROUP:
                        continue
                    nodes, groups[stride] = group, []
                    given = paths, rule, solver.carry, nodes
                    carry, effects, states, values = run((z.shape, rule), take_steps, *given)
                    solver.take(carry, effects, values)
                else:
                    if index > runge_kutta:
                        solver.predict()
                    elif index:
                        y, first = solver.y, solver.differences[0]
                        second = slope(y + first / 2, place - stride // 2, stride)
                        third = slope(y + second / 2, place - stride // 2, stride)
                        fourth = slope(y + third, place, stride)
                        solver.y = y + (first + 2 * second + 2 * third + fourth) / 6
                    twice = index == runge_kutta + 1  # the first node that is predicted
                    for take in (solver.correct, solver.correct_again)[: 1 + twice]:
                        nodes.append(node)
                        states.append(solver.y)
                        values.append(run(z.shape, evaluate, paths, solver.y, node))
                        take(values[-1], node.least_share)
            for y, value, (at, rate, *_) in zip(states, values, nodes, strict=True):
                if (error := paths.rounding_error(y, value.integrand, at, rate)) is not None:
                    rounded = torch.maximum(rounded, error)

    solver_error, standard_error = solution.error.largest_sum(), None
    if coarse is not None:
        with torch.no_grad():
            solver_error = companion_error(paths, solution, coarse, span)
    if divergence.is_random:
        standard_error = solution.quadrature.variance().sqrt()
    elif divergence is not NO_DIVERGENCE:
        solver_error = solver_error + solution.quadrature_error()
        standard_error = torch.zeros_like(solver_error)
    evaluations = steps + 2 + (steps // 2 + 2 if companion else 0)  # one node is evaluated twice
    midpoints = 3 * runge_kutta * (1 + companion)
    nfe = torch.full((len(z),), evaluations + midpoints, device=z.device)
    products = torch.full_like(nfe, evaluations * divergence.products)
    return ODESolution(
        solution.y,
        solution.quadrature.integral(),
        nfe=nfe,
        products=products,
        standard_error=standard_error,
        solver_error=(solver_error + rounded).clamp(min=rounding(paths.dtype)),
        steps=torch.full_like(nfe, steps),
    )


def companion_error(
    paths: Paths, solution: AdamsSolver, coarse: AdamsSolver, span: Span
) -> Tensor:
    """Use a solution and its companion to estimate the error (B,) of a path to a latent."""
    end, log_prior = paths.coordinates.ends(span)[1], paths.log_prior_at
    latent, other = (paths.coordinates.to_x(each.y, end) for each in (solution, coarse))
    difference = solution.quadrature.integral(2, coarse.steps) - coarse.quadrature.integral()
    difference = difference + log_prior(latent) - log_prior(other)
    of_path = solution.error.largest_sum()
    error = torch.maximum(of_path, difference.abs() / 5)
    return torch.where(error.isfinite(), error, of_path)
