"""Checks of a model's wrapping and derivatives, and the gap between its ODE and its SDE.

- `gap`: `likelihood_gap`, the errors of all orders by noise level, and both likelihoods.
- `wrapping`: `check_wrapping`, which evaluates a trained network under other wrappings.
- `check`: `check_derivatives`, and the remedies for the faults it finds.
- `values`: conditions on the network's values, without which its derivatives are meaningless.
- `differences`: the comparison of derivatives with finite differences, and the search for jumps.
- `localize`: the search for the module at fault.
"""

from hosm_losses.diagnostics.check import DerivativeReport as DerivativeReport
from hosm_losses.diagnostics.check import check_derivatives as check_derivatives
from hosm_losses.diagnostics.gap import GapEstimate as GapEstimate
from hosm_losses.diagnostics.gap import GapReport as GapReport
from hosm_losses.diagnostics.gap import likelihood_gap as likelihood_gap
from hosm_losses.diagnostics.wrapping import WrappingCandidate as WrappingCandidate
from hosm_losses.diagnostics.wrapping import WrappingReport as WrappingReport
from hosm_losses.diagnostics.wrapping import check_wrapping as check_wrapping
