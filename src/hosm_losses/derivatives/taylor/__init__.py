r"""Value and derivatives of a function along directions, carried through it in one batch.

- `jet`: the tensor that carries them; what happens to a function that is called on one.
- `table`: by which function of PyTorch a rule is found, and which calls it takes.
- `activations`, `arithmetic`, `attention`, `convolution`, `layers`, `lengths`, `matrices`,
  `norms`, `pointwise`, `properties`, `selection`, `shapes`, `softmax`: the rules, by kind,
  registered on import.
- `bilinear`: products linear in both factors, and their gradients; `normalised`: those of norms.
- `aliases`, `in_place`: which Jets share memory; rules for what changes a tensor in place.
- `methods`: methods of Tensor that are written in Python.
- `arguments`: what rules ask of several arguments.
- `derived`: the rule for functions that have none; `along`: by nested jvp; sums of stacks.
"""

from hosm_losses.derivatives.taylor import (  # noqa: F401
    activations,
    arithmetic,
    attention,
    convolution,
    derived,
    in_place,
    layers,
    lengths,
    matrices,
    methods,
    norms,
    pointwise,
    properties,
    selection,
    shapes,
    softmax,
)
from hosm_losses.derivatives.taylor.jet import Jet as Jet
from hosm_losses.derivatives.taylor.jet import TaylorError as TaylorError
from hosm_losses.derivatives.taylor.jet import carried as carried

methods.define()
