"""Noise schedules: α(t), σ(t) and what follows from them. Needs no other package.

- `base`: `Schedule`; subclass it with alpha and sigma alone.
- `continuous`: VP, VE, sub-VP, cosine and linear flow.
- `edm`: that of EDM, with its draws.
- `discrete`: `DiscreteSchedule`, a table of ᾱ, given or known, whose t is the index; the steps
  of a longer table that its indices stand for.
- `check`: what has to hold of a schedule, checked where a ScoreModel is built.

A schedule more is one class in `continuous` and its export here; a public one is exported from
`hosm_losses` too. Nothing else knows them by name: what takes a schedule takes any `Schedule`.
"""

from hosm_losses.schedules.base import Schedule as Schedule
from hosm_losses.schedules.check import check_schedule as check_schedule
from hosm_losses.schedules.continuous import CosineSchedule as CosineSchedule
from hosm_losses.schedules.continuous import LinearFlowSchedule as LinearFlowSchedule
from hosm_losses.schedules.continuous import SubVPSchedule as SubVPSchedule
from hosm_losses.schedules.continuous import VESchedule as VESchedule
from hosm_losses.schedules.continuous import VPSchedule as VPSchedule
from hosm_losses.schedules.discrete import DiscreteSchedule as DiscreteSchedule
from hosm_losses.schedules.discrete import step_labels as step_labels
from hosm_losses.schedules.edm import EDMSchedule as EDMSchedule
