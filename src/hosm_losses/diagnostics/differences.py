r"""Search a field for derivatives that jump, and for derivatives that are wrong.

Formula:
    `Agreement` compares ⟨D, b⟩ with the finite difference of ⟨f, b⟩ along w, and ⟨G, c⟩ with the
    finite difference of ⟨w, D⟩ along c. `Agreement` also compares the gradients of ⟨f, a⟩, ⟨D, b⟩
    and ⟨G, c⟩ with finite differences of these three forms. The finite difference is
        f′(0) ≈ (8 [f(h) − f(−h)] − [f(2h) − f(−2h)])/(12 h), accurate to fourth order in h.

    In ReLU networks, second derivatives are zero wherever they exist: finite differences with
    small steps reveal no fault, although the gradient of the third-order term is wrongly zero.
    `Smoothness` therefore looks for operators that are known to have jumps.

Source:
    Griewank and Walther, "Evaluating Derivatives" (2008), on checks against finite differences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

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
    """Search for operators with discontinuous derivatives between x and the output."""

    def find(self, field: Network, x: Tensor) -> str | None:
        """Name the operators with jumps in derivatives that the loss uses, or return None."""
        parts = self.derived(field, x, size_of(x) * random_like(x, seed=3)(x))
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            return None  # a fault for Agreement to find
        return find_jumps(field, x.detach().clone().requires_grad_(), self.order)[1]


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
