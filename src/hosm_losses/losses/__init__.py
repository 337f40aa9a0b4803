"""The losses: first-, second- and third-order denoising score matching.

- `dsm`: the public face, functions and modules.
- `arguments`: what the public face takes, checked.
- `objective`: from arguments to a loss: perturbs the data, sums the terms, checks the result.
- `targets`: what stands for the noise in the residuals, averaged over data.
- `terms`: the residuals with their detach, and the terms for each sample along its probes.
- `paired`: the same terms by products of two probes' estimates.
- `weighting`: weights over noise levels, and the draw of t.
"""

from hosm_losses.losses.dsm import FirstOrderDSM as FirstOrderDSM
from hosm_losses.losses.dsm import SecondOrderDSM as SecondOrderDSM
from hosm_losses.losses.dsm import ThirdOrderDSM as ThirdOrderDSM
from hosm_losses.losses.dsm import dsm_terms as dsm_terms
from hosm_losses.losses.dsm import first_order_dsm as first_order_dsm
from hosm_losses.losses.dsm import second_order_dsm as second_order_dsm
from hosm_losses.losses.dsm import third_order_dsm as third_order_dsm
from hosm_losses.losses.targets import AveragedTargets as AveragedTargets
from hosm_losses.losses.terms import DSMTerms as DSMTerms
from hosm_losses.losses.terms import LoggedTerms as LoggedTerms
from hosm_losses.losses.weighting import EDMWeighting as EDMWeighting
