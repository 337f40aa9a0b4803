"""Noise schedules: α(t), σ(t) and derived quantities.

- `base`: `Schedule`, whose subclasses only have to define alpha, sigma, t_min and t_max, and
  `check_schedule`, which runs when a ScoreModel is built.
- `continuous`: VP, VE, sub-VP, cosine, linear flow and EDM.
- `discrete`: `DiscreteSchedule`, a table of ᾱ indexed by t.

To add a schedule, write a class in `continuous` and export it here. If the class is public, also
export it from `hosm_losses`. Losses and likelihoods accept any `Schedule`. Within
them, only the ODE solver checks for a particular class: if the network predicts velocities for a
`LinearFlowSchedule`, the solver uses a different grid and may use a different order.
"""

from hosm_losses.schedules.base import Schedule as Schedule
from hosm_losses.schedules.base import check_schedule as check_schedule
from hosm_losses.schedules.continuous import CosineSchedule as CosineSchedule
from hosm_losses.schedules.continuous import EDMSchedule as EDMSchedule
from hosm_losses.schedules.continuous import LinearFlowSchedule as LinearFlowSchedule
from hosm_losses.schedules.continuous import SubVPSchedule as SubVPSchedule
from hosm_losses.schedules.continuous import VESchedule as VESchedule
from hosm_losses.schedules.continuous import VPSchedule as VPSchedule
from hosm_losses.schedules.discrete import DiscreteSchedule as DiscreteSchedule
from hosm_losses.schedules.discrete import step_labels as step_labels
