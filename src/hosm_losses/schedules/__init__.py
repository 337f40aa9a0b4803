"""Noise schedules: α(t), σ(t) and derived quantities.

- `base`: `Schedule`, to subclass with alpha and sigma alone, and the check of a schedule where a
  ScoreModel is built.
- `continuous`: VP, VE, sub-VP, cosine, linear flow and EDM.
- `discrete`: `DiscreteSchedule`, a table of ᾱ whose t is the index.

To add a schedule, write one class in `continuous` and export it here; export a public one from
`hosm_losses` too. No other module knows schedules by name: each accepts any `Schedule`.
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
