r"""What a schedule has to be, checked where a ScoreModel is built.

α and σ are positive, log σ̂ grows from the data at t_min to the noise at t_max, and what a class
overrides or inherits agrees with its α and σ, derivatives with differences. Times of its own are
drawn in [t_min, t_max]. This is looked at on a grid and on a few draws, on the CPU and in float64,
whatever device the model is for: nothing is read from an accelerator.
"""

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

from hosm_losses._checks import check_number, complaint, describe
from hosm_losses._torch_internals import outside_inference_mode
from hosm_losses.schedules.base import Schedule

NEAR = (1e-4, 1e-3, 1e-2)
PLACES = (0.0, *NEAR, *(k / 64 for k in range(1, 64)), *(1 - p for p in reversed(NEAR)), 1.0)
DERIVATIVES = ("squared_diffusion", "drift", "rates")
# Irrational places, which lie between the entries of any table.
INNER = tuple(math.pi / k for k in (16, 6, 4))
# The first stays between the entries of a table, the second is long enough for float32.
STEPS = (1e-5, 1e-3)
TOLERANCE = 1e-2
DRAWS = 1000

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
FOLLOW = (
    "What a schedule does not override follows from alpha and sigma by differentiation. Write "
    "both with operators of PyTorch on t, linear between the entries where they are a table, "
    "without .detach(), NumPy or Python's numbers; or override drift, squared_diffusion and rates."
)
# What to do where a part is not positive: at t_min, and at t_max.
ADVICE = {"alpha": (FROM_THE_DATA, END_EARLIER), "sigma": (BEGIN_LATER, FROM_THE_DATA)}


def check_schedule(schedule: object) -> Schedule:
    """Return `schedule` if losses and likelihoods under it mean something.

    Values are not looked at while `torch.compile` traces, nor under a fake tensor mode.
    """
    if not isinstance(schedule, Schedule):
        kin = hasattr(schedule, "config")  # as of every scheduler of diffusers
        remedy = " Take from_diffusers(network, scheduler)." if kin else ""
        raise TypeError(
            "schedule: expected a schedule such as VPSchedule(), or a subclass of Schedule "
            f"with alpha and sigma of your own; got {describe(schedule)}.{remedy}"
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
        with outside_inference_mode(), torch.no_grad():
            _check_values(schedule, (1 - places) * low + places * high)
            _check_prior(schedule)
            if _overrides(schedule, "sample_time"):
                _check_draws(schedule)
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
    # The package's own formulas are known to be followed by what is inherited, and its own classes
    # to agree with themselves.
    own = [part for part in ("alpha", "sigma") if not _is_of_the_package(schedule, part)]
    known = type(schedule).__module__.startswith("hosm_losses.schedules.")
    parts = [part for part in DERIVATIVES if own or (_overrides(schedule, part) and not known)]
    if parts:
        _check_derivatives(schedule, parts, float(t[0]), float(t[-1] - t[0]))


def _check_derivatives(
    schedule: Schedule, parts: Iterable[str], start: float, span: float
) -> None:
    """Raise ValueError for a derivative that disagrees with differences of α and σ."""
    t = start + span * torch.tensor(INNER, dtype=torch.float64, device="cpu")
    for part in ("alpha", "sigma"):
        _positive(schedule, part, t)
    found = {part: _values(schedule, part, t) for part in parts}
    for diffusion in found.get("squared_diffusion", ()):
        # Of a nearest entry looked up in a table short differences are zero too.
        if (i := _broken(diffusion > 0)) is not None:
            raise ValueError(
                f"schedule: expected squared_diffusion of {type(schedule).__name__} to be "
                f"positive, as log(sigma/alpha) grows; got {diffusion[i]:g} at t = {t[i]:g}. "
                f"{_advice(schedule, 'squared_diffusion')}"
            )
    for step in STEPS:
        differences = _differences(schedule, t, step * span)
        try:
            for part in parts:
                for got, each in zip(found[part], differences[part], strict=True):
                    # What is 0 comes out of the differences as rounding.
                    _check_agreement(schedule, part, t, got, each, floor=1e-3 / span)
        except ValueError:
            if step == STEPS[-1]:
                raise
        else:
            return


def _differences(schedule: Schedule, t: Tensor, h: float) -> dict[str, tuple[Tensor, ...]]:
    """What the derivatives are by central differences."""
    alpha, sigma = schedule(t)
    after, before = (torch.stack(schedule(t + step)) for step in (h, -h))
    alpha_rate, sigma_rate = (after - before) / (2 * h)
    drift = alpha_rate / alpha
    diffusion = 2 * sigma * (sigma_rate - drift * sigma)
    return {
        "squared_diffusion": (diffusion,),
        "drift": (drift,),
        "rates": (alpha_rate, sigma_rate),
    }


def _check_prior(schedule: Schedule) -> None:
    prior: object = schedule.prior_std
    number = isinstance(prior, Real) and not isinstance(prior, bool)
    if not (number and 0 < float(prior) < math.inf):
        remedy = "Write prior_std = 1.0 in the class, or a property that returns a number."
        expected = f"prior_std of {type(schedule).__name__} to be a positive and finite number"
        raise ValueError(complaint("schedule", expected, prior, remedy))


def _check_draws(schedule: Schedule) -> None:
    """Raise TypeError or ValueError unless its own times are (B,) and in the range."""
    expected = f"sample_time of {type(schedule).__name__}"
    # What it draws changes no numbers of the user's.
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            t: object = schedule.sample_time(
                DRAWS, generator, device="cpu", dtype=torch.get_default_dtype()
            )
    except TypeError as error:
        raise TypeError(
            f"schedule: expected {expected} to take (batch, generator, *, device, dtype), as "
            f"losses call it; got {_first_line(error)}. Give it these arguments."
        ) from error
    real = isinstance(t, Tensor) and (t.is_floating_point() or schedule.integer_time)
    if not (real and t.device.type == "cpu" and t.shape == (DRAWS,)):
        expected += f" to return a floating-point tensor of shape ({DRAWS},) on the CPU for these"
        remedy = "Return times (batch,), of the dtype and on the device that it is asked for."
        raise TypeError(complaint("schedule", expected, t, remedy))
    low, high = schedule.t_min, schedule.t_max
    if (i := _broken((t >= low) & (t <= high))) is not None:
        expected += f" to draw times in [{low:g}, {high:g}], from t_min to t_max"
        remedy = "Return self.clip(t) from it, or widen the range."
        raise ValueError(complaint("schedule", expected, t, remedy, got=f"{float(t[i]):g}"))


def _positive(schedule: Schedule, part: str, t: Tensor) -> Tensor:
    """The values of alpha or sigma, which have to be positive and finite."""
    (got,) = _values(schedule, part, t)
    if (i := _broken((got > 0) & got.isfinite())) is not None:
        at_start, at_end = ADVICE[part]
        ends = {schedule.t_min: ("t_min", at_start), schedule.t_max: ("t_max", at_end)}
        place, advice = ends.get(float(t[i]), ("t", "Correct the formula, or the range."))
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
            f"sigma; got {got[i]:g} for {wanted[i]:g} at t = {t[i]:g}. {_advice(schedule, part)}"
        )


def _advice(schedule: Schedule, part: str) -> str:
    """What to do where a method does not go with α and σ."""
    if not _overrides(schedule, part):
        return FOLLOW
    return f"Override {part} as well, or subclass Schedule, where it follows from alpha and sigma."


def _broken(holds: Tensor) -> int | None:
    """A place where it does not hold, an end before one between; None if it holds everywhere."""
    last = len(holds) - 1
    return None if holds.all() else next(i for i in (0, last, *range(last)) if not holds[i])


def _is_of_the_package(schedule: Schedule, method: str) -> bool:
    # Of the instance, which may hold a function of its own.
    return str(getattr(schedule, method).__module__).startswith("hosm_losses.")


def _overrides(schedule: Schedule, method: str) -> bool:
    return getattr(type(schedule), method) is not getattr(Schedule, method)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _values(schedule: Schedule, method: str, t: Tensor) -> tuple[Tensor, ...]:
    """What a method returns for t, if that is a tensor like t, or a tuple of such tensors."""
    where = f"schedule: expected {type(schedule).__name__}.{method}"
    before = t.clone()
    try:
        returned = getattr(schedule, method)(t)
    except NotImplementedError as error:
        raise TypeError(f"schedule: {error}") from error
    except Warning:  # an error by a filter of the user's, of which PyTorch may be the cause
        raise
    except Exception as error:
        if method in DERIVATIVES and not _overrides(schedule, method):
            raise ValueError(
                f"{where} to follow from alpha and sigma, whose values are right; got "
                f"{type(error).__name__}: {_first_line(error)}. {FOLLOW}"
            ) from error
        raise ValueError(
            f"{where} to take a CPU tensor, which this check gives it; got "
            f"{type(error).__name__}: {_first_line(error)}. Write it with operators "
            "of PyTorch on that tensor, torch.exp and not math.exp, torch.where and not if, and "
            "move tensors that it holds to the tensor's device."
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
