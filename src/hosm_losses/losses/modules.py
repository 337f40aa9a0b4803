r"""Denoising score matching as modules: what DDP, FSDP2, torch.compile and checkpointing wrap.

What:
    Each holds the ScoreModel as `model` and the options of the function of the same order, and
    computes the loss in its forward, so that a wrapper around it sees every use of a parameter.
"""

__all__ = ["FirstOrderDSM", "SecondOrderDSM", "ThirdOrderDSM"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses.losses.objective import evaluate
from hosm_losses.losses.options import LossOptions, Probes, Weights, check_weights
from hosm_losses.losses.terms import DSMTerms
from hosm_losses.losses.weighting import Weighting
from hosm_losses.model import ScoreModel, check_model, refuse_wrapped

Loss = Tensor | tuple[Tensor, DSMTerms]


class _Objective(nn.Module):
    def __init__(self, model: ScoreModel, options: LossOptions) -> None:
        super().__init__()
        self.model = check_model(model)
        self.options = options

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())

    def _evaluate(self, x0: Tensor, return_terms: bool, **inputs: Any) -> Loss:
        loss, terms = evaluate(self.model, x0, self.options, **inputs)
        if not return_terms:
            return loss
        detached = [term.detach() for term in terms if term is not None]
        return loss, DSMTerms(*detached)


class FirstOrderDSM(_Objective):
    """`first_order_dsm` as a module.

    Args:
        model: the score model.
        weighting: as in `first_order_dsm`.
        reduction: as in `first_order_dsm`.

    Example:
        >>> from hosm_losses import VPSchedule
        >>> loss = FirstOrderDSM(ScoreModel(lambda x, t: 0 * x, VPSchedule()))
        >>> loss(torch.zeros(2, 3), noise=torch.ones(2, 3))
        tensor(1.)
    """

    def __init__(
        self, model: ScoreModel, *, weighting: Weighting = "noise", reduction: str = "mean"
    ) -> None:
        super().__init__(model, LossOptions(order=1, weighting=weighting, reduction=reduction))

    def forward(
        self,
        x0: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        return_terms: bool = False,
    ) -> Loss:
        """Return the loss, or (loss, detached DSMTerms); arguments as in `first_order_dsm`."""
        return self._evaluate(
            x0,
            return_terms,
            t=t,
            noise=noise,
            generator=generator,
            model_kwargs=model_kwargs,
        )


class _HigherOrder(_Objective):
    def __init__(
        self, model: ScoreModel, options: LossOptions, weights: Weights | None = None
    ) -> None:
        super().__init__(model, options)
        refuse_wrapped(model.network, thoroughly=True)
        check_weights(weights, options.order)
        self.weights = weights

    def forward(
        self,
        x0: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        probe: Tensor | None = None,
        generator: torch.Generator | None = None,
        weights: Weights | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        return_terms: bool = False,
    ) -> Loss:
        """Return the loss, or (loss, detached DSMTerms); arguments as in `third_order_dsm`.

        `weights` given here, for a ramp, stands before those of the constructor.
        """
        return self._evaluate(
            x0,
            return_terms,
            t=t,
            noise=noise,
            probe=probe,
            generator=generator,
            weights=self.weights if weights is None else weights,
            model_kwargs=model_kwargs,
        )


class SecondOrderDSM(_HigherOrder):
    """`second_order_dsm` as a module; the constructor takes its options.

    Example:
        >>> from hosm_losses import VPSchedule
        >>> loss = SecondOrderDSM(ScoreModel(lambda x, t: 0.5 * x, VPSchedule()), probes=2)
        >>> loss(torch.zeros(4, 3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: ScoreModel,
        *,
        probes: Probes = 1,
        distribution: str = "rademacher",
        weights: Weights | None = None,
        weighting: Weighting = "noise",
        derivative: str = "auto",
        fraction: float = 1.0,
        chunks: int = 1,
        reduction: str = "mean",
    ) -> None:
        options = LossOptions(
            order=2,
            probes=probes,
            distribution=distribution,
            weighting=weighting,
            derivative=derivative,
            fraction=fraction,
            chunks=chunks,
            reduction=reduction,
        )
        super().__init__(model, options, weights)


class ThirdOrderDSM(_HigherOrder):
    """`third_order_dsm` as a module; the constructor takes its options.

    Example:
        >>> from hosm_losses import VPSchedule
        >>> loss = ThirdOrderDSM(ScoreModel(lambda x, t: 0.5 * x, VPSchedule()))
        >>> value, terms = loss(torch.zeros(4, 3), return_terms=True)
        >>> terms.third.shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: ScoreModel,
        *,
        probes: Probes = 1,
        distribution: str = "rademacher",
        weights: Weights | None = None,
        weighting: Weighting = "noise",
        derivative: str = "auto",
        third: str = "exact",
        fraction: float = 1.0,
        chunks: int = 1,
        reduction: str = "mean",
    ) -> None:
        options = LossOptions(
            order=3,
            probes=probes,
            distribution=distribution,
            weighting=weighting,
            derivative=derivative,
            third=third,
            fraction=fraction,
            chunks=chunks,
            reduction=reduction,
        )
        super().__init__(model, options, weights)
