"""Wrappings that a network may have been trained with, other than its model's own.

The candidates' tables are as long as that of the model's schedule if it has at least LEAST_STEPS
entries, and have 1000 entries otherwise. With a table, the network receives the index, or the
index divided by the length. score_sde passes 999 t as the time under VP, and σ or log σ under VE.
EDM's preconditioning passes log σ / 4. In flow matching, time runs from data to noise or from
noise to data; its maximum is 1 or, in diffusers, 1000.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses.model import ScoreModel
from hosm_losses.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    LinearFlowSchedule,
    Schedule,
    VESchedule,
    VPSchedule,
)

LEAST_STEPS = 100  # with fewer steps, betas of the known tables would exceed 1
OWN = "your schedule"
UNITS = 10  # other units of the data
Times = dict[str, Any]


class Units(NamedTuple):
    """A change of data units that maps x0 to scale · x0 + shift, and this expression as code."""

    text: str = "x0"
    scale: float = 1.0
    shift: float = 0.0


AS_THEY_ARE = Units()


@dataclass(frozen=True, eq=False)
class Inputs:
    """The schedule, time and data units that determine a network's inputs, with their source code.

    Compared by identity, because a user's schedule may not be hashable.
    """

    schedule: Schedule
    schedule_text: str
    time: Any
    time_text: str
    units: Units = AS_THEY_ARE


def all_inputs(model: ScoreModel) -> Iterator[Inputs]:
    """Yield the model's own inputs, then others that the network may have received in training."""
    own = model.schedule
    steps = len(own.alphas_cumprod) if isinstance(own, DiscreteSchedule) else 1000
    steps = steps if steps >= LEAST_STEPS else 1000
    plain: Times = {"": None}
    for text, schedule, times in [(OWN, own, _own_times(own, steps)), *_known(steps)]:
        if text == OWN or schedule != own:
            times = plain | times if model.time is None else {"yours": model.time} | plain | times
            for time_text, time in times.items():
                # On CUDA, a network that looks up an index must not get a negative one.
                if not (own.integer_time and "log" in time_text):
                    yield Inputs(schedule, text, time, time_text)


def _known(steps: int) -> Iterator[tuple[str, Schedule, Times]]:
    last: Times = {f"{steps - 1}": steps - 1.0}
    yield "VPSchedule()", VPSchedule(), last
    yield "CosineSchedule()", CosineSchedule(), {f"{steps}": float(steps)}
    yield "LinearFlowSchedule()", LinearFlowSchedule(), {f"{steps}": float(steps)} | _back(steps)
    yield "VESchedule()", VESchedule(), last | _of_sigma("VESchedule()", VESchedule())
    logs: Times = {"torch.log": torch.log, "lambda t: t.log() / 4": lambda t: t.log() / 4}
    yield "EDMSchedule()", EDMSchedule(), logs
    start, end, share = 0.1 / steps, 20 / steps, _share(steps)
    betas = "" if steps == 1000 else f", {start:g}, {end:g}"
    table = DiscreteSchedule
    yield f"DiscreteSchedule.linear({steps}{betas})", table.linear(steps, start, end), share
    start, end = 0.85 / steps, 12 / steps
    text = f"DiscreteSchedule.linear({steps}, {start:g}, {end:g}, scaled=True)"
    yield text, table.linear(steps, start, end, scaled=True), share
    yield f"DiscreteSchedule.cosine({steps})", table.cosine(steps), share


def _own_times(own: Schedule, steps: int) -> Times:
    if own.integer_time:
        return _share(steps) | {f"lambda t: {own.t_max:g} - t": lambda t: own.t_max - t}
    factors: Times = {f"{steps - 1}": steps - 1.0, f"{steps}": float(steps)}
    times = factors | _back(steps) if own.t_max <= 1 else {"torch.log": torch.log}
    explodes = float(own.alpha(torch.tensor(own.t_max))) == 1  # VE, the only kind with σ as time
    return times | (_of_sigma("schedule", own) if explodes else {})


def _share(steps: int) -> Times:
    return {f"lambda t: t / {steps}": lambda t: t / steps}


def _back(steps: int) -> Times:
    whole = f"lambda t: {steps} * (1 - t)"
    return {"lambda t: 1 - t": lambda t: 1 - t, whole: lambda t: steps * (1 - t)}


def _of_sigma(text: str, schedule: Schedule) -> Times:
    logarithm = f"lambda t: {text}.sigma(t).log()"
    return {f"{text}.sigma": schedule.sigma, logarithm: lambda t: schedule.sigma(t).log()}


def all_units(data: Tensor) -> Iterator[Units]:
    """Yield other data units: image ranges, latent scales, unit variance and EDM's variance."""
    yield Units("2 * x0 - 1", 2.0, -1.0)
    yield Units("(x0 + 1) / 2", 0.5, 0.5)
    yield Units("x0 / 255", 1 / 255)
    yield Units("x0 / 127.5 - 1", 1 / 127.5, -1.0)
    yield Units("255 * x0", 255.0)
    yield Units("127.5 * (x0 + 1)", 127.5, 127.5)
    yield Units("0.18215 * x0", 0.18215)
    yield Units("x0 / 0.18215", 1 / 0.18215)
    mean, std = float(data.double().mean()), float(data.double().std())
    yield Units("(x0 - x0.mean()) / x0.std()", 1 / std, -mean / std)
    yield Units("(x0 - x0.mean()) / (2 * x0.std())", 0.5 / std, -0.5 * mean / std)
