r"""A formula of a few tensors whose backward passes keep its inputs and nothing else.

What:
    Autograd keeps what every operator of a composition needs. An elementwise rule of the Taylor
    engine is a handful of operators on tensors as large as the activations; keeping all of that
    would cost several times the memory of the network itself. Here only the inputs are kept, and
    the formula is evaluated again when a gradient is asked for; the gradient is such a formula of
    the inputs and the cotangents, and so on to any order.

Under torch.compile and the transforms of torch.func the formula is evaluated as it stands: they
decide themselves what to keep.
"""

__all__ = ["Formula", "plus_product", "recomputed"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hosm_losses._torch_internals import traced

Some = Tensor | None


@dataclass(frozen=True)
class Formula:
    """A function of tensors, without side effects, and of its gradients.

    Attributes:
        function: of the tensors; returns a tensor, or a tuple.
        pullback: of the tensors and the cotangent of the first result; returns the gradients, None
            where a tensor is None. Where there is none, autograd finds the gradients.
    """

    function: Callable[..., Any]
    pullback: "Formula | None" = None

    def __call__(self, *tensors: Some) -> tuple[Tensor, ...]:
        """Evaluate as a tuple."""
        found = self.function(*tensors)
        return found if isinstance(found, tuple) else (found,)

    def gradients(self, needed: Sequence[bool], wanted: Sequence[bool]) -> "Formula":
        """The formula of the gradients that are needed, of tensors and those cotangents there are.

        Args:
            needed: for every tensor, whether its gradient is needed.
            wanted: for every result, whether it has a cotangent.
        """
        inputs = len(needed)
        places = [place for place, need in enumerate(needed) if need]
        results = [place for place, want in enumerate(wanted) if want]
        given = self.pullback if results == [0] else None

        def chosen(*everything: Some) -> tuple[Tensor, ...]:
            assert given is not None
            found = given(*everything)
            return tuple(found[place] for place in places)

        def by_autograd(*everything: Some) -> tuple[Tensor, ...]:
            tracked = torch.is_grad_enabled()
            with torch.enable_grad():
                points: list[Any] = [
                    tensor
                    if tensor is None or not need or (tracked and tensor.requires_grad)
                    else tensor.detach().requires_grad_()
                    for tensor, need in zip(everything[:inputs], needed, strict=True)
                ]
                found = self(*points)
                cotangents: Any = everything[inputs:]
                return torch.autograd.grad(
                    [found[place] for place in results],
                    [points[place] for place in places],
                    cotangents,
                    create_graph=tracked,
                    materialize_grads=True,
                )

        if given is None:
            return Formula(by_autograd)
        # The pullback of the pullback goes by its first result, the gradient of the first tensor.
        return Formula(chosen, given.pullback if places[0] == 0 else None)


def recomputed(formula: Formula, *tensors: Some) -> Tensor:
    """Evaluate a formula that returns one tensor, keeping only its inputs for the backward passes.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> recomputed(Formula(lambda x: x.sin().cos()), x).sum().backward()
        >>> x.grad.shape
        torch.Size([3])
    """
    if traced():
        return formula(*tensors)[0]
    return _Recomputed.apply(formula, *tensors)[0]  # pyright: ignore[reportReturnType, reportOptionalSubscript]


def plus_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Total + a b, in the place of a total that is the caller's own and of the full shape."""
    # vmap has no rule for the operator in place.
    return torch.addcmul(total, a, b) if traced() else total.addcmul_(a, b)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, *tensors: Some) -> tuple[Tensor, ...]:
        ctx.formula = formula
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return formula(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Some) -> tuple[Some, ...]:
        tensors: tuple[Some, ...] = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        there = [cotangent is not None for cotangent in cotangents]
        gradients = ctx.formula.gradients(needed, there)
        cotangents = tuple(cotangent for cotangent in cotangents if cotangent is not None)
        if torch.is_grad_enabled():
            found = _Recomputed.apply(gradients, *tensors, *cotangents)
        else:
            found = gradients(*tensors, *cotangents)
        values = iter(found)  # pyright: ignore[reportArgumentType]
        return None, *(next(values) if need else None for need in needed)
