"""High-order denoising score matching, and the exact likelihood of diffusion ODEs, for PyTorch."""

from hosm_losses._checks import DerivativeError as DerivativeError
from hosm_losses.derivatives import checkpoint as checkpoint
from hosm_losses.diagnostics import GapEstimate as GapEstimate
from hosm_losses.diagnostics import GapReport as GapReport
from hosm_losses.diagnostics import WrappingCandidate as WrappingCandidate
from hosm_losses.diagnostics import WrappingReport as WrappingReport
from hosm_losses.diagnostics import check_derivatives as check_derivatives
from hosm_losses.diagnostics import check_wrapping as check_wrapping
from hosm_losses.diagnostics import likelihood_gap as likelihood_gap
from hosm_losses.likelihood import NLLResult as NLLResult
from hosm_losses.likelihood import NLLSummary as NLLSummary
from hosm_losses.likelihood import SampleResult as SampleResult
from hosm_losses.likelihood import ode_nll as ode_nll
from hosm_losses.likelihood import ode_sample as ode_sample
from hosm_losses.likelihood import variational_nll as variational_nll
from hosm_losses.losses import AveragedTargets as AveragedTargets
from hosm_losses.losses import DSMTerms as DSMTerms
from hosm_losses.losses import FirstOrderDSM as FirstOrderDSM
from hosm_losses.losses import LoggedSteinTerms as LoggedSteinTerms
from hosm_losses.losses import LoggedTerms as LoggedTerms
from hosm_losses.losses import SecondOrderDSM as SecondOrderDSM
from hosm_losses.losses import SteinDSM as SteinDSM
from hosm_losses.losses import SteinTerms as SteinTerms
from hosm_losses.losses import ThirdOrderDSM as ThirdOrderDSM
from hosm_losses.losses import dsm_terms as dsm_terms
from hosm_losses.losses import first_order_dsm as first_order_dsm
from hosm_losses.losses import second_order_dsm as second_order_dsm
from hosm_losses.losses import stein_dsm as stein_dsm
from hosm_losses.losses import third_order_dsm as third_order_dsm
from hosm_losses.model import ScoreModel as ScoreModel
from hosm_losses.model import Shared as Shared
from hosm_losses.probes import Hutchinson as Hutchinson
from hosm_losses.probes import Paired as Paired
from hosm_losses.schedules import CosineSchedule as CosineSchedule
from hosm_losses.schedules import DiscreteSchedule as DiscreteSchedule
from hosm_losses.schedules import EDMSchedule as EDMSchedule
from hosm_losses.schedules import LinearFlowSchedule as LinearFlowSchedule
from hosm_losses.schedules import Schedule as Schedule
from hosm_losses.schedules import SubVPSchedule as SubVPSchedule
from hosm_losses.schedules import VESchedule as VESchedule
from hosm_losses.schedules import VPSchedule as VPSchedule

__version__ = "0.1.0"
