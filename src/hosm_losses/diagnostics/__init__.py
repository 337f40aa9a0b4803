"""Checks of a model's wrapping and derivatives, and the gap between its ODE and its SDE.

- `gap`: `likelihood_gap`, the errors of all orders by noise level, and both likelihoods.
- `wrapping`: `check_wrapping`, which evaluates a trained network under other wrappings.
- `check`: `check_derivatives`, and the remedies.
- `values`: conditions on values without which derivatives are meaningless.
- `differences`: comparison of derivatives with finite differences, and search for jumps.
- `localize`: the module at fault.
"""

from hosm_losses.diagnostics.check import DerivativeReport as DerivativeReport
from hosm_losses.diagnostics.check import check_derivatives as check_derivatives
from hosm_losses.diagnostics.gap import GapEstimate as GapEstimate
from hosm_losses.diagnostics.gap import GapReport as GapReport
from hosm_losses.diagnostics.gap import likelihood_gap as likelihood_gap
from hosm_losses.diagnostics.wrapping import WrappingCandidate as WrappingCandidate
from hosm_losses.diagnostics.wrapping import WrappingReport as WrappingReport
from hosm_losses.diagnostics.wrapping import check_wrapping as check_wrapping
