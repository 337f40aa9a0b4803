"""High-order denoising score matching, and the exact likelihood of diffusion ODEs, for PyTorch."""

from hosm_losses import taylor
from hosm_losses._checks import DerivativeError
from hosm_losses.derivatives import checkpoint
from hosm_losses.diagnostics import (
    DerivativeReport,
    GapEstimate,
    GapReport,
    WrappingCandidate,
    WrappingReport,
    check_derivatives,
    check_wrapping,
    likelihood_gap,
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
    FixedGrid,
    NLLResult,
    NLLSummary,
    ODEDistribution,
    SampleResult,
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
    AveragedTargets,
    DSMTerms,
    EDMWeighting,
    FirstOrderDSM,
    LoggedTerms,
    SecondOrderDSM,
    TargetScores,
    ThirdOrderDSM,
    dsm_terms,
    first_order_dsm,
    second_order_dsm,
    third_order_dsm,
)
from hosm_losses.model import (
    DenoisingPosterior,
    PosteriorCovariance,
    ScoreModel,
    Shared,
    denoising_posterior,
)
from hosm_losses.probes import Hutchinson, Paired, ToStandardError
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
    "AveragedTargets",
    "CosineSchedule",
    "DSMTerms",
    "DenoisingPosterior",
    "DerivativeError",
    "DerivativeReport",
    "DiscreteSchedule",
    "EDMSchedule",
    "EDMWeighting",
    "FirstOrderDSM",
    "FixedGrid",
    "GapEstimate",
    "GapReport",
    "Hutchinson",
    "LinearFlowSchedule",
    "LoggedTerms",
    "NLLResult",
    "NLLSummary",
    "ODEDistribution",
    "Paired",
    "PosteriorCovariance",
    "SampleResult",
    "Schedule",
    "ScoreModel",
    "SecondOrderDSM",
    "Shared",
    "SubVPSchedule",
    "TargetScores",
    "ThirdOrderDSM",
    "ToStandardError",
    "ToTolerance",
    "TruncatedNormal",
    "Uniform",
    "VESchedule",
    "VPSchedule",
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
    "likelihood_gap",
    "ode_nll",
    "ode_sample",
    "second_order_dsm",
    "taylor",
    "third_order_dsm",
    "variational_nll",
]


def __dir__() -> list[str]:
    """List public names alone: submodules such as `model` and `losses` would hide users' own."""
    return [*__all__, "__all__", "__doc__", "__version__"]
