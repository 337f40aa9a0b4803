"""Denoising score matching as modules: what DDP, FSDP2, torch.compile and checkpointing wrap.

Each holds the ScoreModel as `model` and the options of the function of the same order, and
computes the loss in its forward, so that a wrapper around it sees every use of a parameter.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from hosm_losses._checks import check_flag
from hosm_losses._torch_internals import checkpoint_hook, transformed
from hosm_losses.losses.balance import Balance
from hosm_losses.losses.objective import Evaluated, evaluate
from hosm_losses.losses.options import (
    STEIN_DEFAULTS,
    FirstOrderInputs,
    FirstOrderOptions,
    HigherOrderInputs,
    LossOptions,
    Recipe,
    SecondOrderOptions,
    SteinChoices,
    SteinInputs,
    SteinOptions,
    ThirdOrderOptions,
    Weights,
    check_weights,
    refuse_unknown,
    spelled_out,
)
from hosm_losses.losses.stein import LoggedSteinTerms
from hosm_losses.losses.targets import check_targets
from hosm_losses.losses.terms import LoggedTerms
from hosm_losses.model import ScoreModel, check_model, refuse_wrapped


class _Objective(nn.Module):
    order: ClassVar[int]
    choices: ClassVar[type]
    inputs: ClassVar[type] = HigherOrderInputs
    options: LossOptions
    weights: Weights | Recipe | None
    balance: Balance | None

    def __init__(self, model: ScoreModel, **options: Any) -> None:
        super().__init__()
        refuse_unknown(type(self).__name__, self.choices, options)
        self.weights, self.balance = _untrained("weights", options.pop("weights", None)), None
        self.targets = check_targets(options.pop("targets", None), tensor=False)
        self.options = LossOptions(order=self.order, **options)
        self.model = check_model(model)
        if self.order > 1:
            refuse_wrapped(model.network)
        if self.order > 1 and isinstance(self.weights, str) and self.weights == "balanced":
            if isinstance(self.options.weighting, tuple):
                raise ValueError(
                    "weighting: expected one for all terms with weights='balanced', which takes "
                    "the higher terms at the weighting of the first; got a pair."
                )
            device = next((each.device for each in model.parameters()), None)
            self.balance = Balance(self.order + 1, device)
        else:
            check_weights(self.weights, self.order)

    def extra_repr(self) -> str:
        """The options and the weights, for print."""
        shown = {**vars(self.options), "weights": self.weights, "targets": self.targets}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def forward(
        self, x0: Tensor, *, return_terms: bool = False, **inputs: Unpack[HigherOrderInputs]
    ) -> Tensor | tuple[Tensor, LoggedTerms]:
        """Return the loss, or (loss, detached terms); inputs as in `third_order_dsm`.

        `weights` given here, for a ramp, stands before those of the constructor. Numbers multiply
        the balanced ones. So does `targets`, as for a reference that changes.
        """
        refuse_unknown(f"{type(self).__name__}.forward", self.inputs, inputs)
        check_flag("return_terms", return_terms)
        given = {"weights": None, "targets": self.targets} | _given(inputs)
        weights, balance = given["weights"], self.balance
        if balance is None:
            given["weights"] = self.weights if weights is None else weights
        elif isinstance(weights, str):
            balance = None if weights == "paper" else balance
            given["weights"] = "paper"
        if balance is not None and balance.training:
            _check_kept_once()
        found = evaluate(self.model, x0, self.options, balance=balance, **given)
        return _returned(found, LoggedTerms, return_terms)

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


def _untrained(name: str, weight: Any) -> Any:
    """The weights of a module, which registers a Parameter as one to be trained."""
    if isinstance(weight, nn.Parameter):
        raise ValueError(
            f"{name}: expected numbers, or tensors that are not trained; got a Parameter, which "
            "the optimizer would drive to zero. Give weights that follow a rule to each call."
        )
    return weight


def _given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call without those that are None, as if they were left out."""
    return {name: each for name, each in inputs.items() if each is not None}


def _check_kept_once() -> None:
    """Raise where the sizes of the terms would be taken up twice, or cannot be."""
    what = "torch.func" if transformed() else "a checkpoint" if checkpoint_hook() else None
    if what is not None:
        raise ValueError(
            f"weights: expected numbers under {what}; got 'balanced', whose running means a "
            "training step changes once. Split the batch and accumulate gradients in place of a "
            "checkpoint, or call .eval() on the loss's `balance` for means that stay."
        )


def _returned(found: Evaluated, logged: Any, return_terms: bool) -> Any:
    """The loss, or with it the detached terms."""
    if not return_terms:
        return found.loss
    terms = logged(*[None if term is None else term.detach() for term in found.terms])
    terms.t, terms.rows = found.t.detach(), found.rows
    if not torch.compiler.is_compiling():
        terms.first._logged = {"t": terms.t, "rows": terms.rows}
    return found.loss, terms


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


class SteinDSM(nn.Module):
    """`stein_dsm` as a module.

    Args:
        model: the score model.
        **options: those shown, as in `stein_dsm`.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> loss = SteinDSM(ScoreModel(lambda x, t: 0.5 * x, VPSchedule()), weight=0.3)
        >>> value, terms = loss(torch.zeros(4, 3), return_terms=True)
        >>> terms.rate.shape
        torch.Size([4])
    """

    @partial(spelled_out, defaults=STEIN_DEFAULTS)
    def __init__(self, model: ScoreModel, **options: Unpack[SteinChoices]) -> None:
        super().__init__()
        refuse_unknown("SteinDSM", SteinChoices, options)
        chosen: dict[str, Any] = dict(options)
        self.weight: float | Tensor | None = _untrained("weight", chosen.pop("weight", 1.0))
        self.targets = check_targets(chosen.pop("targets", None), tensor=False)
        self.options = SteinOptions(**chosen)
        self.model = check_model(model)
        refuse_wrapped(model.network)
        self.options.checked(self.weight, 1)

    def extra_repr(self) -> str:
        """The options and the weight, for print."""
        shown, names = vars(self.options) | vars(self), sorted(SteinChoices.__optional_keys__)
        return ", ".join(f"{name}={shown[name]!r}" for name in names)

    def forward(
        self, x0: Tensor, *, return_terms: bool = False, **inputs: Unpack[SteinInputs]
    ) -> Tensor | tuple[Tensor, LoggedSteinTerms]:
        """Return the loss, or (loss, detached terms); inputs as in `stein_dsm`.

        `weight` and `targets` given here stand before those of the constructor.
        """
        refuse_unknown("SteinDSM.forward", SteinInputs, inputs)
        check_flag("return_terms", return_terms)
        given = {"weight": self.weight, "targets": self.targets} | _given(inputs)
        weight = given.pop("weight")
        found = evaluate(self.model, x0, self.options, weights=weight, **given)
        return _returned(found, LoggedSteinTerms, return_terms)

    if TYPE_CHECKING:  # nn.Module gives no type to a call

        @overload
        def __call__(
            self, x0: Tensor, *, return_terms: Literal[False] = ..., **inputs: Unpack[SteinInputs]
        ) -> Tensor: ...
        @overload
        def __call__(
            self, x0: Tensor, *, return_terms: Literal[True], **inputs: Unpack[SteinInputs]
        ) -> tuple[Tensor, LoggedSteinTerms]: ...
        def __call__(self, x0: Tensor, **inputs: Any) -> Any:
            """Call `forward`."""
            ...
