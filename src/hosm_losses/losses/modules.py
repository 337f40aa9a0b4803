"""Denoising score matching as modules: what DDP, FSDP2, torch.compile and checkpointing wrap.

Each holds the ScoreModel as `model` and the options of the function of the same order, and
computes the loss in its forward, so that a wrapper around it sees every use of a parameter.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack, overload

from torch import Tensor, nn

from hosm_losses.losses.objective import evaluate
from hosm_losses.losses.options import (
    FirstOrderInputs,
    FirstOrderOptions,
    HigherOrderInputs,
    LossOptions,
    SecondOrderOptions,
    ThirdOrderOptions,
    Weights,
    check_weights,
    refuse_unknown,
    spelled_out,
)
from hosm_losses.losses.terms import LoggedTerms
from hosm_losses.model import ScoreModel, check_model, refuse_wrapped


class _Objective(nn.Module):
    order: ClassVar[int]
    choices: ClassVar[type]
    inputs: ClassVar[type] = HigherOrderInputs

    def __init__(self, model: ScoreModel, **options: Any) -> None:
        super().__init__()
        refuse_unknown(type(self).__name__, self.choices, options)
        self.weights: Weights | None = options.pop("weights", None)
        self.options = LossOptions(order=self.order, **options)
        self.model = check_model(model)
        if self.order > 1:
            refuse_wrapped(model.network, thoroughly=True)
        check_weights(self.weights, self.order)

    def extra_repr(self) -> str:
        """The options and the weights, for print."""
        shown = {**vars(self.options), "weights": self.weights}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def forward(
        self, x0: Tensor, *, return_terms: bool = False, **inputs: Unpack[HigherOrderInputs]
    ) -> Tensor | tuple[Tensor, LoggedTerms]:
        """Return the loss, or (loss, detached terms); inputs as in `third_order_dsm`.

        `weights` given here, for a ramp, stands before those of the constructor.
        """
        refuse_unknown(f"{type(self).__name__}.forward", self.inputs, inputs)
        if inputs.get("weights") is None:
            inputs["weights"] = self.weights
        found = evaluate(self.model, x0, self.options, **inputs)
        if not return_terms:
            return found.loss
        return found.loss, LoggedTerms.of(found.terms, found.t, found.rows)

    if TYPE_CHECKING:  # nn.Module gives no type to a call

        @overload
        def __call__(
            self,
            x0: Tensor,
            *,
            return_terms: Literal[False] = ...,
            **inputs: Unpack[HigherOrderInputs],
        ) -> Tensor: ...
        @overload
        def __call__(
            self, x0: Tensor, *, return_terms: Literal[True], **inputs: Unpack[HigherOrderInputs]
        ) -> tuple[Tensor, LoggedTerms]: ...
        def __call__(self, x0: Tensor, **inputs: Any) -> Any: ...


class FirstOrderDSM(_Objective):
    """`first_order_dsm` as a module.

    Args:
        model: the score model.
        **options: those shown, as in `third_order_dsm`.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> loss = FirstOrderDSM(ScoreModel(lambda x, t: 0 * x, VPSchedule()))
        >>> loss(torch.zeros(2, 3), noise=torch.ones(2, 3))
        tensor(1.)
    """

    order, choices, inputs = 1, FirstOrderOptions, FirstOrderInputs

    @spelled_out
    def __init__(self, model: ScoreModel, **options: Unpack[FirstOrderOptions]) -> None:
        super().__init__(model, **options)


class SecondOrderDSM(_Objective):
    """`second_order_dsm` as a module.

    Args:
        model: the score model.
        **options: those shown, as in `second_order_dsm`.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> loss = SecondOrderDSM(ScoreModel(lambda x, t: 0.5 * x, VPSchedule()), probes=2)
        >>> loss(torch.zeros(4, 3)).shape
        torch.Size([])
    """

    order, choices = 2, SecondOrderOptions

    @spelled_out
    def __init__(self, model: ScoreModel, **options: Unpack[SecondOrderOptions]) -> None:
        super().__init__(model, **options)


class ThirdOrderDSM(_Objective):
    """`third_order_dsm` as a module.

    Args:
        model: the score model.
        **options: those shown, as in `third_order_dsm`.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> loss = ThirdOrderDSM(ScoreModel(lambda x, t: 0.5 * x, VPSchedule()))
        >>> value, terms = loss(torch.zeros(4, 3), return_terms=True)
        >>> terms.third.shape, terms.t.shape
        (torch.Size([4]), torch.Size([4]))
    """

    order, choices = 3, ThirdOrderOptions

    @spelled_out
    def __init__(self, model: ScoreModel, **options: Unpack[ThirdOrderOptions]) -> None:
        super().__init__(model, **options)
