r"""Whether a field has jumps: in its values, or in its first derivatives as a ReLU network has.

What:
    A network of ReLUs is linear in pieces. Its second derivatives are zero wherever they exist,
    differences with small steps agree, and the term of third order trains nothing. What
    derivatives miss is seen over a distance: between two points a number changes by another amount
    than the integral of its derivative. Halving the distance again and again, always towards the
    half where more is missing, ends at a jump, or in a place where nothing is missing.

Formula, along x + s w for −½ ≤ s ≤ ½:
    p₀ = ⟨f, w⟩, p₁ = ⟨D, w⟩ = p₀′, p₂ = ⟨G, w⟩ = p₁′, and p(b) − p(a) − ∫ p′ ds by Gauss and
    Legendre's rule.
"""

__all__ = ["Smoothness"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hosm_losses.derivatives import Field, derive
from hosm_losses.diagnostics.differences import TOLERANCE, reseed, size_of

# Of the lines, in sizes of x.
LENGTHS = (1, 1, 2, 4)
# Nodes over a whole line, and over a part of it.
WHOLE, PART = 5, 4
HALVINGS = {torch.float32: 10, torch.float64: 24}
# Of the change, what may be missing over all lines, what is missing where the rule can follow the
# field, and what is at a jump.
SHARE, SMOOTH, HALF = 0.01, 1e-3, 0.5
# Of what is tolerated, what rounding can be.
NOISE = 1e-3
JUMPS = ("values that jump", "a first derivative that jumps")

# (p₀, p₁) or (p₀, p₁, p₂) at s.
Numbers = Callable[[float], np.ndarray]


@dataclass(frozen=True)
class Smoothness:
    """How a field is searched for jumps.

    Attributes:
        order: 2 looks at values, 3 at first derivatives too.
        derivative: the engine.
        precision: float32 or float64, in which the network works.
    """

    order: int
    derivative: str
    precision: torch.dtype

    def find(self, field: Field, x: Tensor, parameters: Sequence[Tensor]) -> str | None:  # noqa: ARG002
        """Say what jumps, or None, also where there is no derivative, which is another fault."""
        try:
            return self._jump(field, x)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None

    def _jump(self, field: Field, x: Tensor) -> str | None:
        generator = torch.Generator(x.device).manual_seed(3)
        lines: list[Numbers] = []
        for length in LENGTHS:
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            lines.append(self._line(field, x, length * size_of(x) * drawn))
        found = np.array([_missing(line, -0.5, 0.5, WHOLE) for line in lines])
        missing, change, size = found.sum(0)
        lost = missing > np.maximum(SHARE * change, TOLERANCE[self.precision] * size)
        for level, what in enumerate(JUMPS[: self.order - 1]):
            # Along one line two jumps may cancel.
            if lost[level] and any(self._ends_at_a_jump(line, level) for line in lines):
                return what
        return None

    def _line(self, field: Field, x: Tensor, w: Tensor) -> Numbers:
        known: dict[float, np.ndarray] = {}

        def numbers(s: float) -> np.ndarray:
            if s not in known:
                reseed(x)
                with torch.no_grad():
                    derived = derive(
                        field, x + s * w, w[None], order=self.order, derivative=self.derivative
                    )
                    parts = [part for part in derived if part is not None]
                    known[s] = np.array([float((part.double() * w).sum()) for part in parts])
            return known[s]

        return numbers

    def _ends_at_a_jump(self, line: Numbers, level: int) -> bool:
        low, high = -0.5, 0.5
        missing, change, size = _missing(line, low, high, WHOLE)[:, level]
        history = [missing]
        for _ in range(HALVINGS[self.precision]):
            if not missing > max(SMOOTH * change, NOISE * TOLERANCE[self.precision] * size):
                return False
            middle = (low + high) / 2
            halves = [(low, middle), (middle, high)]
            found = [_missing(line, *half, PART)[:, level] for half in halves]
            (low, high), (missing, change, size) = max(
                zip(halves, found, strict=True), key=lambda half: half[1][0]
            )
            history.append(missing)
        # A jump is the same over any distance. A derivative that is wrong loses with the distance.
        return bool(missing > HALF * change and missing > HALF * history[-4])


def _missing(line: Numbers, low: float, high: float, nodes: int) -> np.ndarray:
    """Of each p but the last: |p(b) − p(a) − ∫ p′|, max(|p(b) − p(a)|, ∫ |p′|) and |p|."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    weights = (high - low) / 2 * weights
    inside = np.array([line(low + (high - low) * (place + 1) / 2) for place in places])
    start, end = line(low), line(high)
    moved = (end - start)[:-1]
    missing = np.abs(moved - (weights @ inside)[1:])
    change = np.maximum(np.abs(moved), (weights @ np.abs(inside))[1:])
    return np.stack([missing, change, np.maximum(np.abs(start), np.abs(end))[:-1]])
