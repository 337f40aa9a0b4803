"""Denoising score matching as modules: what DDP, FSDP2, torch.compile and checkpointing wrap.

Each holds the ScoreModel as `model` and the options of the function of the same order, and
computes the loss in its forward, so that a wrapper around it sees every use of a parameter.
"""

import inspect
from collections.abc import Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

import torch
from torch import Tensor, nn

from hosm_losses._checks import check_flag, complaint
from hosm_losses._torch_internals import checkpoint_hook, transformed
from hosm_losses.derivatives import Engine
from hosm_losses.losses.arguments import (
    STEIN,
    Given,
    ModuleRecipe,
    Options,
    Probes,
    Reduction,
    Third,
    Weights,
    check_weight,
    check_weights,
)
from hosm_losses.losses.balance import Balance
from hosm_losses.losses.objective import evaluate
from hosm_losses.losses.stein import LoggedSteinTerms
from hosm_losses.losses.targets import AveragedTargets, Targets, check_targets
from hosm_losses.losses.terms import LoggedTerms
from hosm_losses.losses.weighting import TimeSampler, Weighting
from hosm_losses.model import ScoreModel, check_model, refuse_wrapped
from hosm_losses.probes import Hutchinson

Terms = TypeVar("Terms")


class _Inputs(TypedDict, total=False):
    t: Tensor | None
    noise: Tensor | None
    probe: Tensor | None
    targets: Targets
    weights: Weights | ModuleRecipe | None
    weight: float | Tensor | None
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None


class _Loss(nn.Module, Generic[Terms]):
    """What the modules share: the model, the options, and what a call need not give."""

    logged: ClassVar[type] = LoggedTerms
    balance: Balance | None

    def __init__(
        self, model: ScoreModel, options: Options, targets: Targets, weights: Any = None
    ) -> None:
        super().__init__()
        if isinstance(weights, nn.Parameter):  # which a module registers as one to be trained
            name, got = "weight" if options.stein else "weights", "a Parameter"
            expected = (
                "numbers, or tensors that are not trained, which an optimizer drives to zero"
            )
            raise ValueError(complaint(name, expected, weights, got=got))
        self.options, self.weights = options, weights
        self.targets = check_targets(targets, tensor=False)
        self.model, self.balance = check_model(model), None
        if options.order > 1:
            refuse_wrapped(model.network)

    def extra_repr(self) -> str:
        """The arguments of the constructor, for print."""
        known = vars(self.options) | {"targets": self.targets, "weight": self.weights}
        known["weights"] = self.weights
        names = list(inspect.signature(type(self).__init__).parameters)[2:]
        return ", ".join(f"{name}={known[name]!r}" for name in names)

    def _evaluated(self, x0: Tensor, given: Given, return_terms: bool) -> Any:
        """The loss, or (loss, detached terms); what is None is that of the constructor."""
        check_flag("return_terms", return_terms)
        weights = self.weights if given.weights is None else given.weights
        targets = self.targets if given.targets is None else given.targets
        balance = self.balance
        if balance is not None and isinstance(weights, str):
            weights, balance = ("paper", balance) if weights == "balanced" else (weights, None)
        if balance is not None and balance.training:
            _check_kept_once()
        given = given._replace(weights=weights, targets=targets)
        found = evaluate(self.model, x0, self.options, given, balance)
        if not return_terms:
            return found.loss
        detached = [None if term is None else term.detach() for term in found.terms]
        terms = self.logged(*detached)
        terms.t, terms.rows = found.t.detach(), found.rows
        if not torch.compiler.is_compiling():
            terms.first._logged = {"t": terms.t, "rows": terms.rows}
        return found.loss, terms

    if TYPE_CHECKING:  # nn.Module gives no type to a call; each forward says what it takes

        @overload
        def __call__(
            self, x0: Tensor, *, return_terms: Literal[False] = ..., **inputs: Unpack[_Inputs]
        ) -> Tensor: ...
        @overload
        def __call__(
            self, x0: Tensor, *, return_terms: Literal[True], **inputs: Unpack[_Inputs]
        ) -> tuple[Tensor, Terms]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _check_kept_once() -> None:
    """Raise where the sizes of the terms would be taken up twice, or cannot be."""
    what = "torch.func" if transformed() else "a checkpoint" if checkpoint_hook() else None
    if what is not None:
        raise ValueError(
            f"weights: expected numbers under {what}; got 'balanced', whose running means a step "
            "changes once. Accumulate gradients, or call .eval() on the loss's `balance`."
        )


class FirstOrderDSM(_Loss[LoggedTerms]):
    """`first_order_dsm` as a module.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> loss = FirstOrderDSM(ScoreModel(lambda x, t: 0 * x, VPSchedule()))
        >>> loss(torch.zeros(2, 3), noise=torch.ones(2, 3))
        tensor(1.)
    """

    def __init__(
        self,
        model: ScoreModel,
        *,
        targets: AveragedTargets | None = None,
        weighting: Weighting = "noise",
        time_sampler: TimeSampler = None,
        reduction: Reduction = "mean",
    ) -> None:
        options = Options(1, weighting=weighting, time_sampler=time_sampler, reduction=reduction)
        super().__init__(model, options, targets)

    def forward(
        self,
        x0: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        targets: Targets = None,
        generator: torch.Generator | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, LoggedTerms]:
        """Return the loss, or (loss, detached terms); inputs as in `first_order_dsm`.

        `targets` given here stand before those of the constructor.
        """
        given = Given(t, noise, None, targets, None, generator, model_kwargs)
        return self._evaluated(x0, given, return_terms)


class _HigherOrderDSM(_Loss[LoggedTerms]):
    """Orders two and three: what they are called with, and weights that follow the terms."""

    def __init__(
        self,
        model: ScoreModel,
        options: Options,
        targets: AveragedTargets | None,
        weights: Weights | ModuleRecipe | None,
    ) -> None:
        super().__init__(model, options, targets, weights)
        if not (isinstance(weights, str) and weights == "balanced"):
            check_weights(weights, options.order)
            return
        if isinstance(options.weighting, tuple):
            raise ValueError(
                "weighting: expected one for all terms with weights='balanced', which takes the "
                "higher terms at the weighting of the first; got a pair."
            )
        device = next((each.device for each in model.parameters()), None)
        self.balance = Balance(options.order + 1, device)

    def forward(
        self,
        x0: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        probe: Tensor | None = None,
        targets: AveragedTargets | None = None,
        weights: Weights | ModuleRecipe | None = None,
        generator: torch.Generator | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, LoggedTerms]:
        """Return the loss, or (loss, detached terms); inputs as in `third_order_dsm`.

        `weights` and `targets` given here, for a ramp or a reference that changes, stand before
        those of the constructor. Numbers multiply balanced weights.
        """
        given = Given(t, noise, probe, targets, weights, generator, model_kwargs)
        return self._evaluated(x0, given, return_terms)


class SecondOrderDSM(_HigherOrderDSM):
    """`second_order_dsm` as a module; `weights` may be "balanced", see `third_order_dsm`.

    Example:
        >>> import torch
        >>> from hosm_losses import Hutchinson, VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> loss = SecondOrderDSM(model, probes=Hutchinson(2, "gaussian"))
        >>> loss(torch.zeros(4, 3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: ScoreModel,
        *,
        probes: Probes = 1,
        targets: AveragedTargets | None = None,
        weights: Weights | ModuleRecipe | None = None,
        weighting: Weighting = "noise",
        time_sampler: TimeSampler = None,
        fraction: float = 1.0,
        engine: Engine = "auto",
        reduction: Reduction = "mean",
    ) -> None:
        options = Options(2, probes, engine, "exact", fraction, weighting, time_sampler, reduction)
        super().__init__(model, options, targets, weights)


class ThirdOrderDSM(_HigherOrderDSM):
    """`third_order_dsm` as a module; `weights` may be "balanced" as well.

    Example:
        >>> import torch
        >>> from hosm_losses import Paired, VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> loss = ThirdOrderDSM(model, probes=Paired(), weights="balanced")
        >>> value, terms = loss(torch.zeros(4, 3), return_terms=True)
        >>> terms.third.shape, terms.t.shape
        (torch.Size([4]), torch.Size([4]))
    """

    def __init__(
        self,
        model: ScoreModel,
        *,
        probes: Probes = 1,
        targets: AveragedTargets | None = None,
        weights: Weights | ModuleRecipe | None = None,
        weighting: Weighting = "noise",
        time_sampler: TimeSampler = None,
        third: Third = "exact",
        fraction: float = 1.0,
        engine: Engine = "auto",
        reduction: Reduction = "mean",
    ) -> None:
        options = Options(3, probes, engine, third, fraction, weighting, time_sampler, reduction)
        super().__init__(model, options, targets, weights)


class SteinDSM(_Loss[LoggedSteinTerms]):
    """`stein_dsm` as a module.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> loss = SteinDSM(ScoreModel(lambda x, t: 0.5 * x, VPSchedule()), weight=0.3)
        >>> value, terms = loss(torch.zeros(4, 3), return_terms=True)
        >>> terms.rate.shape
        torch.Size([4])
    """

    logged = LoggedSteinTerms

    def __init__(
        self,
        model: ScoreModel,
        *,
        probes: int | Hutchinson = 2,
        targets: AveragedTargets | None = None,
        weight: float | Tensor | None = 1.0,
        fraction: float = 1.0,
        engine: Engine = "auto",
        reduction: Reduction = "mean",
    ) -> None:
        options = Options(2, probes, engine, "exact", fraction, *STEIN, reduction, True)
        super().__init__(model, options, targets, weight)
        check_weight("weight", 1.0 if weight is None else weight)

    def forward(
        self,
        x0: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        probe: Tensor | None = None,
        targets: AveragedTargets | None = None,
        weight: float | Tensor | None = None,
        generator: torch.Generator | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, LoggedSteinTerms]:
        """Return the loss, or (loss, detached terms); inputs as in `stein_dsm`.

        `weight` and `targets` given here stand before those of the constructor.
        """
        given = Given(t, noise, probe, targets, weight, generator, model_kwargs)
        return self._evaluated(x0, given, return_terms)
