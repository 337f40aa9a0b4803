"""Whether the derivatives of a model are right, and what to do where they are not.

- `check`: `check_derivatives`.
- `differences`: central differences to compare with.
- `values`, `samples`, `kinks`: what has to hold before derivatives mean anything.
- `module_fields`: the module or the operator at fault.
- `remedies`: what to do about it.
"""

from hosm_losses.diagnostics.check import check_derivatives as check_derivatives
