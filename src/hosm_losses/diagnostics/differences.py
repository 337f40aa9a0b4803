r"""Search a field for jumps, and for derivatives that disagree with finite differences.

Formula:
    `Agreement` compares ⟨D, b⟩ with the finite difference of ⟨f, b⟩ along w, and ⟨G, c⟩ with the
    finite difference of ⟨w, D⟩ along c. `Agreement` also compares the gradients of ⟨f, a⟩, ⟨D, b⟩
    and ⟨G, c⟩ with finite differences of these three forms. The finite difference is
        f′(0) ≈ (8 [f(h) − f(−h)] − [f(2h) − f(−2h)])/(12 h), accurate to fourth order in h.

    `Smoothness` compares p(b) − p(a) with the integral of p′ from a to b, by the Gauss-Legendre
    rule, for p = p₀ and for p = p₁, on the line x + s w. At first, a = −½ and b = ½. Here,
        p₀ = ⟨f, w⟩, p₁ = ⟨D, w⟩ = p₀′ and p₂ = ⟨G, w⟩ = p₁′.
    In ReLU networks, second derivatives are zero wherever they exist: finite differences with
    small steps reveal no fault, although the gradient of the third-order term is wrongly zero.

    If the integral differs from p(b) − p(a), the search halves the line repeatedly, and keeps the
    half on which the trapezoidal rule has the larger error. On an interval of length h, this error
    does not depend on h if p jumps; it is proportional to h if p′ jumps, and to h³ if both are
    smooth.

    The search therefore converges to a jump, at one new point per halving. Let m be the midpoint
    of a and b. The bend |p(m) − (p(a) + p(b))/2| is half the jump at a jump, proportional to h at
    a kink of p, and to h² where p is smooth. Hence |x|³ passes the check: its G has a kink but no
    jump, which does no harm, because the loss differentiates G only once.

Source:
    Griewank and Walther, "Evaluating Derivatives" (2008), on checks against finite differences.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor, nn

from hosm_losses.derivatives import Network, derive, find_jumps, gradients

NOT_FINITE = "that is not finite"
# For each precision of the network: the relative error above which a derivative counts as wrong,
# and the step as a fraction of the size of the varied tensor.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
STEP = {torch.float32: 3e-3, torch.float64: 3e-4}
# Divisors of the steps. A difference of derivatives across the kink of a ReLU unit is meaningless,
# and the smallest steps cross hardly any kinks. In float32, such small steps would only show
# rounding errors.
SHRINKS = {torch.float32: (1, 4, 16), torch.float64: (1, 4, 16, 2**12, 2**16)}
DRAWS = 3
# Sizes of directions in x that are tried in addition, if they exceed the size of x.
LONGER = (1e-3, 1e-2, 1e-1, 1.0)
NAMES = ("value", "directional derivative", "gradient of the quadratic form")
# Names of the faults, by the order of the derivative of f that jumps.
JUMPS = ("values that jump", "a first derivative that jumps", "a second derivative that jumps")
# Lengths of the lines, as multiples of the size of x.
LENGTHS = (1, 1, 2, 4)
# Places at which a line is evaluated, and the weights of all places except the two ends.
_PLACES, _WEIGHTS = np.polynomial.legendre.leggauss(5)
NODES, WEIGHTS = (-0.5, *(_PLACES / 2).tolist(), 0.5), _WEIGHTS / 2
HALVINGS = {torch.float32: 14, torch.float64: 24}
# SHARE: the allowed error of the integrals over all lines, as a fraction of the change. SMOOTH:
# the allowed error of an integral or size of a bend on one line, as a fraction of the change.
# HALF: at a jump, a bend is at least this fraction of the largest of the three bends before it.
SHARE, SMOOTH, HALF = 0.01, 1e-3, 0.5
# The allowed rounding error, as a fraction of the tolerance.
ROUNDING = 1e-3

# (p₀, p₁, p₂) at s.
Line = Callable[[float], np.ndarray]


@dataclass(frozen=True)
class Check:
    """Base class of the searches, each of which looks for one kind of fault in a field."""

    order: int
    engine: str
    precision: torch.dtype

    def find(self, field: Network, x: Tensor) -> str | None:
        """Return a description of the fault, or None if there is no fault."""
        raise NotImplementedError

    def derived(self, field: Network, x: Tensor, w: Tensor) -> list[Tensor]:
        """Return f, D and, at order three, G of the seeded field at x along w, each (B, *)."""
        reseed(x)
        parts = derive(field, x, w[None], order=self.order, engine=self.engine)
        return [part[0] for part in parts if part is not None]


class Agreement(Check):
    """Comparison of a field's derivatives with finite differences."""

    def find(self, field: Network, x: Tensor) -> str | None:
        """Name a wrong derivative, or return None if all derivatives agree at some step size."""
        fault = None
        # If x is small compared with the length over which the field curves, differences of values
        # drown in rounding errors. Longer directions in x, up to a size of 1, avoid this.
        size = size_of(x)
        scales = [size, *(scale for scale in LONGER if scale > size)]
        # A curved field needs a smaller step; a wrong derivative disagrees at every step.
        for scale, shrink in product(scales, SHRINKS[self.precision]):
            fault = self._disagreement(field, x, scale, STEP[self.precision] / shrink)
            if fault is None:
                return None
        return fault

    def _disagreement(self, field: Network, x: Tensor, scale: float, step: float) -> str | None:
        varied, randn = _varied(field, x), random_like(x, seed=0)
        # Each draw uses a new direction: along a single one, a derivative may happen to vanish.
        draws = [self._numbers(field, varied, randn, scale, step) for _ in range(DRAWS)]
        analytic, numeric = torch.tensor(draws, dtype=torch.float64, device="cpu").unbind(1)
        size = torch.maximum(analytic.norm(dim=0), numeric.norm(dim=0))
        errors = (analytic - numeric).norm(dim=0) / size.where(size != 0, 1)
        parts = NAMES[: self.order]
        names = (*parts[1:], *(f"the gradient of the {name}" for name in parts))
        for name, error in zip(names, errors.tolist(), strict=True):
            if not error <= TOLERANCE[self.precision]:
                return f"{name} " + (
                    f"off by {100 * error:.3g} %" if math.isfinite(error) else NOT_FINITE
                )
        return None

    def _numbers(
        self,
        field: Network,
        varied: Sequence[Tensor],
        randn: Callable[[Tensor], Tensor],
        scale: float,
        step: float,
    ) -> tuple[list[float], list[float]]:
        """Return ⟨D, b⟩, ⟨G, c⟩ and the slopes of all forms, by derivatives and by differences."""
        x = varied[0]
        w = scale * randn(x)
        covectors = [randn(x) for _ in range(self.order)]
        directions = [scale * randn(x), *(size_of(v) * randn(v) for v in varied[1:])]
        modules = field.owner.modules() if isinstance(field.owner, nn.Module) else ()
        tables = [m for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        for table, (tensor, direction) in product(tables, zip(varied, directions, strict=True)):
            # The row of a padding index has no gradient, by definition.
            if tensor is table.weight and table.padding_idx is not None:
                direction[table.padding_idx] = 0

        # Slopes are computed before differences, which overwrite tensors saved by the graph.
        forms, gradients_of_forms = self._slopes(field, varied, w, covectors)
        slopes = [
            sum(float((g * along).sum()) for g, along in zip(grads, directions, strict=True))
            for grads in gradients_of_forms
        ]
        # Values need no primitives, which torch's own checkpoint could not recompute.
        along_w = _difference(lambda: field.native(x), [x], [w], step)
        references = [(along_w * covectors[1]).sum()]
        if self.order == 3:
            c = scale * covectors[2]
            along_c = _difference(lambda: self.derived(field, x, w)[1], [x], [c], step)
            references.append((along_c * w).sum() / scale)
        references.extend(
            _difference(lambda: self._forms(field, x, w, covectors), varied, directions, step)
        )
        return [*forms[1:].tolist(), *slopes], [float(reference) for reference in references]

    def _forms(self, field: Network, x: Tensor, w: Tensor, covectors: Sequence[Tensor]) -> Tensor:
        """Return the forms ⟨f, a⟩, ⟨D, b⟩ and ⟨G, c⟩."""
        parts = zip(self.derived(field, x, w), covectors, strict=True)
        return torch.stack([(part * covector).sum() for part, covector in parts])

    def _slopes(
        self, field: Network, varied: Sequence[Tensor], w: Tensor, covectors: Sequence[Tensor]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Return the forms, and the gradient of each form with respect to every varied tensor."""
        x = varied[0]
        forms = self._forms(field, x, w, covectors)
        # As in training, x requires no gradient while parameter gradients are computed.
        in_training = self._forms(field, x.detach(), w, covectors)
        return forms, [
            [*gradients(form, varied[:1]), *gradients(trained, varied[1:])]
            for form, trained in zip(forms, in_training, strict=True)
        ]


def _varied(field: Network, x: Tensor) -> list[Tensor]:
    owner = field.owner
    # The parameters are unknown if the network is not a Module.
    parameters = owner.parameters() if isinstance(owner, nn.Module) else ()
    trained = [p for p in parameters if p.requires_grad and p.is_floating_point()]
    return [x.detach().clone().requires_grad_(), *trained]


def _difference(
    function: Callable[[], Tensor],
    varied: Sequence[Tensor],
    directions: Sequence[Tensor],
    step: float,
) -> Tensor:
    """Return the difference quotient of a function of `varied`, which is restored afterwards."""
    start = [v.detach().clone() for v in varied]

    @torch.no_grad()
    def move(steps: int) -> None:
        for v, origin, direction in zip(varied, start, directions, strict=True):
            v.copy_(origin + steps * step * direction)

    values: list[Tensor] = []
    for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        move(steps)
        reseed(varied[0])
        values.append(weight * function().detach().double())
    move(0)
    return torch.stack(values).sum(0) / (12 * step)


class Smoothness(Check):
    """Search for jumps in values, first derivatives and, at order three, second derivatives."""

    def find(self, field: Network, x: Tensor) -> str | None:
        """Describe a jump in the values or a derivative, or return None if no jump is found."""
        randn = random_like(x, seed=3)
        lines = [self._line(field, x, length * size_of(x) * randn(x)) for length in LENGTHS]
        if not np.isfinite(lines[0](0.0)).all():  # a fault for Agreement to find
            return None
        _, fault = find_jumps(field, x.detach().clone().requires_grad_(), self.order)
        if fault is not None:
            return fault
        rules = [_integrate(line) for line in lines]
        missing, change, size = np.sum(rules, axis=0)
        misses = missing > np.maximum(SHARE * change, TOLERANCE[self.precision] * size)
        searched = (misses[0], misses[1], self.order == 3)
        for lower, candidates in ((0, (0,)), (1, (1, 2))):
            levels = [level for level in candidates if searched[level]]
            # Along one line, two jumps may cancel.
            for line, rule in zip(lines, rules, strict=True) if levels else ():
                level = self._jump(line, lower, levels, rule)
                if level is not None:
                    return JUMPS[level]
        return None

    def _line(self, field: Network, x: Tensor, w: Tensor) -> Line:
        @functools.cache
        def line(s: float) -> np.ndarray:
            with torch.no_grad():
                parts = replace(self, order=3).derived(field, x + s * w, w)
            return np.array([float((part.double() * w).sum()) for part in parts])

        return line

    def _jump(self, line: Line, lower: int, levels: Sequence[int], rule: np.ndarray) -> int | None:
        """Return the first level for which p[level] jumps, or None if no jump is found.

        The search follows the largest error of the trapezoidal rule for p[lower].
        """
        missing, change, size = rule
        least = np.maximum(SMOOTH * change, ROUNDING * TOLERANCE[self.precision] * size)
        if missing[lower] <= least[lower]:
            return None

        def error(part: tuple[float, float]) -> float:
            start, end = map(line, part)
            integral = (part[1] - part[0]) / 2 * (start + end)[lower + 1]
            return abs(float((end - start)[lower] - integral))

        part, bends = max(pairwise(NODES), key=error), list[np.ndarray]()
        for _ in range(HALVINGS[self.precision]):
            low, high = part
            middle = (low + high) / 2
            bends.append(np.abs(line(middle) - (line(low) + line(high)) / 2))
            if error(part) <= least[lower] and (bends[-1] <= least)[levels].all():
                return None
            part = max((low, middle), (middle, high), key=error)
        jumps = bends[-1] > np.maximum(least, HALF * np.max(bends[-4:-1], axis=0))
        return next((level for level in levels if jumps[level]), None)


def _integrate(line: Line) -> np.ndarray:
    """Return for each p: the error of the integral of p′; the change in p; the largest |p|."""
    nodes = np.array([line(s) for s in NODES])
    missing, change = np.zeros(3), np.ptp(nodes, axis=0)
    missing[:2] = np.abs((nodes[-1] - nodes[0])[:2] - WEIGHTS @ nodes[1:-1, 1:])
    change[:2] = np.maximum(change[:2], WEIGHTS @ np.abs(nodes[1:-1, 1:]))
    return np.stack([missing, change, np.abs(nodes).max(axis=0)])


def random_like(x: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """Return a function that draws reproducible Gaussian noise with the shape of its argument."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return lambda like: torch.randn(
        like.shape, generator=generator, dtype=like.dtype, device=like.device
    )


def reseed(x: Tensor, seed: int = 0) -> None:
    """Seed only the generators from which a network on the device of x draws."""
    torch.default_generator.manual_seed(seed)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            torch.cuda.manual_seed(seed)
    elif x.device.type != "cpu":
        torch.manual_seed(seed)


def size_of(tensor: Tensor) -> float:
    """Return the root mean square of a tensor, or 1 if the tensor is zero."""
    size = float(tensor.detach().double().square().mean().sqrt())
    return size if size > 0 else 1.0
