r"""A grid that the batch shares, with fresh probes at each node.

It solves dy/du = f(u, y), with a quadrature of q along the path, which may be noisy: in high
dimension the error of the probes is far larger than the solver's, and fresh ones average out.

Formula:
    The nodes are u(i/n), s = i/n uniform. Their density in u = log σ̂ is an equal mixture of the
    uniform law and the logistic law of scale WIDTH around the log of the root mean square of
    data_std, both on the span. In s, h = 1/n,
        ŷ_{i+1} = y_i + h (55 f_i − 59 f_{i−1} + 37 f_{i−2} − 9 f_{i−3})/24,
        y_{i+1} = y_i + h (251 f_{i+1} + 646 f_i − 264 f_{i−1} + 106 f_{i−2} − 19 f_{i−3})/720,
    by Adams and Bashforth, corrected by Adams and Moulton. f_i is the slope at ŷ_i, of the one
    evaluation of the node. The classical Runge-Kutta method starts. ∫ q ds is by the trapezoid
    rule with Gregory's end corrections up to fourth differences, of order six.

Errors:
    With g the gradient of the answer in y, ∇⁵ the fifth backward difference and c_i = y_i − ŷ_i,
    the step to node i changes the answer by
        e_i = g_iᵀ (3/160) h ∇⁵f_i + (g_i − g_{i−1})ᵀ c_i,
    the next term of the corrector, and what follows from f and q at ŷ_i: dg/ds = −(∂f/∂y)ᵀ g − ∇q.
    The path's error is estimated by p = max_{j≤k} |Σ_{i=j}^k e_i|, the largest sum over a stretch
    of the path, with the covector of the node for g.
    The error of ∫ is estimated from the differences d₁, d₂, d₃ of the integrals over every node,
    second, fourth and eighth one: by d₁/15, and at least d₂/64 where d₂ > 32 d₁, because d₁ may be
    small by chance there. Where q has kinks, as with ReLU, or jumps, it is max(d₁, d₂/2), and at
    least its median over the batch: the order log₂(d₂/d₁), of medians, is below 2.5 then, and
    log₂(d₃/d₁) below 5.5, because d₂ alone may be small by chance.
    A companion is the path with half the steps and the same probes. Let D be the difference of
    both answers, with ∫ taken over every second node in both, p′ the companion's own estimate, and
    r = |D|/(p′ − p), which would be 1 if both estimates were right, and is taken as 1 for p′ ≤ p.
    The path's error is then |D|/8 or more, |D|/16 for r < 1. p is multiplied by min(1, 1.5 r) with
    r its own or the 0.9 quantile over the batch, whichever is larger; in a batch of fewer than 8
    with the quantile of an earlier batch, if there is one. Where D is not finite, p stays. The
    constants were chosen with benchmarks/coverage.py.
    The variance of one probe is that of three neighbours, (q_{i−1} − 2 q_i + q_{i+1})²/6.

Why a stretch:
    e_i changes its sign along the path. The whole sum is then small, but only as far as g_i is the
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
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hosm_losses._checks import over_elements, warn
from hosm_losses._torch_internals import vmapped
from hosm_losses.likelihood.counts import integrate, pilot
from hosm_losses.likelihood.paths import Batch, NoiseLevel, Solved, Span
from hosm_losses.likelihood.result import solver_limit
from hosm_losses.probes import Hutchinson, ToStandardError

WIDTH = 1.0  # of the logistic law
BASHFORTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
MOULTON = (251 / 720, 646 / 720, -264 / 720, 106 / 720, -19 / 720)
NEXT_TERM = tuple(3 / 160 * weight for weight in (1, -5, 10, -10, 5, -1))
GREGORY = (1 / 12, -1 / 24, 19 / 720, -3 / 160)  # of the differences at an end
BISECTIONS = 60
POOL = 8  # samples that say together how much of an estimate is true
START = 3  # steps by the Runge-Kutta method
MINIMUM_STEPS = START + 1
# A solution of n steps takes n + 10: the last node, and three inner stages of each start step.
EXTRA_EVALUATIONS = 1 + 3 * START
# What ToTolerance chooses from. Below 32 steps the estimate of the error is no guide.
GRIDS = (32, 64, 128, 256, 512, 1024)


class Node(NamedTuple):
    """What is known at a node of the fixed grid; slope and integrand are per unit of s."""

    slope: Tensor  # dy/ds, of the shape of y
    integrand: Tensor  # q, (B,), integrated along the path
    variance: Tensor | None  # of q as an estimate, (B,), from several probes
    covector: Tensor  # what a small error of y is multiplied with to be felt in the answer


def mesh_points(span: Span, s: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """u and du/ds of the mesh at s in [0, 1], (n,); `centre` is that of the logistic law."""
    start, end = span

    def logistic(u: Tensor) -> Tensor:
        return torch.sigmoid((u - centre) / WIDTH)

    first, last = torch.full_like(s, start), torch.full_like(s, end)
    least, mass = logistic(first), logistic(last) - logistic(first)
    for _ in range(BISECTIONS):
        middle = (first + last) / 2
        share = ((middle - start) / (end - start) + (logistic(middle) - least) / mass) / 2
        before = share < s
        first, last = torch.where(before, middle, first), torch.where(before, last, middle)
    density = logistic(first) * logistic(2 * centre - first) / WIDTH
    return first, 2 / (1 / (end - start) + density / mass)


def gregory_weights(steps: int) -> list[float]:
    """Weights of the corrected trapezoid rule on steps + 1 nodes, in units of the step."""
    weights = [0.5] + [1.0] * (steps - 1) + [0.5]
    for order, term in enumerate(GREGORY[:steps], 1):
        for offset in range(order + 1):
            correction = term * (-1) ** (order - offset) * math.comb(order, offset)
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
        self.y = self.before = self.covector = y
        self.total = self.lowest = self.highest = y.new_zeros(len(y))
        self.slopes: list[Tensor] = []
        self.integrands: list[Tensor] = []
        self.variances: list[Tensor] = []

    def arrive(self, here: Node) -> None:
        """Take in what is known at the node that is due, and step to the next one if there is."""
        index, h = len(self.integrands), self.h
        self.integrands.append(here.integrand)
        if here.variance is not None:
            self.variances.append(here.variance)
        self.slopes = slopes = [here.slope, *self.slopes[: len(NEXT_TERM) - 1]]
        if index > START:
            corrected = self.before + h * combine(MOULTON, slopes)
            with torch.no_grad():
                self._estimate(here.covector, corrected - self.y)
            self.y = corrected
        self.before = y = self.y
        self.covector = here.covector
        if index == self.steps:
            return
        if index < START:
            place = 2 * self.stride * index
            second = self.slope(place + self.stride, y + h / 2 * slopes[0])
            third = self.slope(place + self.stride, y + h / 2 * second)
            fourth = self.slope(place + 2 * self.stride, y + h * third)
            self.y = y + h / 6 * (slopes[0] + 2 * second + 2 * third + fourth)
        else:
            self.y = y + h * combine(BASHFORTH, slopes)

    def _estimate(self, covector: Tensor, correction: Tensor) -> None:
        """Add what the errors of a step do to the answer, e."""
        effect = over_elements((covector - self.covector) * correction, 1)
        if len(self.slopes) == len(NEXT_TERM):
            effect = effect + over_elements(covector * self.h * combine(NEXT_TERM, self.slopes), 1)
        self.total = self.total + effect
        self.lowest = torch.minimum(self.lowest, self.total)
        self.highest = torch.maximum(self.highest, self.total)

    def integral(self, stride: int = 1, steps: int | None = None) -> Tensor:
        """∫ q ds by so many steps (all if None) from node to node at a stride, (B,)."""
        steps = self.steps if steps is None else steps
        chosen = self.integrands[: stride * steps + 1 : stride]
        return self.h * stride * combine(gregory_weights(steps), chosen)

    @property
    def path_error(self) -> Tensor:
        """p, (B,)."""
        return self.highest - self.lowest

    @property
    def variance(self) -> Tensor:
        """Of the integral, from those of the nodes, or from neighbours if there is none, (B,)."""
        variances = self.variances
        if not variances:
            q = torch.stack(self.integrands).detach()
            inner = (q[:-2] - 2 * q[1:-1] + q[2:]).square() / 6
            variances = [inner[0], *inner, inner[-1]]
        weights = [weight**2 for weight in gregory_weights(self.steps)]
        return self.h**2 * combine(weights, variances)

    @property
    def quadrature_error(self) -> Tensor:
        """Estimate of the error of the integral of a q without noise, (B,)."""
        differences: list[Tensor] = []
        for stride in (1, 2, 4):
            count = self.steps // (2 * stride)
            if stride == 1 or count >= MINIMUM_STEPS:
                fine, coarse = self.integral(stride, 2 * count), self.integral(2 * stride, count)
                differences.append((fine - coarse).detach().abs())

        if len(differences) == 1:  # of no known order
            return differences[0]
        first, second, *_ = differences
        medians = [each.nanmedian() for each in differences]
        kinks = medians[1] < 2**2.5 * medians[0]
        for each in medians[2:]:
            kinks = kinks & (each < 2**5.5 * medians[0])
        kinked = torch.maximum(first, second / 2)
        kinked = torch.maximum(kinked, kinked.nanmedian())
        smooth = torch.maximum(first / 15, torch.where(second > 32 * first, second / 64, 0.0))
        return torch.where(kinks, kinked, smooth)


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
    return walk, other


def combine(coefficients: Sequence[float], slopes: list[Tensor]) -> Tensor:
    """Σ_i c_i f_i over the coefficients, also for the stages of another method."""
    total = coefficients[0] * slopes[0]
    for coefficient, slope in zip(coefficients[1:], slopes[1:], strict=False):
        total = total + coefficient * slope
    return total


def solve_fixed(
    batch: Batch,
    z: Tensor,
    span: Span,
    steps: int,
    companion: bool,
    shares: list[Tensor],
) -> Solved:
    """Solve from z at the start of a span of u = log σ̂ with fresh probes.

    A companion is for the way from data to latents, at whose end the prior is. `shares` keeps what
    it told in the last batch of 8 or more, for a smaller one.
    """
    coordinates, divergence, whole = batch.coordinates, batch.divergence, batch
    if isinstance(divergence, ToStandardError):
        batch = replace(batch, divergence=pilot(divergence))
    nodes: list[tuple[Tensor, Tensor]] = []
    s = torch.linspace(0, 1, 2 * steps + 1, dtype=z.dtype, device=z.device)
    centre = coordinates.std.square().mean().log() / 2
    grid, rates = mesh_points(span, s, centre.clamp(min(span), max(span)))
    levels = coordinates.levels(grid)  # of the nodes, and of the midpoints between them
    count = steps + EXTRA_EVALUATIONS
    count += steps // 2 + EXTRA_EVALUATIONS if companion else 0

    def slope(place: int, z: Tensor) -> Tensor:
        here = levels(slice(place, place + 1))
        noise = batch.noise(coordinates.to_x(z, here), here)
        return rates[place] * coordinates.slope(z, noise, here)

    @lru_cache(1)  # a companion shares them
    def probes_of(_place: int) -> Tensor | None:
        batch.advance(len(z) / (steps + 1))
        return batch.draw_probes(z)

    def node(place: int, z: Tensor) -> Node:
        here = levels(slice(place, place + 1))
        noise, moved, integrand = batch.derivatives(z, here, probes_of(place))
        if isinstance(divergence, ToStandardError) and len(nodes) == place // 2:
            nodes.append((z, integrand.detach().var(0)))  # not the companion's, which come after
        integrand = rates[place] * integrand
        seen = integrand.detach()
        variance = seen.var(0) / len(seen) if len(seen) > 1 else None
        covector = coordinates.covector(noise.detach(), here)
        return Node(rates[place] * moved, integrand.mean(0), variance, covector)

    found, other = multistep(slope, node, z, 1 / steps, steps, companion)
    solver_error, standard_error = found.path_error, None
    if other is not None:
        with torch.no_grad():
            solver_error = _guarded(batch, found, other, coordinates.ends(span)[1], shares)
    if isinstance(batch.divergence, Hutchinson):
        standard_error = found.variance.sqrt()
    elif divergence is not None:
        solver_error = solver_error + found.quadrature_error
        standard_error = torch.zeros_like(solver_error)
    nfe, integral = torch.full((len(z),), count, device=z.device), found.integral()
    evaluated = steps + 1 + (steps // 2 + 1 if companion else 0)
    products = torch.full_like(nfe, evaluated * batch.products)
    if isinstance(divergence, ToStandardError):
        weights = rates[::2] * z.new_tensor(gregory_weights(steps)) / steps
        integral, standard_error, probes = integrate(
            whole, nodes, weights, lambda index: levels(slice(2 * index, 2 * index + 1))
        )
        nfe, products = nfe + steps + 1, products + probes
    errors = standard_error, solver_error, torch.zeros_like(nfe).bool()
    return Solved(found.y, integral, nfe, products, *errors, steps)


def _guarded(
    batch: Batch, found: Walk, companion: Walk, far: NoiseLevel, shares: list[Tensor]
) -> Tensor:
    """The estimate of the path's error from a solution and its companion, that end at a level."""
    own, other = (
        batch.log_prior_at(batch.coordinates.to_x(each.y, far)) for each in (found, companion)
    )
    plain, coarse = found.path_error, companion.path_error
    difference = own - other + found.integral(2, companion.steps) - companion.integral()
    difference = difference.abs()
    known = (coarse > plain) & coarse.isfinite()
    ratio = torch.where(known, difference / (coarse - plain), 1.0)
    guarded = plain
    if len(plain) >= POOL:
        shares[:] = [ratio.nanquantile(0.9)]
    if shares:
        guarded = plain * (1.5 * torch.maximum(ratio, shares[0])).clamp(max=1.0)
    guarded = torch.maximum(guarded, difference / torch.where(ratio < 1, 16, 8))
    return torch.where(guarded.isfinite(), guarded, plain)


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
    companion: bool,
    *,
    tolerance: float,
    group: "dist.ProcessGroup | None",
) -> int:
    """The coarsest of GRIDS whose solver error on a batch is within a tolerance.

    Processes of a group agree after every trial, so that all take part in as many. Trials leave
    the generator alone. A sample that failed, and was lost on the grid before, does not count.
    """
    refuse_vmap("ToTolerance")
    kind = batch.divergence
    kind = pilot(kind) if isinstance(kind, ToStandardError) else kind
    if isinstance(kind, Hutchinson) and not companion:
        kind = None  # the claim is of the path alone
    # The probes of a difference from a companion come from a generator of their own.
    own = torch.Generator(z.device).manual_seed(0)
    trial = replace(batch, advance=lambda _: None, generator=own, divergence=kind)
    largest, lost = math.inf, torch.zeros(len(z), dtype=torch.bool, device=z.device)
    for steps in GRIDS:
        with torch.no_grad():
            error = solve_fixed(trial, z, span, steps, companion, []).solver_error
        failed = ~(error <= solver_limit(z[0].numel()))
        error = error.masked_fill(failed, math.inf).masked_fill(failed & lost, -math.inf)
        most = error.max()  # infinite where a sample failed; −∞ where none counts
        if group is not None:
            dist.all_reduce(most, dist.ReduceOp.MAX, group)
        largest = math.inf if most < 0 else float(most)
        if largest <= tolerance:
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
