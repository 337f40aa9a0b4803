"""The losses: first-, second- and third-order denoising score matching.

- `dsm`: the public functions and modules.
- `objective`: the computation of a loss, from argument checks to the reduction.
- `options`: validation of options and weights.
- `targets`: targets that use other data or the data's scores to make the residuals less noisy.
- `terms`: the loss terms, which are squared residuals with the lower orders detached.
- `paired`: unbiased estimates, from independent probes, of the terms that probes="exact" computes.
- `times`: a sampler of t that learns at which times a loss needs the most samples.
- `weighting`: the weighting of noise levels, and the other samplers of t.
"""

from hosm_losses.losses.dsm import FirstOrderDSM as FirstOrderDSM
from hosm_losses.losses.dsm import SecondOrderDSM as SecondOrderDSM
from hosm_losses.losses.dsm import ThirdOrderDSM as ThirdOrderDSM
from hosm_losses.losses.dsm import dsm_terms as dsm_terms
from hosm_losses.losses.dsm import first_order_dsm as first_order_dsm
from hosm_losses.losses.dsm import second_order_dsm as second_order_dsm
from hosm_losses.losses.dsm import third_order_dsm as third_order_dsm
from hosm_losses.losses.options import Probes as Probes
from hosm_losses.losses.options import TermWeights as TermWeights
from hosm_losses.losses.targets import AveragedTargets as AveragedTargets
from hosm_losses.losses.targets import Targets as Targets
from hosm_losses.losses.targets import TargetScores as TargetScores
from hosm_losses.losses.terms import DSMTerms as DSMTerms
from hosm_losses.losses.terms import LoggedTerms as LoggedTerms
from hosm_losses.losses.times import AdaptiveTimes as AdaptiveTimes
from hosm_losses.losses.weighting import EDMWeighting as EDMWeighting
from hosm_losses.losses.weighting import TimeSampler as TimeSampler
from hosm_losses.losses.weighting import Weighting as Weighting
