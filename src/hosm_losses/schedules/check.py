r"""What a schedule has to be, checked where a ScoreModel is built.

α and σ are positive, log σ̂ grows from the data at t_min to the noise at t_max, also by its
derivative, and `time` is its inverse. This is looked at on a grid, on the CPU and in float64,
whatever device the model is for: nothing is read from an accelerator.
"""

import math

import torch
from torch import Tensor

from hosm_losses._checks import check_number, describe_value, error_message
from hosm_losses._torch_internals import outside_inference_mode
from hosm_losses.schedules.base import Schedule

NEAR = (1e-4, 1e-3, 1e-2)
PLACES = (0.0, *NEAR, *(k / 64 for k in range(1, 64)), *(1 - p for p in reversed(NEAR)), 1.0)
INNER = (math.pi / 16, math.pi / 6, math.pi / 4)  # between the entries of any table
TOLERANCE = 1e-2

RANGE = (
    "Correct the formula, or the range. At t_min, the data's end, there is some noise already: "
    "begin at 1e-5, for example. At t_max, the noise's end, alpha is above 0: end at 0.999 for a "
    "flow, 0.9946 for a cosine, 1 for VPSchedule. For a network that counts time otherwise write "
    "ScoreModel(..., time=999.0), or time=lambda t: 1 - t where its data are at 1."
)
FOLLOW = (
    "Write alpha and sigma with operators of PyTorch on t, linear between the entries of a table, "
    "without .detach(), NumPy or Python's numbers; or override drift, squared_diffusion and rates."
)


def check_schedule(schedule: object) -> Schedule:
    """Return `schedule` if losses and likelihoods under it mean something.

    Values are not looked at while `torch.compile` traces, nor under a fake tensor mode.
    """
    if not isinstance(schedule, Schedule):
        remedy = "With a scheduler of diffusers write from_diffusers(network, scheduler)."
        expected = "a schedule such as VPSchedule(), or a subclass of Schedule"
        raise TypeError(error_message("schedule", expected, schedule, remedy))
    name = type(schedule).__name__
    low, high = (
        check_number("schedule", getattr(schedule, end, None), f"{end} of {name} to be a number")
        for end in ("t_min", "t_max")
    )
    if low >= high:
        expected, got = f"{name} to have t_min < t_max", f"t_min = {low:g} and t_max = {high:g}"
        raise ValueError(error_message("schedule", expected, schedule, RANGE, got=got))
    places = torch.tensor(PLACES, dtype=torch.float64, device="cpu")
    if not torch.compiler.is_compiling() and type(places) is Tensor:
        with outside_inference_mode(), torch.no_grad():
            _check_values(schedule, (1 - places) * low + places * high)
    return schedule


def _check_values(schedule: Schedule, t: Tensor) -> None:
    """Raise ValueError for the first rule that is broken at a time t, which go from end to end."""
    name = type(schedule).__name__
    alpha, sigma = (_positive(schedule, part, t) for part in ("alpha", "sigma"))
    u = sigma.log() - alpha.log()
    grows = f"schedule: expected log(sigma/alpha) of {name} to grow with t; got"
    if (i := _broken(u.diff() > 0)) is not None:
        raise ValueError(
            f"{grows} one that does not from t = {t[i]:g} to t = {t[i + 1]:g}. {RANGE}"
        )
    found = _values(schedule, "time", torch.cat([u[:1] - 1, u, u[-1:] + 1]))
    sigma, alpha = (_positive(schedule, part, found[1:-1]) for part in ("sigma", "alpha"))
    again, atol = sigma.log() - alpha.log(), TOLERANCE * float(u.abs().mean())
    right = torch.isclose(again, u, rtol=TOLERANCE, atol=atol).all()
    if not bool(right and found.min() >= t[0] and found.max() <= t[-1]):
        raise ValueError(
            f"schedule: expected time of {name} to be the inverse of its log(sigma/alpha), inside "
            "[t_min, t_max]; got another. Return self.clip(t) from it and override log_sigma_hat "
            "as well, or subclass Schedule, where both follow from alpha and sigma."
        )
    inner = t[0] + (t[-1] - t[0]) * torch.tensor(INNER, dtype=t.dtype, device=t.device)
    diffusion = _values(schedule, "squared_diffusion", inner)
    (alpha, sigma), (alpha_rate, sigma_rate) = schedule(inner), schedule.rates(inner)
    grown = 2 * sigma.square() * (sigma_rate / sigma - alpha_rate / alpha)
    if not bool(((grown > 0) & torch.isclose(diffusion, grown, rtol=TOLERANCE)).all()):
        raise ValueError(f"{grows} derivatives that do not say so. {FOLLOW}")


def _positive(schedule: Schedule, part: str, t: Tensor) -> Tensor:
    """The values of alpha or sigma, which have to be positive and finite."""
    got = _values(schedule, part, t)
    if (i := _broken((got > 0) & got.isfinite())) is not None:
        raise ValueError(
            f"schedule: expected {type(schedule).__name__} to have a positive and finite {part}, "
            f"for a finite log(sigma/alpha); got {got[i]:g} at t = {t[i]:g}. {RANGE}"
        )
    return got


def _broken(holds: Tensor) -> int | None:
    """The first place where it does not hold; None if it holds everywhere."""
    return None if holds.all() else int(holds.int().argmin())


def _values(schedule: Schedule, method: str, t: Tensor) -> Tensor:
    """What a method returns for t, if that is a tensor like t."""
    value = getattr(schedule, method)(t.clone())
    like = isinstance(value, Tensor) and value.dtype == t.dtype and value.device == t.device
    if not like or value.shape != t.shape:
        where = f"{type(schedule).__name__}.{method}"
        expected = f"{where} to return a tensor like its argument, {describe_value(t)}"
        remedy = "Compute it from the argument: torch.ones_like(t) for a constant."
        raise TypeError(error_message("schedule", expected, value, remedy))
    return value
