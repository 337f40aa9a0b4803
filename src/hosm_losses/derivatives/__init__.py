"""Derivatives of a network along probes, and gradients of these derivatives.

- `select`: how the engine is chosen, and how a failed attempt is undone.
- `engines`: the "taylor" and "reverse" engines, Jacobian products, the detection of lost graphs,
  and remedies for known errors.
- `kinks`: the warning about operators with discontinuous derivatives, and the facts learned from
  earlier calls to each network.
- `checkpointing`: activation checkpoints inside a network.
"""

from hosm_losses.derivatives.checkpointing import checkpoint as checkpoint
from hosm_losses.derivatives.engines import FOREIGN_CHECKPOINTS as FOREIGN_CHECKPOINTS
from hosm_losses.derivatives.engines import Derivatives as Derivatives
from hosm_losses.derivatives.engines import Network as Network
from hosm_losses.derivatives.engines import Products as Products
from hosm_losses.derivatives.engines import gradients as gradients
from hosm_losses.derivatives.engines import pull_backs as pull_backs
from hosm_losses.derivatives.engines import quadratic_forms as quadratic_forms
from hosm_losses.derivatives.kinks import find_jumps as find_jumps
from hosm_losses.derivatives.kinks import refusal as refusal
from hosm_losses.derivatives.select import ASK_THE_CHECK as ASK_THE_CHECK
from hosm_losses.derivatives.select import ENGINES as ENGINES
from hosm_losses.derivatives.select import Engine as Engine
from hosm_losses.derivatives.select import NetworkState as NetworkState
from hosm_losses.derivatives.select import derive as derive
from hosm_losses.derivatives.select import derive_with_products as derive_with_products
from hosm_losses.derivatives.select import never_warn as never_warn
