"""How networks are commonly trained: schedules, what stands for the time, units of the data.

Networks of tables are given an index, of 1000 or as many as the model's own table has. score_sde
multiplies the time of VP by 999 and gives σ or its logarithm under VE; EDM gives log σ / 4 inside
its preconditioning; flows count time from data to noise or back, diffusers up to 1000.
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

KINDS = ("epsilon", "score", "sample", "v_prediction", "flow_prediction")
LEAST_STEPS = 100  # with fewer the betas of the known tables would not stay below 1
OWN = "your schedule"
Times = dict[str, Any]


class Units(NamedTuple):
    """Data scale · x0 + shift, and how that is written."""

    text: str = "x0"
    scale: float = 1.0
    shift: float = 0.0


AS_THEY_ARE = Units()


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a network is given: noised data and a time, both also as they are written.

    It equals itself alone, as a user's schedule may have no hash.
    """

    schedule: Schedule
    schedule_text: str
    time: Any
    time_text: str
    units: Units = AS_THEY_ARE


def own_inputs(model: ScoreModel) -> Inputs:
    """What the model gives its network."""
    return Inputs(model.schedule, OWN, model.time, "" if model.time is None else "yours")


def all_inputs(model: ScoreModel) -> Iterator[Inputs]:
    """What the network may have been given in its training, with the data as they are."""
    own = model.schedule
    steps = len(own.alphas_cumprod) if isinstance(own, DiscreteSchedule) else 1000
    steps = steps if steps >= LEAST_STEPS else 1000
    plain: Times = {"": None}
    for text, schedule, times in [(OWN, own, _own_times(own, steps)), *_known(steps)]:
        if text == OWN or schedule != own:
            times = plain | times if model.time is None else {"yours": model.time} | plain | times
            for time_text, time in times.items():
                # A network that looks an index up may not be given a negative one on CUDA.
                negative = own.integer_time and "log" in time_text
                if not negative and (text != OWN or time is not model.time):
                    yield Inputs(schedule, text, time, time_text)


def _known(steps: int) -> Iterator[tuple[str, Schedule, Times]]:
    """Schedules, as they are written, and what stands for their time beside the time itself."""
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
        last = own.t_max
        return _share(steps) | {f"lambda t: {last:g} - t": lambda t: last - t}
    factors: Times = {f"{steps - 1}": steps - 1.0, f"{steps}": float(steps)}
    times = factors | _back(steps) if own.t_max <= 1 else {"torch.log": torch.log}
    explodes = float(own.alpha(torch.tensor(own.t_max))) == 1  # VE: elsewhere σ is no time
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
    """Other units of the data: of bytes, centred bytes, unit variance, EDM's and latents'."""
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
