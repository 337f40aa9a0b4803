r"""A field's derivatives compared with differences of its values.

Formula:
    ⟨D, b⟩ with a difference of ⟨f, b⟩ along w, ⟨G, c⟩ with one of ⟨w, D⟩ along c, and the
    gradients of ⟨f, a⟩, ⟨D, b⟩ and ⟨G, c⟩ with differences of themselves, for random a, b, c, by
        f′(0) ≈ (8 [f(h) − f(−h)] − [f(2h) − f(−2h)])/(12 h), of order four in h.

Source:
    Griewank and Walther, "Evaluating Derivatives" (2008), for checks against differences.
"""

__all__ = ["STEP", "TOLERANCE", "Agreement", "Check", "reseed", "size_of"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hosm_losses.derivatives import Field, derive, gradients

# By the precision in which the network works.
STEP = {torch.float32: 3e-3, torch.float64: 3e-4}
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
DRAWS = 3
NAMES = ("value", "directional derivative", "gradient of the quadratic form")


class Check(Protocol):
    """Something that may be wrong with a field."""

    @property
    def derivative(self) -> str:
        """The engine."""
        ...

    def find(self, field: Field, x: Tensor, parameters: Sequence[Tensor]) -> str | None:
        """Say what is wrong, or None."""
        ...


@dataclass(frozen=True)
class Agreement:
    """How a field is compared with its differences.

    Attributes:
        order: 2 or 3.
        derivative: the engine.
        tolerance: relative error that counts as wrong.
        step: of the differences, relative to the size of what is varied.
    """

    order: int
    derivative: str
    tolerance: float
    step: float

    def find(self, field: Field, x: Tensor, parameters: Sequence[Tensor]) -> str | None:
        """Say what disagrees however small the step, or None."""
        fault = None
        # A curved field needs a smaller step; what is wrong agrees with a difference of none.
        for step in (self.step, self.step / 4, self.step / 16):
            fault = replace(self, step=step)._disagreement(field, x, parameters)
            if fault is None:
                break
        return fault

    def _disagreement(self, field: Field, x: Tensor, parameters: Sequence[Tensor]) -> str | None:
        generator = torch.Generator(x.device).manual_seed(0)

        def randn(like: Tensor) -> Tensor:
            return torch.randn(
                like.shape, generator=generator, dtype=like.dtype, device=like.device
            )

        point = x.detach().clone().requires_grad_()
        varied = [point, *parameters]
        scale = size_of(x)
        analytic: dict[str, list[float]] = {}
        numeric: dict[str, list[float]] = {}

        def note(name: str, value: Tensor | float, reference: Tensor | float) -> None:
            analytic.setdefault(name, []).append(float(value))
            numeric.setdefault(name, []).append(float(reference))

        for _ in range(DRAWS):
            # Its own direction in every draw: along one of them a derivative may happen to vanish.
            w = scale * randn(x)[None]
            covectors = [randn(x)[None] for _ in range(self.order)]
            ways = [size_of(v) * randn(v) for v in varied]

            def numbers(w: Tensor = w, covectors: list[Tensor] = covectors) -> Tensor:
                """⟨f, a⟩, ⟨D, b⟩ and ⟨G, c⟩."""
                parts = zip(self._parts(field, point, w), covectors, strict=True)
                return torch.stack([(part * covector).sum() for part, covector in parts])

            found = numbers()
            # Before the differences, which write to what the graph has saved.
            slopes = [_along(gradients(number, varied), ways) for number in found]
            # A value needs no primitives, which torch's own checkpoint could not recompute.
            along_w = self._difference(lambda: field.native(point)[None], [point], [w[0]])
            note(NAMES[1], found[1].detach(), (along_w * covectors[1]).sum())
            if self.order == 3:
                moved = self._difference(
                    lambda w=w: (self._parts(field, point, w)[1] * w).sum(),
                    [point],
                    [scale * covectors[2][0]],
                )
                note(NAMES[2], found[2].detach() * scale, moved)
            expected = self._difference(numbers, varied, ways)
            for name, slope, reference in zip(NAMES, slopes, expected, strict=False):
                note(f"the gradient of the {name}", slope, reference)
        for key, values in analytic.items():
            error = _relative(values, numeric[key])
            if not error <= self.tolerance:
                return f"{key} off by {100 * error:.3g} %"
        return None

    def _parts(self, field: Field, x: Tensor, w: Tensor) -> list[Tensor]:
        reseed(x)
        derived = derive(field, x, w, order=self.order, derivative=self.derivative)
        return [part for part in derived if part is not None]

    def _difference(
        self, function: Callable[[], Tensor], varied: Sequence[Tensor], ways: Sequence[Tensor]
    ) -> Tensor:
        """Derivative of a function along `ways` of the tensors `varied`, left as they were."""
        start = [v.detach().clone() for v in varied]
        total: Tensor | None = None
        for steps, weight in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
            with torch.no_grad():
                for v, origin, way in zip(varied, start, ways, strict=True):
                    v.copy_(origin + steps * self.step * way)
            reseed(varied[0])
            value = weight * function().detach().double()
            total = value if total is None else total + value
        with torch.no_grad():
            for v, origin in zip(varied, start, strict=True):
                v.copy_(origin)
        assert total is not None
        return total / (12 * self.step)


def reseed(x: Tensor, seed: int = 0) -> None:
    """Start the generators that a network draws from on the device of x; no other device's."""
    torch.default_generator.manual_seed(seed)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            torch.cuda.manual_seed(seed)
    elif x.device.type != "cpu":
        torch.manual_seed(seed)


def size_of(tensor: Tensor) -> float:
    """Root mean square, or 1 where it vanishes."""
    size = float(tensor.detach().double().square().mean().sqrt())
    return size if size > 0 else 1.0


def _along(grads: Sequence[Tensor], ways: Sequence[Tensor]) -> float:
    return sum(float((grad * way).sum()) for grad, way in zip(grads, ways, strict=True))


def _relative(values: Sequence[float], references: Sequence[float]) -> float:
    top = math.dist(values, references)
    bottom = max(math.hypot(*values), math.hypot(*references))
    return top / bottom if bottom > 0 else top
