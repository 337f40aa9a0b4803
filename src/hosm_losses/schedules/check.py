r"""What a schedule has to be, checked where a ScoreModel is built.

What:
    All that follows from a schedule is right if α and σ are positive and log σ̂ grows from the
    data at t_min to the noise at t_max, and what a class overrides agrees with its α and σ. This
    is looked at on a grid, on the CPU and in float64, whatever device the model is for: nothing
    waits, and nothing is read from an accelerator.
"""

__all__ = ["check_schedule"]

import math
from numbers import Real

import torch
from torch import Tensor

from hosm_losses._checks import describe
from hosm_losses.schedules.base import Schedule

NEAR = (1e-4, 1e-3, 1e-2)
PLACES = (0.0, *NEAR, *(k / 64 for k in range(1, 64)), *(1 - p for p in reversed(NEAR)), 1.0)
INNER = (0.2, 0.5, 0.8)
STEP = 1e-3
TOLERANCE = 1e-2
FROM_THE_DATA = (
    "t_min is the end of the data and t_max that of the noise. If the data are at t = 1, describe "
    "the path in 1 - t: alpha(t) and sigma(t) of your formulas at 1 - t, and "
    "ScoreModel(..., time=lambda t: 1 - t)."
)


def check_schedule(schedule: object) -> Schedule:
    """Return `schedule` if losses and likelihoods under it mean something.

    Values are not looked at while `torch.compile` traces, nor under a fake tensor mode.

    Args:
        schedule: what was given for one.

    Returns:
        The schedule.

    Raises:
        TypeError: if it is none, lacks t_min, t_max, alpha or sigma, or returns no tensor like t.
        ValueError: if t_min and t_max are not finite and in order, if alpha or sigma is not
            positive and finite between them, if log(sigma/alpha) does not grow, or if what the
            class overrides contradicts its alpha and sigma.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(
            "schedule: expected a schedule such as VPSchedule(), or a subclass of Schedule "
            f"with alpha and sigma of your own; got {describe(schedule)}."
        )
    low, high = (_number(schedule, end) for end in ("t_min", "t_max"))
    if low >= high:
        raise ValueError(
            f"schedule: expected {_name(schedule)} to have t_min < t_max; got t_min = {low:g} and "
            f"t_max = {high:g}. {FROM_THE_DATA}"
        )
    places = torch.tensor(PLACES, dtype=torch.float64, device="cpu")
    if torch.compiler.is_compiling() or type(places) is not Tensor:
        return schedule
    with torch.no_grad():
        t = _between(low, high, places)
        for part in ("alpha", "sigma"):
            _check_positive(schedule, part, t)
        _check_growing(schedule, t)
        _check_inverse(schedule, t)
        _check_rates(schedule, _between(low, high, places.new_tensor(INNER)), high - low)
    return schedule


def _name(schedule: Schedule) -> str:
    return type(schedule).__name__


def _between(low: float, high: float, places: Tensor) -> Tensor:
    return (1 - places) * low + places * high


def _number(schedule: Schedule, end: str) -> float:
    value = getattr(schedule, end, None)
    if value is None:
        raise TypeError(
            f"schedule: expected {_name(schedule)} to have t_min, the end of the data, and t_max, "
            f"that of the noise; got no {end}. Set both in the class, for example "
            "t_min, t_max = 1e-5, 1.0."
        )
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(
            f"schedule: expected {end} of {_name(schedule)} to be a finite number; got "
            f"{describe(value)}. Give a time at which alpha and sigma are finite."
        )
    return float(value)


def _values(schedule: Schedule, method: str, t: Tensor) -> tuple[Tensor, ...]:
    """What a method returns for t, if that is a tensor like t, or a tuple of such tensors."""
    where = f"{_name(schedule)}.{method}"
    before = t.clone()
    try:
        returned = getattr(schedule, method)(t)
    except NotImplementedError as error:
        raise TypeError(f"schedule: {error}") from error
    except Exception as error:
        raise ValueError(
            f"schedule: expected {where} to take a CPU tensor, which this check gives it; got "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]} Write it with operators "
            "of PyTorch on that tensor, torch.exp and not math.exp, and move tensors that it "
            "holds to the tensor's device."
        ) from error
    if not torch.equal(t, before):
        raise ValueError(
            f"schedule: expected {where} to leave its argument alone; got one that writes to it. "
            "Write t = t * 2, which makes a new tensor, and not t *= 2."
        )
    values = returned if isinstance(returned, tuple) else (returned,)
    for value in values:
        if not (
            isinstance(value, Tensor)
            and (value.shape, value.dtype, value.device) == (t.shape, t.dtype, t.device)
        ):
            raise TypeError(
                f"schedule: expected {where} to return a tensor like its argument, {describe(t)}; "
                f"got {describe(value)}. Compute it from the argument, in its dtype and on its "
                "device: torch.ones_like(t) for a constant."
            )
    return values


def _check_positive(schedule: Schedule, part: str, t: Tensor) -> None:
    (values,) = _values(schedule, part, t)
    bad = ~((values > 0) & values.isfinite())
    if not bool(bad.any()):
        return
    last = len(t) - 1
    index = next(index for index in (0, last, *range(last)) if bad[index])
    where = {0: "t_min = ", last: "t_max = "}.get(index, "t = ")
    if part == "sigma" and index == 0:
        advice = "Begin where there is some noise, for example at t_min = 1e-5."
    elif part == "alpha" and index == last:
        advice = (
            "End before alpha reaches 0: at t_max = 0.999 for a flow, 0.9946 for a cosine, 1 for "
            "VPSchedule. If the network counts time otherwise, t stays in the schedule's units: "
            "ScoreModel(..., time=999.0)."
        )
    else:
        advice = FROM_THE_DATA if index in (0, last) else "Correct the formula, or the range."
    raise ValueError(
        f"schedule: expected {_name(schedule)} to have a positive and finite {part}, for a finite "
        f"log(sigma/alpha); got {part} = {float(values[index]):g} at {where}{float(t[index]):g}. "
        f"{advice}"
    )


def _check_growing(schedule: Schedule, t: Tensor) -> None:
    (u,) = _values(schedule, "log_sigma_hat", t)
    stuck = ~(u.diff() > 0)
    if not bool(stuck.any()):
        return
    low, high = float(u[0]), float(u[-1])
    if low < high:
        index = int(stuck.nonzero()[0])
        got = f"one that does not from t = {float(t[index]):g} to t = {float(t[index + 1]):g}"
        advice = "Correct the formula, or take a range in which it grows."
    else:
        got = f"{low:g} at t_min = {float(t[0]):g} and {high:g} at t_max = {float(t[-1]):g}"
        advice = f"Two arguments may be reversed. {FROM_THE_DATA}"
    raise ValueError(
        f"schedule: expected log(sigma/alpha) of {_name(schedule)} to grow with t; got {got}. "
        f"{advice}"
    )


def _check_inverse(schedule: Schedule, t: Tensor) -> None:
    """Log σ̂ is that of α and σ, and `time` its inverse, clipped to the ends."""
    alpha, sigma = schedule(t)
    (u,) = _values(schedule, "log_sigma_hat", t)
    _check_close(schedule, "log_sigma_hat", t, u, sigma.log() - alpha.log())
    if type(schedule).time is Schedule.time:
        return
    (found,) = _values(schedule, "time", torch.cat([u[:1] - 1, u, u[-1:] + 1]))
    if not bool(((found >= t[0]) & (found <= t[-1])).all()):
        raise ValueError(
            f"schedule: expected {_name(schedule)}.time to return times in [t_min, t_max]; got "
            f"[{float(found.min()):g}, {float(found.max()):g}]. Return self.clip(t) from it."
        )
    (again,) = _values(schedule, "log_sigma_hat", found[1:-1])
    _check_close(schedule, "time", t, again, u)


def _check_rates(schedule: Schedule, t: Tensor, span: float) -> None:
    """What the class overrides of the derivatives is what differences of α and σ say."""
    overridden = [
        name
        for name in ("drift", "squared_diffusion", "rates")
        if getattr(type(schedule), name) is not getattr(Schedule, name)
    ]
    if not overridden:
        return
    h = STEP * span
    alpha, sigma = schedule(t)
    (a1, s1), (a0, s0) = (schedule(t + sign * h) for sign in (1, -1))
    alpha_rate, sigma_rate = (a1 - a0) / (2 * h), (s1 - s0) / (2 * h)
    drift = alpha_rate / alpha
    expected = {
        "drift": (drift,),
        "squared_diffusion": (2 * sigma * (sigma_rate - drift * sigma),),
        "rates": (alpha_rate, sigma_rate),
    }
    for name in overridden:
        for got, value in zip(_values(schedule, name, t), expected[name], strict=True):
            # What is 0 comes out of the differences as rounding.
            _check_close(schedule, name, t, got, value, floor=1e-3 / span)


def _check_close(
    schedule: Schedule, method: str, t: Tensor, got: Tensor, expected: Tensor, floor: float = 0.0
) -> None:
    atol = TOLERANCE * float(expected.abs().mean()) + floor
    far = ~torch.isclose(got, expected, rtol=TOLERANCE, atol=atol)
    if not bool(far.any()):
        return
    index = int(far.nonzero()[0])
    raise ValueError(
        f"schedule: expected {method} of {_name(schedule)} to agree with its alpha and sigma; got "
        f"{float(got[index]):g} for {float(expected[index]):g} at t = {float(t[index]):g}. "
        f"Override {method} as well, or subclass Schedule, where it follows from alpha and sigma."
    )
