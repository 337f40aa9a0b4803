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
- `derived`: the rule for functions that have none; `along`: by nested jvp; sums of stacks;
  `forward_mode`: operators of which PyTorch's forward derivative is wrong.
- `primitives`, `primitive_mode`: operators whose double backward is right, and the mode that puts
  them in place.
- `hooks`: hooks of a function, which may look at gradients and not change them.
- `recompute`: functions of which only the arguments are kept for the backward passes.
- `errors`, `_torch`: the errors; private names of PyTorch.
"""

from hosm_losses.taylor import _torch as _torch
from hosm_losses.taylor import (  # noqa: F401
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
from hosm_losses.taylor.aliases import CHANGED_ARGUMENT as CHANGED_ARGUMENT
from hosm_losses.taylor.along import at_least_float32 as at_least_float32
from hosm_losses.taylor.errors import DerivativeError as DerivativeError
from hosm_losses.taylor.errors import TaylorError as TaylorError
from hosm_losses.taylor.hooks import FINAL as FINAL
from hosm_losses.taylor.hooks import GIVE_THE_SOURCE as GIVE_THE_SOURCE
from hosm_losses.taylor.hooks import ScriptedError as ScriptedError
from hosm_losses.taylor.hooks import check_unchanged as check_unchanged
from hosm_losses.taylor.jet import Jet as Jet
from hosm_losses.taylor.jet import propagate as propagate
from hosm_losses.taylor.primitive_mode import CHECKPOINT_ADVICE as CHECKPOINT_ADVICE
from hosm_losses.taylor.primitive_mode import ForeignCheckpointError as ForeignCheckpointError
from hosm_losses.taylor.primitive_mode import recomputable as recomputable
from hosm_losses.taylor.primitive_mode import safe_of_one as safe_of_one
from hosm_losses.taylor.primitive_mode import safe_primitives as safe_primitives

methods.define()
