"""Derivatives of a network along probes, and their gradients in the parameters.

- `select`: which engine runs; what "auto" remembers of a network.
- `engines`: the three engines, "taylor", "reverse" and "forward".
- `taylor`: the tensor that carries derivatives, and its rules by kind of operator.
- `primitives`, `primitive_mode`: operators whose double backward is right, and the mode that puts
  them in place.
- `backward`: passes back, and graphs that were lost.
- `snapshot`: what an evaluation changes, put back.
- `checkpointing`: checkpoints inside a network.
"""

from hosm_losses.derivatives.checkpointing import checkpoint as checkpoint
from hosm_losses.derivatives.engines import Curved as Curved
from hosm_losses.derivatives.engines import Derivatives as Derivatives
from hosm_losses.derivatives.engines import Field as Field
from hosm_losses.derivatives.engines import quadratic_forms as quadratic_forms
from hosm_losses.derivatives.primitive_mode import safe_primitives as safe_primitives
from hosm_losses.derivatives.primitives import at_least_float32 as at_least_float32
from hosm_losses.derivatives.select import ASK_THE_CHECK as ASK_THE_CHECK
from hosm_losses.derivatives.select import ENGINES as ENGINES
from hosm_losses.derivatives.select import Engine as Engine
from hosm_losses.derivatives.select import derive as derive
from hosm_losses.derivatives.select import gradients as gradients
from hosm_losses.derivatives.select import say_no_price as say_no_price
from hosm_losses.derivatives.snapshot import Snapshot as Snapshot
from hosm_losses.derivatives.taylor import Jet as Jet
