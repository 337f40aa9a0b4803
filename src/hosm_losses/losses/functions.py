"""Denoising score matching as functions: orders one, two and three, and their terms.

Each takes a ScoreModel and clean data, and returns a scalar to call backward on. The formula is in
`objective`, the residuals, their detach and the source in `terms`.
"""

from functools import partial
from typing import Any, Unpack

from torch import Tensor

from hosm_losses.losses.objective import Evaluated, evaluate
from hosm_losses.losses.options import (
    STEIN_DEFAULTS,
    FirstOrderArguments,
    HigherOrderInputs,
    LossOptions,
    SecondOrderArguments,
    SteinArguments,
    SteinInputs,
    SteinOptions,
    TermsArguments,
    ThirdOrderArguments,
    refuse_unknown,
    spelled_out,
)
from hosm_losses.losses.terms import DSMTerms
from hosm_losses.model import ScoreModel


@spelled_out
def first_order_dsm(
    model: ScoreModel, x0: Tensor, **arguments: Unpack[FirstOrderArguments]
) -> Tensor:
    """Denoising score matching of order one, ‖ε̂ − ε‖²/d: the loss of every diffusion trainer.

    The safe primitives are not used: with prediction="epsilon" it is the old loss to the last bit,
    given the same α and σ and data in float32 or float64. Half precision is squared in float32.

    Args:
        model: the score model.
        x0: data (B, *).
        **arguments: those shown, as in `third_order_dsm`, which also says what is raised.

    Returns:
        The loss, in float32 at least. Dimensionless; in nats, up to a constant, with
        weighting="likelihood".

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(lambda x, t: 0 * x, VPSchedule())
        >>> x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
        >>> float(first_order_dsm(model, x0, noise=noise))
        1.0
    """
    return _evaluated("first_order_dsm", 1, FirstOrderArguments, model, x0, arguments).loss


@spelled_out
def second_order_dsm(
    model: ScoreModel, x0: Tensor, **arguments: Unpack[SecondOrderArguments]
) -> Tensor:
    """Order one with order two: the Jacobian of the score and its trace as well.

    Args:
        model: the score model.
        x0: data (B, *).
        **arguments: those shown, as in `third_order_dsm`, which also says what is raised. Of
            `weights` (first, second, trace) a fourth number, that of order three, is not used.

    Returns:
        The loss, w₁ first + w₂ second + w_t trace.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> second_order_dsm(model, torch.zeros(4, 2)).shape
        torch.Size([])
    """
    return _evaluated("second_order_dsm", 2, SecondOrderArguments, model, x0, arguments).loss


@spelled_out
def third_order_dsm(
    model: ScoreModel, x0: Tensor, **arguments: Unpack[ThirdOrderArguments]
) -> Tensor:
    """Orders one, two and three: the gradient of the Jacobian's trace as well.

    These three orders together bound the KL divergence of the model's probability-flow ODE.

    Args:
        model: the score model.
        x0: data (B, *).
        t: times (B,) in the schedule's units; drawn as `time_sampler` says if None.
        noise: ε (B, *); drawn if None.
        targets: what the residuals compare with. None is ε, as in the paper. `AveragedTargets()`
            averages over all data that may have led to x, which takes the noise of the data out
            of every order. A tensor (B, *), in a call of order one, stands in the place of ε in
            the residual and not in x: the prediction of a teacher, for example.
        probe: v, of shape (B, *) or (K, B, *), with K of 2 or more for "paired", used as it is;
            drawn if None.
        probes: K, the number of probes a sample, or "exact" for all d unit vectors. None is 1, and
            2 with estimator="paired". Dropout draws one mask for all probes of a sample; at exact
            order three one for each, unless they are paired in reverse mode.
        estimator: "hutchinson" squares the residual along each probe, as in the paper. "paired"
            multiplies the estimates of two independent probes, or halves of the probes, with each
            other. Its mean is that of probes="exact", almost without the noise of the probes, for
            about twice the cost of a step with one. Terms of single samples may then be
            negative.
        distribution: "rademacher", "gaussian", "sphere" or "dct". Not with probes="exact".
        weights: (first, second, trace, third), numbers of at least 0 or tensors of one element, in
            a list, a tuple, an array or a tensor. None is (1, 0.5, 0, min(1, 0.1 * d**2)), the
            paper's for few dimensions; "paper" is 1 for each, as it has for images. The modules
            take "balanced" as well: the first term's weighting then multiplies every term, and a
            pair of weightings is an error.
        weighting: "noise" takes the terms as they are. "native" makes the first term the squared
            error of the network's own prediction. "likelihood" makes it the likelihood-weighted
            one, and requires `weights`. Both leave the meaning of the others. A callable t → (B,)
            multiplies every term. A pair has a weighting of the first term and one of the higher
            terms, "noise" or a callable.
        time_sampler: "schedule" draws t as the schedule does. "log_sigma_hat" draws it uniformly
            in log σ̂, and reweights, so that the mean of every term stays what it was; of a table
            it draws whole indices. A callable (batch size, generator) → t (B,) is used as if its t
            had been given. None is "log_sigma_hat" with weighting="likelihood", else "schedule".
        engine: "auto", "taylor" or "reverse"; see the page on derivatives.
        third: how the third order is estimated. "exact" matches G = σ² ∇(vᵀ ∂f v), as in the
            paper. "laplacian" matches σ² ∂²f[v, v] to the same target for three quarters of the
            cost: equal to "exact" if the Jacobian is symmetric, as the true score's; otherwise
            another objective, leaving ∇tr(∂f) partly unconstrained. With estimator="paired" it
            costs more than "exact", 35 evaluations against 25. Where engine="auto" takes
            reverse mode, "exact" takes its place, with a warning.
        fraction: the part of the batch, chosen at random, on which orders two and three are
            evaluated: max(1, round(fraction · B)) rows. Unbiased.
        generator: the source of randomness, on the device of x0; the global one if None.
        reduction: "mean", "sum" over the batch, or "none" for (B,).
        model_kwargs: keyword arguments of the network. Tensors whose first dimension is B are per
            sample: they follow their samples into probes and fractions. `Shared` marks one that
            all samples share.
        **arguments: those above.

    Returns:
        The loss, w₁ first + w₂ second + w_t trace + w₃ third.

    Raises:
        TypeError: for tensors, containers and other objects of a wrong type or dtype, integer
            images included.
        ValueError: for a wrong shape, device, name or number, also one of a wrong type; on the CPU
            also for values that are not finite, in an argument or the result.
        DerivativeError: where the derivatives of the network cannot be taken, or (on the CPU) are
            not finite.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> network = torch.nn.Linear(2, 2)
        >>> model = ScoreModel(lambda x, t: network(x), VPSchedule())
        >>> loss = third_order_dsm(model, torch.randn(4, 2))
        >>> loss.backward()
        >>> network.weight.grad.shape
        torch.Size([2, 2])
    """
    return _evaluated("third_order_dsm", 3, ThirdOrderArguments, model, x0, arguments).loss


@partial(spelled_out, defaults=STEIN_DEFAULTS)
def stein_dsm(model: ScoreModel, x0: Tensor, **arguments: Unpack[SteinArguments]) -> Tensor:
    """Order one with the rate at which the log-density of the model's ODE goes wrong, in nats.

    It trades the bound of the SDE for the likelihood of the ODE: J_SM, which order one alone
    minimises, rises. The formula is on the page on theory, under "The likelihood to first order".
    A step costs what one of order two with as many probes costs.

    Args:
        model: the score model.
        x0: data (B, *).
        weight: of the rate, a number of at least 0 or a tensor of one element; 1 if None.
        t: times (B,) in the schedule's units, which count as uniform. If None they are drawn with
            log σ̂ uniform; of a table as whole indices.
        probes: K, 2 or more: the estimates of two halves are multiplied with each other.
        probe: v of shape (K, B, *), used as it is; drawn if None.
        **arguments: those shown, as in `third_order_dsm`, which also says what is raised.

    Returns:
        The integral over log σ̂ of ‖ε̂ − ε‖² + weight · ρ₁ρ₂, averaged over the batch, in nats. The
        first part has the mean J_SM up to a constant. ρ₁ and ρ₂ estimate the rate a, each from
        half of the probes. The gradient of the second part is in the mean that of weight · a²; its
        value is noisier and may be negative. With averaged `targets` the mean is the same where
        their reference is dense, with less noise.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> stein_dsm(model, torch.zeros(4, 2), weight=0.3).shape
        torch.Size([])
    """
    refuse_unknown("stein_dsm", SteinArguments, arguments)
    given: dict[str, Any] = dict(arguments)
    inputs = {key: given.pop(key) for key in SteinInputs.__optional_keys__ & given.keys()}
    inputs["weights"] = inputs.pop("weight", None)
    return evaluate(model, x0, SteinOptions(**given), **inputs).loss


@spelled_out
def dsm_terms(
    model: ScoreModel, x0: Tensor, *, order: int = 3, **arguments: Unpack[TermsArguments]
) -> DSMTerms:
    """The terms of the loss per sample, with their graph and without any weight.

    Args:
        model: the score model.
        x0: data (B, *).
        order: 1, 2 or 3. What belongs to a higher order is not used.
        **arguments: those shown, as in `third_order_dsm`, which also says what is raised.

    Returns:
        The terms, each (B,), in float32 at least; None above `order`.

    Example:
        >>> import torch
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(lambda x, t: 0.5 * x, VPSchedule())
        >>> terms = dsm_terms(model, torch.zeros(4, 2), order=2)
        >>> terms.trace.shape, terms.third
        (torch.Size([4]), None)
    """
    return _evaluated("dsm_terms", order, TermsArguments, model, x0, arguments).terms


def _evaluated(
    name: str, order: int, expected: type, model: object, x0: object, arguments: Any
) -> Evaluated:
    refuse_unknown(name, expected, arguments)
    inputs = HigherOrderInputs.__optional_keys__
    given = {key: value for key, value in arguments.items() if key in inputs}
    chosen = {key: value for key, value in arguments.items() if key not in inputs}
    return evaluate(model, x0, LossOptions(order=order, **chosen), **given)
