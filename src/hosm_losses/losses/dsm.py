"""Denoising score matching as functions and as modules.

Each function takes a ScoreModel and clean data, and returns the loss as a differentiable tensor,
by default a scalar. Each module can be wrapped in DDP, FSDP2, torch.compile or activation
checkpointing. Its `forward` computes the whole loss, so every use of a parameter is inside the
wrapped call. Each module stores the ScoreModel as `model` and accepts the same options as the
loss function of the same order. `objective` documents the formula. `terms` documents the
residuals, cites their source, and explains why lower orders are detached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from inspect import Parameter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, TypeVar, Unpack, overload

import torch
from torch import Tensor, nn

from hosm_losses._checks import check_flag, error_message, shown
from hosm_losses.derivatives import Engine
from hosm_losses.losses.objective import dsm, row_losses
from hosm_losses.losses.options import (
    LossOptions,
    Probes,
    Reduction,
    TermWeights,
    check_weights,
)
from hosm_losses.losses.targets import AveragedTargets, Targets, TargetScores, check_targets
from hosm_losses.losses.terms import DSMTerms, LoggedTerms
from hosm_losses.losses.weighting import TimeSampler, Weighting, check_time_sampler
from hosm_losses.model import ScoreModel, check_model, refuse_wrapped

# Each keyword argument is declared once, in these types. `_signed` makes of them what `help` and
# `inspect.signature` show, with the defaults of `LossOptions`, or None.


class _FirstInputs(TypedDict, total=False):
    t: Tensor | None
    noise: Tensor | None
    targets: Targets
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None


class _HigherInputs(TypedDict, total=False):
    t: Tensor | None
    noise: Tensor | None
    probe: Tensor | None
    targets: AveragedTargets | TargetScores | None
    weights: TermWeights | None
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None


class _FirstOptions(TypedDict, total=False):
    weighting: Weighting
    time_sampler: TimeSampler
    antithetic: bool
    reduction: Reduction


class _HigherOptions(_FirstOptions, total=False):
    probes: Probes
    fraction: float
    engine: Engine


class _First(_FirstInputs, _FirstOptions): ...


class _Higher(_HigherInputs, _HigherOptions): ...


class _FirstModule(_FirstOptions, total=False):
    targets: AveragedTargets | TargetScores | None


class _HigherModule(_HigherOptions, total=False):
    targets: AveragedTargets | TargetScores | None
    weights: TermWeights | None


SHOWN = "t noise probe probes targets weights weighting time_sampler antithetic fraction engine "
SHOWN += "reduction generator model_kwargs"  # the order in which arguments are shown
OPTIONS = [field.name for field in fields(LossOptions) if field.name != "order"]
Function = TypeVar("Function", bound=Callable[..., Any])


def _signed(arguments: type) -> Callable[[Function], Function]:
    """Return a decorator that shows these arguments in place of a function's `**arguments`."""

    def decorate(function: Function) -> Function:
        shown: Any = function
        own = inspect.signature(function)
        parameters = [each for each in own.parameters.values() if each.kind != each.VAR_KEYWORD]
        for name in SHOWN.split():
            if name in arguments.__annotations__:
                kind = arguments.__annotations__[name].__forward_arg__
                default = getattr(LossOptions, name, None)
                parameters.append(
                    Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
                )
        shown.__signature__ = own.replace(parameters=parameters)
        shown.__annotations__ = {each.name: each.annotation for each in parameters}
        shown.__annotations__["return"] = own.return_annotation
        return function

    return decorate


def _check_names(function: str, given: Iterable[str], arguments: Any) -> None:
    for name in given:
        if name not in arguments.__optional_keys__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def _loss(order: int, model: ScoreModel, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
    name = ("first", "second", "third")[order - 1]
    _check_names(f"{name}_order_dsm", arguments, _First if order == 1 else _Higher)
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    return dsm(model, x0, LossOptions(order, **options), **arguments).loss


@_signed(_First)
def first_order_dsm(model: ScoreModel, x0: Tensor, **arguments: Unpack[_First]) -> Tensor:
    """Return the first-order loss, ‖ε̂ − ε‖²/d, the usual training loss of diffusion models.

    With prediction="epsilon" and data in float32 or float64, this loss equals, up to rounding
    error, the noise-prediction loss of any trainer with the same α and σ. With half-precision
    data, the residual is formed and squared in float32. The network's operators are replaced by
    safe primitives only inside a `torch.func` transform. See `third_order_dsm` for the arguments.

    Returns:
        The loss, in float32 or float64. The loss is dimensionless; with weighting="likelihood", it
        is in nats and includes a constant that does not depend on the model.

    Raises:
        TypeError: as in `third_order_dsm`.
        ValueError: as in `third_order_dsm`.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(lambda x, t: 0 * x, VPSchedule())
        >>> x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
        >>> float(first_order_dsm(model, x0, noise=noise))
        1.0
    """
    return _loss(1, model, x0, {**arguments})


@_signed(_Higher)
def second_order_dsm(model: ScoreModel, x0: Tensor, **arguments: Unpack[_Higher]) -> Tensor:
    """Return the loss of orders one and two; order two fits the Jacobian ∂s/∂x and its trace.

    See `third_order_dsm` for the arguments. The `weights` are (first, second, trace). A fourth
    weight, for order three, is ignored.

    Returns:
        The loss, which is w₁ first + w₂ second + w_t trace.

    Raises:
        TypeError: as in `third_order_dsm`.
        ValueError: as in `third_order_dsm`.
        DerivativeError: as in `third_order_dsm`.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> second_order_dsm(model, torch.zeros(4, 2)).shape
        torch.Size([])
    """
    return _loss(2, model, x0, {**arguments})


@_signed(_Higher)
def third_order_dsm(model: ScoreModel, x0: Tensor, **arguments: Unpack[_Higher]) -> Tensor:
    """Return the loss of orders one to three; order three fits the gradient of tr ∂s/∂x.

    The three orders fit the score, its Jacobian and the gradient of the Jacobian's trace. Under
    regularity conditions, the errors in these three together bound the KL divergence from the
    distribution of the data to the distribution defined by the model's probability-flow ODE.

    Args:
        model: the score model.
        x0: data (B, *).
        t: times (B,) in the schedule's units; if None, they are drawn as `time_sampler` specifies.
        noise: ε (B, *); drawn if None.
        probe: v, of shape (B, *) or (K, B, *), used unchanged; drawn if None. If you pass `probe`,
            `probes` only selects how the estimates are combined. `Paired()` requires K ≥ 2
            vectors.
        probes: the number of probes for each sample, and how the estimates from the probes are
            combined. A whole number K means `Hutchinson(K)`: the residual along each probe is
            squared, as in the paper. `Paired()` instead computes the trace and third terms as
            products of two independent estimates, each from one half of the probes. The loss then
            has the same mean as with "exact", and the probes add almost no noise to it. However, a
            step costs about twice as much as with probes=1. "exact" uses all d unit vectors as
            probes. At order two, all probes of a sample share one dropout mask. At order three,
            they share one mask only with `Paired()` in the reverse engine or with "exact" in the
            taylor engine; otherwise, each probe has its own mask.
        targets: the regression target; None means the drawn noise ε, as in the paper.
            `AveragedTargets()` averages the target over all data points that may have produced x.
            This removes the noise that the random choice of x₀ adds to the targets of every order.
            `TargetScores(scores)` reduces the same noise without reference data, but requires the
            score ∇log p₀ of the data. At order one, a call also accepts a tensor (B, *), such as a
            teacher's prediction. The tensor replaces ε only in the residual, not in x. Therefore,
            also pass the `t` and `noise` of the x for which the tensor was computed.
        weights: the weights (first, second, trace, third), as an array, a tensor, or a list or
            tuple of nonnegative numbers or one-element tensors. "paper" means (1, 1, 1, 1), as in
            the paper's code for images. "paper-toy" means (1, 0.5, 0, 0.1 d²), as in the paper's
            script for low-dimensional data. None means (1, 0.5, 0, min(1, 0.1 d²)). If all weights
            of an order and of all higher orders are 0 (a number, not a tensor), these orders are
            not evaluated and add no cost. You can therefore ramp up the weights from (1, 0, 0, 0),
            which selects the first-order loss. A term whose weight is a zero tensor is still
            computed.
        weighting: "noise" leaves the terms unchanged. "native" turns the first term into the
            squared error of the network's own prediction. `EDMWeighting()` turns the first term
            into the loss of EDM's trainer. "likelihood" turns the first term into the
            likelihood-weighted loss. In that case, set the `weights` of the higher orders
            yourself. None of these options changes the means of the higher-order terms. If you
            pass a callable t → (B,), every term is multiplied by the values that it returns.
        time_sampler: "schedule" draws t from the schedule's own distribution. "log_sigma_hat"
            draws log σ̂ uniformly. It also reweights the terms, so that every term has the same
            mean as with "schedule". If the schedule is a table, the times are integer indices into
            the table. `AdaptiveTimes()` learns at which times the loss needs the most samples.
            Times from a callable (batch size, generator) → t (B,) are treated as if you had passed
            them as `t`. None means "log_sigma_hat" if weighting="likelihood", and "schedule"
            otherwise.
        antithetic: whether each sample is perturbed with both ε and −ε, at the same t. If so,
            every term of a sample is the average over both perturbations, even with
            reduction="none". The average has the same mean as the term of a single perturbation.
            Where the density of the data is smooth at the scale of the noise, the average has a
            lower variance than an average over two independent perturbations. The noisy batch then
            contains 2B rows, so halve the number of samples to keep the cost of a step the same.
            If you pass `noise`, it is used as +ε. The two halves of the noisy batch share their
            probes and `model_kwargs`, but dropout draws a separate mask for each half.
        fraction: the fraction of the batch on which orders two and three are evaluated;
            max(1, round(fraction · B)) rows are chosen at random. The loss stays unbiased.
        engine: "auto", "taylor" or "reverse"; see the page on derivatives.
        reduction: "mean" or "sum" over the batch, or "none" for the loss of each sample, (B,).
        generator: the random generator, on the device of x0; None uses the global generator.
        model_kwargs: keyword arguments for the network. A tensor whose first dimension is B is
            assumed to contain one row per sample. When samples are repeated for the probes or
            selected for `fraction`, their rows are repeated or selected as well. If such a tensor
            is instead shared by all samples, wrap it in `Shared`.

    Returns:
        The loss, which is w₁ first + w₂ second + w_t trace + w₃ third.

    Raises:
        TypeError: if an argument has an invalid type or dtype, for example if images have an
            integer dtype.
        ValueError: if an argument has an invalid shape, device, name or value; on the CPU, also if
            an argument or the result is not finite.
        DerivativeError: if the network cannot be differentiated, or (on the CPU) if its
            derivatives are not finite.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> network = torch.nn.Linear(2, 2)
        >>> model = ScoreModel(lambda x, t: network(x), VPSchedule())
        >>> loss = third_order_dsm(model, torch.randn(4, 2), probes=2)
        >>> loss.backward()
        >>> network.weight.grad.shape
        torch.Size([2, 2])
    """
    return _loss(3, model, x0, {**arguments})


def dsm_terms(
    model: ScoreModel,
    x0: Tensor,
    *,
    order: int = 3,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    probe: Tensor | None = None,
    probes: Probes = 1,
    targets: Targets = None,
    antithetic: bool = False,
    engine: Engine = "auto",
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> DSMTerms:
    """Return the unweighted terms of the loss for each sample, attached to the autograd graph.

    `order` is 1, 2 or 3; options that concern only orders above `order` are ignored. See
    `third_order_dsm` for the other arguments.

    Returns:
        The terms, each of shape (B,), in float32 or float64. The terms of orders above `order`
        are None.

    Raises:
        TypeError: as in `third_order_dsm`.
        ValueError: as in `third_order_dsm`.
        DerivativeError: as in `third_order_dsm`.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> terms = dsm_terms(model, torch.zeros(4, 2), order=2)
        >>> terms.trace.shape, terms.third
        (torch.Size([4]), None)
    """
    return dsm(
        model,
        x0,
        LossOptions(order, probes=probes, antithetic=antithetic, engine=engine),
        t=t,
        noise=noise,
        probe=probe,
        targets=targets,
        generator=generator,
        model_kwargs=model_kwargs,
    ).terms()


class _DSM(nn.Module):
    order: ClassVar[int]

    def __init__(self, model: ScoreModel, arguments: Any, options: dict[str, Any]) -> None:
        super().__init__()
        _check_names(type(self).__name__, options, arguments)
        targets, weights = options.pop("targets", None), options.pop("weights", None)
        check_time_sampler(time_sampler := options.pop("time_sampler", None))
        if isinstance(weights, nn.Parameter):  # nn.Module would register it for training
            expected = "numbers, or tensors that are not trained"
            raise TypeError(error_message("weights", expected, weights, got="a Parameter"))
        if isinstance(targets, TargetScores) and isinstance(targets.scores, Tensor):
            expected = "a callable in a constructor, or the scores of the batch in each call"
            raise TypeError(error_message("targets", expected, targets.scores))
        self.options, self.weights = LossOptions(self.order, **options), weights
        self.targets, self.model = check_targets(targets, tensor=False), check_model(model)
        self.time_sampler: TimeSampler = time_sampler
        if self.order > 1:
            check_weights(weights, self.order)
            refuse_wrapped(model.network)

    def extra_repr(self) -> str:
        values = vars(self.options) | vars(self) | {"time_sampler": self.time_sampler}
        names = list(inspect.signature(type(self)).parameters)[1:]
        numbers = {"weights": repr(values.get("weights"))}  # printed in full, even if a tensor
        return ", ".join(f"{name}={numbers.get(name) or shown(values[name])}" for name in names)

    def _evaluate(self, x0: Tensor, return_terms: bool, inputs: dict[str, Any], known: Any) -> Any:
        """Return the loss or, if `return_terms` is True, the pair (loss, detached terms)."""
        _check_names(f"{type(self).__name__}.forward", inputs, known)
        check_flag("return_terms", return_terms)
        own = self._or_own(inputs.pop("targets", None), inputs.pop("weights", None))
        own["time_sampler"] = self.time_sampler
        evaluated = dsm(self.model, x0, self.options, **inputs, **own)
        if not return_terms:
            return evaluated.loss
        detached: list[Any] = [
            None if term is None else term.detach() for term in evaluated.terms()
        ]
        terms = LoggedTerms(*detached)
        terms.t, terms.rows = evaluated.t.detach(), evaluated.rows
        if not torch.compiler.is_compiling():
            detached[0]._logged = {"t": terms.t, "rows": terms.rows}
        return evaluated.loss, terms

    def _or_own(self, targets: Any, weights: Any) -> dict[str, Any]:
        return {
            "targets": self.targets if targets is None else targets,
            "weights": self.weights if weights is None else weights,
        }

    def _row_losses(
        self, x0: Tensor, t: Tensor, rows: Tensor, *, targets: Any, weights: Any, **inputs: Any
    ) -> nn.Module:
        """Return a module that computes per-sample losses, for use by `AdaptiveTimes`."""
        own = self._or_own(targets, weights)
        return row_losses(self.model, x0, self.options, t, rows, **inputs, **own)

    if TYPE_CHECKING:  # nn.Module does not annotate __call__

        @overload
        def __call__(
            self,
            x0: Tensor,
            *,
            return_terms: Literal[False] = ...,
            **inputs: Unpack[_HigherInputs],
        ) -> Tensor: ...
        @overload
        def __call__(
            self, x0: Tensor, *, return_terms: Literal[True], **inputs: Unpack[_HigherInputs]
        ) -> tuple[Tensor, LoggedTerms]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class FirstOrderDSM(_DSM):
    """`first_order_dsm` as a module.

    Raises:
        TypeError: if the model is not a `ScoreModel`, or if an option has the wrong type.
        ValueError: if an option has an invalid value.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> loss = FirstOrderDSM(ScoreModel(lambda x, t: 0 * x, VPSchedule()))
        >>> loss(torch.zeros(2, 3), noise=torch.ones(2, 3))
        tensor(1.)
    """

    order = 1

    @_signed(_FirstModule)
    def __init__(self, model: ScoreModel, **options: Unpack[_FirstModule]) -> None:
        super().__init__(model, _FirstModule, {**options})

    @_signed(_FirstInputs)
    def forward(
        self, x0: Tensor, *, return_terms: bool = False, **inputs: Unpack[_FirstInputs]
    ) -> Tensor | tuple[Tensor, LoggedTerms]:
        """Return the loss or, if `return_terms` is True, the pair (loss, detached terms).

        The inputs are the same as for `first_order_dsm`. `targets` overrides the constructor's
        targets.
        """
        return self._evaluate(x0, return_terms, {**inputs}, _FirstInputs)


class _HigherOrderDSM(_DSM):
    @_signed(_HigherModule)
    def __init__(self, model: ScoreModel, **options: Unpack[_HigherModule]) -> None:
        super().__init__(model, _HigherModule, {**options})

    @_signed(_HigherInputs)
    def forward(
        self, x0: Tensor, *, return_terms: bool = False, **inputs: Unpack[_HigherInputs]
    ) -> Tensor | tuple[Tensor, LoggedTerms]:
        """Return the loss or, if `return_terms` is True, the pair (loss, detached terms).

        The inputs are the same as for `third_order_dsm`. `weights` and `targets` override the
        constructor's arguments of the same names. Pass them, for example, to ramp up the weights
        or to change the reference data.
        """
        return self._evaluate(x0, return_terms, {**inputs}, _HigherInputs)


class SecondOrderDSM(_HigherOrderDSM):
    """`second_order_dsm` as a module.

    Raises:
        TypeError: if the model is not a `ScoreModel`, or if an option has the wrong type.
        ValueError: if an option has an invalid value.

    Example:
        >>> import torch
        >>> from hosm_losses import Hutchinson, VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> loss = SecondOrderDSM(model, probes=Hutchinson(2, "gaussian"))
        >>> loss(torch.zeros(4, 3)).shape
        torch.Size([])
    """

    order = 2


class ThirdOrderDSM(_HigherOrderDSM):
    """`third_order_dsm` as a module.

    Raises:
        TypeError: if the model is not a `ScoreModel`, or if an option has the wrong type.
        ValueError: if an option has an invalid value.

    Example:
        >>> import torch
        >>> from hosm_losses import Paired, VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> loss = ThirdOrderDSM(model, probes=Paired())
        >>> value, terms = loss(torch.zeros(4, 3), return_terms=True)
        >>> terms.third.shape, terms.t.shape
        (torch.Size([4]), torch.Size([4]))
    """

    order = 3
