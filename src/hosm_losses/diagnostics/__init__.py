"""Checks of a model's wrapping and derivatives.

- `wrapping`: `check_wrapping`, which evaluates a trained network under alternative wrappings.
- `candidates`: the wrappings that it tries.
- `check`: `check_derivatives`, and remedies for the faults that it finds.
- `values`: conditions that the network's values must meet before derivatives are checked.
- `differences`: the comparison of derivatives with finite differences, and the search for jumps.
- `localize`: the search for the module at fault.
"""

from hosm_losses.diagnostics.check import DerivativeReport as DerivativeReport
from hosm_losses.diagnostics.check import check_derivatives as check_derivatives
from hosm_losses.diagnostics.wrapping import WrappingCandidate as WrappingCandidate
from hosm_losses.diagnostics.wrapping import WrappingReport as WrappingReport
from hosm_losses.diagnostics.wrapping import check_wrapping as check_wrapping
