"""Whether the derivatives of a model are right, and what to do where they are not.

- `check`: `check_derivatives`, and the remedies.
- `values`: what has to hold of values before derivatives mean anything.
- `differences`: the faults looked for, derivatives that disagree with differences, and jumps.
- `localize`: the module at fault.
"""

from hosm_losses.diagnostics.check import check_derivatives as check_derivatives
