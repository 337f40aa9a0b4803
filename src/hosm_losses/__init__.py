"""Denoising score matching of orders one to three and likelihoods of diffusion ODEs, for PyTorch.

In the examples below, the data are standard normal, so the optimal network is known:

    >>> import torch
    >>> import hosm_losses as hosm
    >>> x0 = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    >>> schedule = hosm.VPSchedule()
    >>> def network(x, t):
    ...     return schedule.sigma(t)[:, None] * x

`ScoreModel` combines a network, its noise schedule and the type of its prediction:

    >>> model = hosm.ScoreModel(network, schedule, "epsilon")

`check_wrapping` uses data to check that the model's settings match those used in training:

    >>> hosm.check_wrapping(model, x0).ok
    True

The losses are `first_order_dsm`, `second_order_dsm` and `third_order_dsm`. Each loss is also
available as a module, such as `FirstOrderDSM`:

    >>> loss = hosm.first_order_dsm(model, x0)

In low dimensions, three options together reduce gradient noise most: targets averaged over
reference data, antithetic noise, and times from a distribution that `AdaptiveTimes.learn` updates.

    >>> objective = hosm.FirstOrderDSM(model, antithetic=True, time_sampler=hosm.AdaptiveTimes())
    >>> loss = objective(x0[:128], targets=hosm.AveragedTargets(x0, own=False))

`ode_nll` returns negative log-likelihoods under the model's ODE, with error estimates:

    >>> summary = hosm.ode_nll(model, x0).summary()
    >>> print(f"{summary.nll:.2f} ± {summary.standard_error:.2f} nats")
    2.87 ± 0.08 nats

`Weighting`, `TermWeights`, `TimeSampler`, `Targets`, `Probes`, `Prediction` and `Divergence` are
type aliases that appear in signatures.
"""

from hosm_losses import taylor
from hosm_losses._checks import DerivativeError
from hosm_losses.derivatives import checkpoint
from hosm_losses.diagnostics import (
    DerivativeReport,
    WrappingCandidate,
    WrappingReport,
    check_derivatives,
    check_wrapping,
)
from hosm_losses.interop import (
    from_denoising_diffusion,
    from_diffusers,
    from_edm,
    from_flow_matching,
    from_guided_diffusion,
    from_score_sde,
)
from hosm_losses.likelihood import (
    Adaptive,
    Divergence,
    DivergenceEstimator,
    DivergenceFunction,
    FixedGrid,
    NLLResult,
    NLLSummary,
    ODEDistribution,
    ODESolution,
    SampleResult,
    Solver,
    ToTolerance,
    TruncatedNormal,
    Uniform,
    Weights,
    importance_weights,
    ode_nll,
    ode_sample,
    variational_nll,
)
from hosm_losses.losses import (
    AdaptiveTimes,
    AveragedTargets,
    DSMTerms,
    EDMWeighting,
    FirstOrderDSM,
    LoggedTerms,
    Probes,
    SecondOrderDSM,
    Targets,
    TargetScores,
    TermWeights,
    ThirdOrderDSM,
    TimeSampler,
    Weighting,
    dsm_terms,
    first_order_dsm,
    second_order_dsm,
    third_order_dsm,
)
from hosm_losses.model import (
    DenoisingPosterior,
    OnSubspace,
    PosteriorCovariance,
    Prediction,
    ScoreModel,
    Shared,
    denoising_posterior,
)
from hosm_losses.probes import Hutchinson, Paired
from hosm_losses.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    LinearFlowSchedule,
    Schedule,
    SubVPSchedule,
    VESchedule,
    VPSchedule,
)

__version__ = "0.1.0"
__all__ = [
    "Adaptive",
    "AdaptiveTimes",
    "AveragedTargets",
    "CosineSchedule",
    "DSMTerms",
    "DenoisingPosterior",
    "DerivativeError",
    "DerivativeReport",
    "DiscreteSchedule",
    "Divergence",
    "DivergenceEstimator",
    "DivergenceFunction",
    "EDMSchedule",
    "EDMWeighting",
    "FirstOrderDSM",
    "FixedGrid",
    "Hutchinson",
    "LinearFlowSchedule",
    "LoggedTerms",
    "NLLResult",
    "NLLSummary",
    "ODEDistribution",
    "ODESolution",
    "OnSubspace",
    "Paired",
    "PosteriorCovariance",
    "Prediction",
    "Probes",
    "SampleResult",
    "Schedule",
    "ScoreModel",
    "SecondOrderDSM",
    "Shared",
    "Solver",
    "SubVPSchedule",
    "TargetScores",
    "Targets",
    "TermWeights",
    "ThirdOrderDSM",
    "TimeSampler",
    "ToTolerance",
    "TruncatedNormal",
    "Uniform",
    "VESchedule",
    "VPSchedule",
    "Weighting",
    "Weights",
    "WrappingCandidate",
    "WrappingReport",
    "check_derivatives",
    "check_wrapping",
    "checkpoint",
    "denoising_posterior",
    "dsm_terms",
    "first_order_dsm",
    "from_denoising_diffusion",
    "from_diffusers",
    "from_edm",
    "from_flow_matching",
    "from_guided_diffusion",
    "from_score_sde",
    "importance_weights",
    "ode_nll",
    "ode_sample",
    "second_order_dsm",
    "taylor",
    "third_order_dsm",
    "variational_nll",
]


def __dir__() -> list[str]:
    """List only the public names, without submodules such as `model`."""
    return [*__all__, "__all__", "__doc__", "__version__"]
