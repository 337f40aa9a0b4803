"""The losses: first-, second- and third-order denoising score matching.

- `dsm`: the public functions and modules.
- `objective`: how a loss is computed, from the checks of its arguments to the reduction.
- `options`: checks of options and weights.
- `targets`: targets that use other data or the data's scores to make the residuals less noisy.
- `terms`: the loss terms, as squares of residuals in which the lower orders are detached.
- `paired`: the same terms, computed as products of estimates from two independent probes.
- `times`: how t is drawn where it is learnt which times matter.
- `weighting`: how noise levels are weighted, and how t is drawn otherwise.
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
