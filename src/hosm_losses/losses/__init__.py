"""The losses: first-, second- and third-order denoising score matching.

- `functions`, `modules`: the public face.
- `arguments`: what the public face takes, checked.
- `objective`: from arguments to a loss: perturbs the data, sums the terms, checks the result.
- `targets`: what stands for the noise in the residuals, averaged over data.
- `terms`: the residuals with their detach, and the terms for each sample along its probes.
- `paired`: the same terms by products of two probes' estimates.
- `stein`: the rate at which the log-density of the ODE goes wrong.
- `balance`: weights that follow the sizes of the terms.
- `weighting`: weights over noise levels, and the draw of t.
"""

from hosm_losses.losses.functions import dsm_terms as dsm_terms
from hosm_losses.losses.functions import first_order_dsm as first_order_dsm
from hosm_losses.losses.functions import second_order_dsm as second_order_dsm
from hosm_losses.losses.functions import stein_dsm as stein_dsm
from hosm_losses.losses.functions import third_order_dsm as third_order_dsm
from hosm_losses.losses.modules import FirstOrderDSM as FirstOrderDSM
from hosm_losses.losses.modules import SecondOrderDSM as SecondOrderDSM
from hosm_losses.losses.modules import SteinDSM as SteinDSM
from hosm_losses.losses.modules import ThirdOrderDSM as ThirdOrderDSM
from hosm_losses.losses.stein import LoggedSteinTerms as LoggedSteinTerms
from hosm_losses.losses.stein import SteinTerms as SteinTerms
from hosm_losses.losses.targets import AveragedTargets as AveragedTargets
from hosm_losses.losses.terms import DSMTerms as DSMTerms
from hosm_losses.losses.terms import LoggedTerms as LoggedTerms
from hosm_losses.losses.weighting import EDMWeighting as EDMWeighting
