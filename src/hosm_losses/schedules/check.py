r"""What a schedule has to be, checked where a ScoreModel is built.

α and σ are positive, log σ̂ grows from the data at t_min to the noise at t_max, and what a class
overrides agrees with its α and σ. This is looked at on a grid, on the CPU and in float64, whatever
device the model is for: nothing is read from an accelerator.
"""

import torch
from torch import Tensor

from hosm_losses._checks import check_number, describe
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
BEGIN_LATER = "Begin where there is some noise, for example at t_min = 1e-5."
END_EARLIER = (
    "End before alpha reaches 0: at t_max = 0.999 for a flow, 0.9946 for a cosine, 1 for "
    "VPSchedule. If the network counts time otherwise, t stays in the schedule's units: "
    "ScoreModel(..., time=999.0)."
)
# What to do where a part is not positive: at t_min, and at t_max.
ADVICE = {"alpha": (FROM_THE_DATA, END_EARLIER), "sigma": (BEGIN_LATER, FROM_THE_DATA)}


def check_schedule(schedule: object) -> Schedule:
    """Return `schedule` if losses and likelihoods under it mean something.

    Values are not looked at while `torch.compile` traces, nor under a fake tensor mode.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(
            "schedule: expected a schedule such as VPSchedule(), or a subclass of Schedule "
            f"with alpha and sigma of your own; got {describe(schedule)}."
        )
    name = type(schedule).__name__
    for end in ("t_min", "t_max"):
        if getattr(schedule, end, None) is None:
            raise TypeError(
                f"schedule: expected {name} to have t_min, the end of the data, and t_max, that "
                f"of the noise; got no {end}. Set both in the class, for example "
                "t_min, t_max = 1e-5, 1.0."
            )
        check_number("schedule", getattr(schedule, end), f"{end} of {name} to be a finite number")
    low, high = float(schedule.t_min), float(schedule.t_max)
    if low >= high:
        raise ValueError(
            f"schedule: expected {name} to have t_min < t_max; got t_min = {low:g} and t_max = "
            f"{high:g}. {FROM_THE_DATA}"
        )
    places = torch.tensor(PLACES, dtype=torch.float64, device="cpu")
    if not torch.compiler.is_compiling() and type(places) is Tensor:
        with torch.no_grad():
            _check_values(schedule, (1 - places) * low + places * high)
    return schedule


def _check_values(schedule: Schedule, t: Tensor) -> None:
    """Raise ValueError for the first rule that is broken at a time t, which go from end to end."""
    name = type(schedule).__name__
    alpha, sigma = (_positive(schedule, part, t) for part in ("alpha", "sigma"))
    (u,) = _values(schedule, "log_sigma_hat", t)
    grows = f"schedule: expected log(sigma/alpha) of {name} to grow with t; got"
    if not u[-1] > u[0]:
        raise ValueError(
            f"{grows} {u[0]:g} at t_min = {t[0]:g} and {u[-1]:g} at t_max = {t[-1]:g}. Two "
            f"arguments may be reversed. {FROM_THE_DATA}"
        )
    if (i := _broken(u.diff() > 0)) is not None:
        raise ValueError(
            f"{grows} one that does not from t = {t[i]:g} to t = {t[i + 1]:g}. Correct the "
            "formula, or take a range in which it grows."
        )
    _check_agreement(schedule, "log_sigma_hat", t, u, sigma.log() - alpha.log())
    if _overrides(schedule, "time"):
        (found,) = _values(schedule, "time", torch.cat([u[:1] - 1, u, u[-1:] + 1]))
        if (i := _broken((found >= t[0]) & (found <= t[-1]))) is not None:
            raise ValueError(
                f"schedule: expected {name}.time to return times in [t_min, t_max]; got "
                f"{found[i]:g}. Return self.clip(t) from it."
            )
        (again,) = _values(schedule, "log_sigma_hat", found[1:-1])
        _check_agreement(schedule, "time", t, again, u)
    overridden = [p for p in ("drift", "squared_diffusion", "rates") if _overrides(schedule, p)]
    if not overridden:
        return
    span = float(t[-1] - t[0])
    t, h = t[0] + span * t.new_tensor(INNER), STEP * span
    alpha, sigma = schedule(t)
    after, before = (torch.stack(schedule(t + step)) for step in (h, -h))
    rates = alpha_rate, sigma_rate = (after - before) / (2 * h)
    drift = alpha_rate / alpha
    diffusion = 2 * sigma * (sigma_rate - drift * sigma)
    differences = {"drift": (drift,), "squared_diffusion": (diffusion,), "rates": rates}
    for part in overridden:
        for got, wanted in zip(_values(schedule, part, t), differences[part], strict=True):
            # What is 0 comes out of the differences as rounding.
            _check_agreement(schedule, part, t, got, wanted, floor=1e-3 / span)


def _positive(schedule: Schedule, part: str, t: Tensor) -> Tensor:
    """The values of alpha or sigma, which have to be positive and finite."""
    (got,) = _values(schedule, part, t)
    if (i := _broken((got > 0) & got.isfinite())) is not None:
        at_start, at_end = ADVICE[part]
        ends = {0: ("t_min", at_start), len(t) - 1: ("t_max", at_end)}
        place, advice = ends.get(i, ("t", "Correct the formula, or the range."))
        raise ValueError(
            f"schedule: expected {type(schedule).__name__} to have a positive and finite {part}, "
            f"for a finite log(sigma/alpha); got {part} = {got[i]:g} at {place} = {t[i]:g}. "
            f"{advice}"
        )
    return got


def _check_agreement(
    schedule: Schedule, part: str, t: Tensor, got: Tensor, wanted: Tensor, floor: float = 0.0
) -> None:
    """Raise ValueError unless what a method returned is what α and σ say."""
    atol = TOLERANCE * float(wanted.abs().mean()) + floor
    i = _broken(torch.isclose(got, wanted, rtol=TOLERANCE, atol=atol))
    if i is not None:
        raise ValueError(
            f"schedule: expected {part} of {type(schedule).__name__} to agree with its alpha and "
            f"sigma; got {got[i]:g} for {wanted[i]:g} at t = {t[i]:g}. Override {part} as well, "
            "or subclass Schedule, where it follows from alpha and sigma."
        )


def _broken(holds: Tensor) -> int | None:
    """A place where it does not hold, an end before one between; None if it holds everywhere."""
    last = len(holds) - 1
    return None if holds.all() else next(i for i in (0, last, *range(last)) if not holds[i])


def _overrides(schedule: Schedule, method: str) -> bool:
    return getattr(type(schedule), method) is not getattr(Schedule, method)


def _values(schedule: Schedule, method: str, t: Tensor) -> tuple[Tensor, ...]:
    """What a method returns for t, if that is a tensor like t, or a tuple of such tensors."""
    where = f"schedule: expected {type(schedule).__name__}.{method}"
    before = t.clone()
    try:
        returned = getattr(schedule, method)(t)
    except NotImplementedError as error:
        raise TypeError(f"schedule: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{where} to take a CPU tensor, which this check gives it; got "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]} Write it with operators "
            "of PyTorch on that tensor, torch.exp and not math.exp, and move tensors that it "
            "holds to the tensor's device."
        ) from error
    if not torch.equal(t, before):
        raise ValueError(
            f"{where} to leave its argument alone; got one that writes to it. Write t = t * 2, "
            "which makes a new tensor, and not t *= 2."
        )
    values = returned if isinstance(returned, tuple) else (returned,)
    for value in values:
        like = isinstance(value, Tensor) and value.dtype == t.dtype and value.device == t.device
        if not like or value.shape != t.shape:
            raise TypeError(
                f"{where} to return a tensor like its argument, {describe(t)}; got "
                f"{describe(value)}. Compute it from the argument, in its dtype and on its "
                "device: torch.ones_like(t) for a constant."
            )
    return values
