"""The schedules with parameters: their defaults, and that they are values."""

import dataclasses
import pickle

import pytest

import hosm_losses as hosm

DEFAULTS = {
    hosm.VPSchedule: (0.1, 20.0, 1e-5, 1.0),
    hosm.SubVPSchedule: (0.1, 20.0, 1e-5, 1.0),
    hosm.VESchedule: (0.01, 50.0, 1e-5, 1.0),
    hosm.CosineSchedule: (0.008, 1e-5, 0.9946),
    hosm.EDMSchedule: (0.002, 80.0, -1.2, 1.2),
    hosm.LinearFlowSchedule: (1e-4, 0.999),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_schedules_are_frozen_values(kind):
    schedule = kind()
    assert dataclasses.astuple(schedule) == DEFAULTS[kind]
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(dataclasses.replace(schedule)) == hash(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.t_min = 0.5
