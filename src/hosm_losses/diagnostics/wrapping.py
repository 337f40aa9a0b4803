r"""Check that a network's schedule, time, prediction and data units match its training.

Formula:
    Under another schedule, data c x₀ + b become x = α (c x₀ + b) + σ ε. If σ/α = c σ̂, then x is
    x₀ + σ̂ ε in other units, so the best prediction of ε is the same. The losses of all wrappings
    can therefore be compared at the same u = log σ̂, the noise level of x₀, with the same ε.

    For data with mean m and covariance C, the best linear predictor is
    ε̂ = σ̂ (C + σ̂²)⁻¹ (x₀ − m + σ̂ ε). Its loss is ℓ(u) = mean_i λ_i/(λ_i + σ̂²) for the
    eigenvalues λ of C.

    Losses are compared as multiples of ℓ(u), so that every level counts equally. The predicted ε
    is p · output + q x, so one call of the network serves every kind of prediction and both signs.

    All candidates are ranked on one draw of noise. The model's own wrapping and the three best
    candidates are then measured again on eight fresh draws of noise, and the verdict uses these
    measurements. This many draws are needed because a schedule that shifts a likelihood by a third
    of a nat may change the loss by only two per cent.

The candidates are the wrappings with which networks are commonly trained. If the schedule is a
table, the network receives an index into a table of 1000 entries, or into one as long as the
model's own table. score_sde passes 999 t as the time under VP, and σ or its logarithm under VE.
Inside its preconditioning, EDM passes log σ / 4 as the time. In flow matching, time runs from data
to noise or from noise to data; in diffusers, it runs up to 1000.
"""

import copy
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import (
    at_least_float32,
    check_generator,
    check_model_kwargs,
    check_sample_batch,
    error_message,
    expand_right,
    sum_elements,
)
from hosm_losses._torch_internals import leave_inference_mode, outside_inference_mode
from hosm_losses.derivatives import NetworkState
from hosm_losses.diagnostics.values import check_rows
from hosm_losses.model import ScoreModel, bind_model, check_model
from hosm_losses.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    LinearFlowSchedule,
    Schedule,
    VESchedule,
    VPSchedule,
)

LEAST_SAMPLES, LEVELS = 16, 12
SMALLEST, LARGEST = 0.02, 0.99  # networks differ if the linear loss is between these limits
MARGIN, ERRORS = 0.1, 2.0  # losses differ by over this fraction plus this many standard errors
WORSE = 0.25  # a network that is worse than linear at this fraction of levels is not trained
REPEATED, DRAWS = 3, 8  # candidates to measure again, and fresh draws of noise for each
STEP = 7  # shift of the levels from draw to draw; coprime to 8, 9, 10, 11 and 12 levels
FINE_MARGIN, FINE_ERRORS = 0.005, 4.0  # limits for a slight difference, with the fresh draws
CLIP = 10.0  # limit of a sample's multiple of ℓ, so that outliers do not dominate a mean
SIMILAR = 0.02  # losses within this fraction of the best count as equal
REFINED = 3  # schedules and times that are tried with other units of the data
KINDS = ("epsilon", "score", "x0", "v", "velocity")
LEAST_STEPS = 100  # with fewer steps, betas of the known tables would exceed 1
OWN = "your schedule"
Times = dict[str, Any]


@dataclass(frozen=True)
class WrappingCandidate:
    """A way to wrap a network; it is printed as the arguments of `ScoreModel`.

    Attributes:
        schedule: the schedule, as code; "your schedule" for the model's own.
        prediction: "epsilon", "score", "x0", "v" or "velocity".
        time: the argument `time`, as code; "" if there is none, "yours" for the model's own.
        negated: whether the output has to be negated.
        units: the data to pass, as an expression in x0; "x0" for unchanged data.
        loss: the mean squared error of ε̂ per element under this wrapping.
        own_loss: the mean squared error under your own wrapping, at the same noise levels.
    """

    schedule: str
    prediction: str
    time: str
    negated: bool
    units: str
    loss: float
    own_loss: float

    def __str__(self) -> str:
        """Return the arguments, and any changes to the output and the data."""
        text = f"{self.schedule}, prediction={self.prediction!r}"
        text += f", time={self.time}" if self.time else ""
        text += ", the output times -1" if self.negated else ""
        return text + (f", the data as {self.units}" if self.units != "x0" else "")


@dataclass(frozen=True, repr=False)
class WrappingReport:
    """The result of `check_wrapping`; `print` shows it as a table and a verdict.

    Losses are means over the final draws of noise. In the table, "worse" marks the levels at which
    the network is worse than the linear predictor; the verdict counts these levels.

    Attributes:
        ok: True if no candidate fits better than your wrapping, and the network beats the best
            linear predictor.
        best: the candidate that fits better than your wrapping; None if no candidate does.
        undecided: whether `best` fits better, but by less than 10 % plus two standard errors.
        gain: how much better `best` fits, as a fraction of the loss under your wrapping; 0 if
            `best` is None.
        log_sigma_hat: the noise levels, log σ/α in the units of the data.
        losses: the mean squared error of ε̂ at each level, under your wrapping.
        linear: the mean squared error of the best linear predictor at each level.
        best_losses: the mean squared error of `best` at each level; NaN at levels outside the
            schedule of `best`, and None if `best` is None.
        is_worse: for each level, whether the network is worse there than the linear predictor by
            more than 10 % plus two standard errors.
        calls: the number of calls to the network.
    """

    ok: bool
    best: WrappingCandidate | None
    undecided: bool
    gain: float
    log_sigma_hat: list[float]
    losses: list[float]
    linear: list[float]
    best_losses: list[float] | None
    is_worse: list[bool]
    calls: int

    @property
    def worse(self) -> int:
        """The number of levels at which the network is worse than the linear predictor."""
        return sum(self.is_worse)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as dicts, lists and numbers, for JSON."""
        return asdict(self) | {"worse": self.worse}

    def __repr__(self) -> str:
        """Return the verdict, without the losses."""
        return f"WrappingReport({self._verdict()})"

    def __str__(self) -> str:
        """Return the losses by noise level, then the verdict."""
        columns = {"log σ/α": self.log_sigma_hat, "yours": self.losses, "linear": self.linear}
        if self.best_losses is not None:
            columns["best"] = self.best_losses
        lines = ["".join(f"{name:>10}" for name in columns)]
        rows = zip(*columns.values(), strict=True)
        for row, worse in zip(rows, self.is_worse, strict=True):
            lines.append("".join(f"{number:10.3g}" for number in row) + "  worse" * worse)
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.undecided:
            return f"undecided: {self.best} fits better, by {100 * self.gain:.2g} %"
        if self.best is not None:
            return (
                f"fits best as {self.best}: {self.best.loss:.2g} where you have "
                f"{self.best.own_loss:.2g}"
            )
        levels = f"{self.worse} of {len(self.linear)} noise levels"
        if not self.ok:
            return f"not trained, or no candidate fits: worse than a linear predictor at {levels}"
        return f"ok: no candidate fits better; worse than a linear predictor at {levels}"


class Units(NamedTuple):
    """A change of data units to scale · x0 + shift, and this expression as code."""

    text: str = "x0"
    scale: float = 1.0
    shift: float = 0.0


AS_THEY_ARE = Units()


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of a network: noised data and a time, with the code for both.

    Instances are compared by identity, because a user's schedule may not be hashable.
    """

    schedule: Schedule
    schedule_text: str
    time: Any
    time_text: str
    units: Units = AS_THEY_ARE


class Read(NamedTuple):
    """A candidate: the inputs of the network, and how to interpret the network's output."""

    inputs: Inputs
    kind: str
    sign: int

    def text(self) -> tuple[str, ...]:
        """Return the parts of the candidate as code, in the order of `WrappingCandidate`."""
        inputs = self.inputs
        sign = str(self.sign)
        return inputs.schedule_text, self.kind, inputs.time_text, sign, inputs.units.text


def check_wrapping(
    model: ScoreModel,
    x0: Tensor,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> WrappingReport:
    """Compare the wrapping of a trained network with others that may have been used in training.

    A wrapping consists of the schedule, the time, the kind and sign of the prediction, and the
    units of the data. If any of these differs from what was used in training, no error is raised,
    but losses and likelihoods are wrong. The candidates combine the common schedules and times,
    every kind of prediction with both signs, and the usual units of data. All candidates are
    measured at the same noise levels and with the same noise. Only a trained network can be
    checked.

    The network is called at most 182 times, and usually about 100 times. Each call processes all
    of x0 and computes no gradients. The states of the network and of the global random
    generators are left unchanged. Call `model.eval()` first if the network has dropout or batch
    norm.

    Args:
        model: the score model, with trained weights.
        x0: at least 16 samples of clean data (B, *), in the units that the model expects; use a
            few hundred samples if each has few elements.
        model_kwargs: keyword arguments of the network.
        generator: the source of the noise, on the device of x0; the global one if None.

    Returns:
        The report. `ok` is False if a candidate, which is then `best`, beats both your wrapping
        and the best linear predictor. If `best` fits better by more than 10 % plus two standard
        errors, use `best`. If the advantage of `best` exceeds both half a per cent and four
        standard errors, but not 10 % plus two standard errors, the report is `undecided`. `ok` is
        also False if the network is worse than the linear predictor at a quarter of the noise
        levels or more, which means that the network is untrained or that no candidate fits.

    Raises:
        DerivativeError: if a tensor in `model_kwargs` is as long as the batch but does not have
            one entry per sample; mark such a tensor as `Shared`.
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape or device is invalid, if there are too few samples, or if the data
            are so small or so large that no noise level of the schedule is comparable to them.

    Example:
        >>> from hosm_losses import VPSchedule
        >>> data, schedule = torch.tensor([[-1.0], [1.0]]).repeat(200, 1), VPSchedule()
        >>> def trained(x, t):  # the best prediction of the noise
        ...     alpha, sigma = (each[:, None] for each in schedule(t))
        ...     return (x - alpha * torch.tanh(alpha * x / sigma**2)) / sigma
        >>> check_wrapping(ScoreModel(trained, schedule), data).ok
        True
        >>> print(check_wrapping(ScoreModel(trained, schedule, "v"), data).best)
        your schedule, prediction='epsilon'
    """
    check_model(model)
    data = leave_inference_mode(check_sample_batch("x0", x0))
    kwargs = check_model_kwargs(model_kwargs)
    source = check_generator(generator, data.device)
    if len(data) < LEAST_SAMPLES:
        raise ValueError(error_message("x0", f"{LEAST_SAMPLES} samples or more", data))
    before = NetworkState(model.network, data)
    try:
        with outside_inference_mode(), torch.no_grad():
            report = _Search(model, data, source, kwargs).report()
            if kwargs:
                dtype = torch.promote_types(data.dtype, torch.float32)
                t = model.schedule.sample_time(len(data), device=data.device, dtype=dtype)
                check_rows(bind_model(model, len(t), kwargs, t), data)
            return report
    finally:
        before.restore()


class _Linear:
    """The best linear predictor of ε, from the second moments of the data."""

    def __init__(self, data: Tensor) -> None:
        flat = data.flatten(1).double().cpu()
        self.centred, self.basis = flat - flat.mean(0), None
        self.variances = self.centred.square().mean(0)
        if len(flat) >= 4 * flat.shape[1]:  # fewer samples give no useful covariance
            covariance = self.centred.T @ self.centred / len(flat)
            variances, self.basis = torch.linalg.eigh(covariance)
            self.variances, self.centred = variances.clamp(min=0), self.centred @ self.basis

    def expected(self, levels: Tensor) -> Tensor:
        """ℓ(u), with the shape of the levels."""
        sum_of_both = self.variances + (2 * levels[..., None]).exp()
        return (self.variances / sum_of_both).mean(-1)

    def losses(self, noise: Tensor, levels: Tensor) -> Tensor:
        """The predictor's loss for each sample, (B,)."""
        noise, sigma = noise.flatten(1).double().cpu(), levels.exp()[:, None]
        noise = noise if self.basis is None else noise @ self.basis
        error = self.variances * noise - sigma * self.centred
        return _mean_square(error / (self.variances + sigma.square()))

    def levels(self, schedule: Schedule, count: int) -> Tensor:
        """The noise levels (count,) at which networks differ, within the range of the schedule."""
        low, high = schedule.log_sigma_hat_range
        grid = torch.linspace(low, high, 400, dtype=torch.float64, device="cpu")
        expected = self.expected(grid)
        inside = grid[(expected > SMALLEST) & (expected < LARGEST)]
        if not len(inside):
            size = f"a size between {math.exp(low):.2g} and {math.exp(high):.2g}"
            got = f"a standard deviation of {float(self.variances.mean().sqrt()):.2g}"
            remedy = "Scale them as in the network's training."
            raise ValueError(error_message("x0", f"data of {size}", None, remedy, got=got))
        return torch.linspace(
            float(inside[0]), float(inside[-1]), count, dtype=torch.float64, device="cpu"
        )


class _Search:
    """The losses (draws, B) of the candidates on one batch of data.

    Each sample gets a different noise level in each draw, so that all samples have similar sets of
    levels.
    """

    def __init__(
        self,
        model: ScoreModel,
        data: Tensor,
        source: torch.Generator | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        self.model, self.data, self.source, self.kwargs = model, data, source, kwargs
        self.predictor, self.calls = _Linear(data), 0
        self.levels = self.predictor.levels(model.schedule, min(LEVELS, len(data) // 2))
        self.own = Read(own_inputs(model), model.prediction, 1)
        self._draw(1)
        self._measure(self.own.inputs)
        for inputs in all_inputs(model):
            self._try(inputs)
        scores = self._scores()
        best = dict.fromkeys(read.inputs for read in sorted(scores, key=scores.__getitem__))
        for inputs in dict.fromkeys([self.own.inputs, *list(best)[:REFINED]]):
            for units in all_units(data):
                self._try(replace(inputs, units=units))
        self.first = self._first()
        self._draw(DRAWS)
        for inputs in dict.fromkeys(read.inputs for read in (self.own, *self.first)):
            self._measure(inputs)

    def _draw(self, count: int) -> None:
        """Draw noise and levels, (count, B), and discard the losses from earlier draws."""
        like, levels = self.data, len(self.levels)
        shape = (count, *like.shape)
        self.noise = torch.randn(
            shape, generator=self.source, dtype=like.dtype, device=like.device
        )
        turn = STEP * torch.arange(count, device="cpu")[:, None]
        self.place = (torch.arange(len(like), device="cpu") + turn) % levels
        self.expected = self.predictor.expected(self.levels)[self.place]
        pairs = zip(self.noise, self.levels[self.place], strict=True)
        self.linear = torch.stack([self.predictor.losses(*pair) for pair in pairs])
        self.losses: dict[Read, Tensor] = {}

    def _try(self, inputs: Inputs) -> None:
        with suppress(Exception):  # a network may refuse inputs that it was not made for
            self._measure(inputs)

    def _measure(self, inputs: Inputs) -> None:
        """Call the network once per draw, and record the loss for every kind and sign."""
        draws = [
            self._call(inputs, *draw)
            for draw in zip(self.noise, self.levels[self.place], strict=True)
        ]
        for read in draws[0]:
            self.losses[read] = torch.stack([losses[read] for losses in draws])

    def _call(self, inputs: Inputs, noise: Tensor, level: Tensor) -> dict[Read, Tensor]:
        """Losses (B,) for every kind and sign, from one call of the network.

        The losses are NaN at levels outside the schedule. The new wrapping is not checked, because
        any fault in the wrapping shows up in its loss.
        """
        schedule, units, data = inputs.schedule, inputs.units, self.data
        level = level + math.log(units.scale)
        low, high = schedule.log_sigma_hat_range
        outside = (level < low - 1e-6) | (level > high + 1e-6)
        t = schedule.time(level).to(data.device, torch.promote_types(data.dtype, torch.float32))
        t = schedule.clip(t)
        if schedule.integer_time:
            t = t.round().long() if self.model.schedule.integer_time else t.round()
        candidate = _with(self.model, schedule=schedule, time=inputs.time)
        alpha, sigma = (expand_right(c, data) for c in candidate.coefficients(t, data))
        x = (alpha * (units.scale * data + units.shift) + sigma * noise).to(data.dtype)
        self.calls += 1
        output, losses = candidate.predict(x, t, **self.kwargs), {}
        for kind in KINDS:
            p, q = _with(candidate, prediction=kind).affine(t, x)
            part = output if p is None else p * output
            of_x = -noise if q is None else q * x - noise
            for sign in (1, -1):
                loss = _mean_square(sign * part + of_x)
                loss = loss.nan_to_num(math.inf)
                losses[Read(inputs, kind, sign)] = loss.masked_fill(outside, math.nan)
        return losses

    def _by_level(self, losses: Tensor) -> Tensor:
        """Return the mean loss at each level, (…, L), from losses (…, draws, B)."""
        parts = [losses[..., self.place == place].mean(-1) for place in range(len(self.levels))]
        return torch.stack(parts, -1)

    def _multiples(self, losses: Tensor) -> Tensor:
        return (losses / self.expected).clamp(max=CLIP)

    def _scores(self) -> dict[Read, float]:
        """How much worse each candidate is than the best one at each level, averaged over levels.

        The score is infinite for a candidate whose schedule covers less than half of the levels.
        """
        means = self._by_level(self._multiples(torch.stack(list(self.losses.values()))))
        scores = (means - means.nan_to_num(math.inf).amin(0)).nanmean(1)
        scores[means.isnan().double().mean(1) > 0.5] = math.inf
        return dict(zip(self.losses, scores.tolist(), strict=True))

    def _excess(
        self, losses: Tensor, reference: Tensor, place: int | None = None
    ) -> tuple[float, float, float]:
        """The mean difference between two losses, its standard error, and the first loss's mean.

        If `place` is given, only the level with this index counts. The draws for a sample are
        averaged, because they are not independent.
        """
        losses, reference = self._multiples(losses), self._multiples(reference)
        left_out = (losses + reference).isnan()
        left_out = left_out if place is None else left_out | (self.place != place)
        difference = (losses - reference).masked_fill(left_out, math.nan).nanmean(0)
        difference = difference[~difference.isnan()]
        if len(difference) < 2:
            return 0.0, math.inf, 1.0
        error = float(difference.std()) / math.sqrt(len(difference))
        return float(difference.mean()), error, float(losses[~left_out].mean())

    def _is_worse(self, losses: Tensor) -> list[bool]:
        """For each level, whether the losses are worse than those of the linear predictor."""
        levels = range(len(self.levels))
        compared = (self._excess(losses, self.linear, place) for place in levels)
        return [excess - ERRORS * error > MARGIN * whole for excess, error, whole in compared]

    def _is_trained(self, read: Read) -> bool:
        """Whether a candidate predicts well, even if only through its term q x."""
        return sum(self._is_worse(self.losses[read])) < WORSE * len(self.levels)

    def _first(self) -> list[Read]:
        """The best-fitting candidates; among equals, the one with the fewest changes is first."""
        scores = self._scores()
        order = [read for read in scores if scores[read] < math.inf and read != self.own]
        order.sort(key=scores.__getitem__)
        trained = filter(self._is_trained, order)
        first = next(trained, None)
        if first is None:
            return []

        def is_as_good(read: Read) -> bool:
            excess, error, whole = self._excess(self.losses[read], self.losses[first])
            return excess <= max(SIMILAR * whole, error)

        def changes(read: Read) -> int:
            return sum(map(operator.ne, read.text(), self.own.text()))

        simplest = min(filter(self._is_trained, filter(is_as_good, order)), key=changes)
        chosen = dict.fromkeys([simplest, first, *itertools.islice(trained, REPEATED)])
        return list(chosen)[:REPEATED]

    def _beats_linear(self, read: Read) -> bool:
        """Whether a candidate beats the linear predictor, as only a trained network can."""
        excess, error, _ = self._excess(self.linear, self.losses[read])
        return excess > ERRORS * error

    def report(self) -> WrappingReport:
        """Return the verdict on the model's wrapping, with the losses by level."""
        own = self.losses[self.own]
        is_worse, clear, slight = self._is_worse(own), [], []
        for read in self.first:
            gain, error, whole = self._excess(own, self.losses[read])
            if gain - ERRORS * error > MARGIN * whole:
                clear.append(read)
            elif gain > max(FINE_ERRORS * error, FINE_MARGIN * whole):
                slight.append(read)
        # A barely trained network fits best if its output contributes least to the prediction.
        best = next(filter(self._beats_linear, [*clear, *slight]), None)
        candidate, best_losses, share = None, None, 0.0
        if best is not None:
            losses = self.losses[best]
            gain, _, whole = self._excess(own, losses)
            share = gain / whole
            inside, best_losses = ~losses.isnan(), self._by_level(losses).tolist()
            candidate = WrappingCandidate(
                schedule=best.inputs.schedule_text,
                prediction=best.kind,
                time=best.inputs.time_text,
                negated=best.sign < 0,
                units=best.inputs.units.text,
                loss=float(losses[inside].mean()),
                own_loss=float(own[inside].mean()),
            )
        return WrappingReport(
            ok=not clear and best is None and sum(is_worse) < WORSE * len(self.levels),
            best=candidate,
            undecided=best in slight,
            gain=share,
            log_sigma_hat=self.levels.tolist(),
            losses=self._by_level(own).tolist(),
            linear=self._by_level(self.linear).tolist(),
            best_losses=best_losses,
            is_worse=is_worse,
            calls=self.calls,
        )


def _with(model: ScoreModel, **changes: Any) -> ScoreModel:
    """Copy a model and set attributes of the copy; these hide modules of the same name."""
    changed = copy.copy(model)
    vars(changed).update(changes)
    return changed


def _mean_square(error: Tensor) -> Tensor:
    """The mean square over the dimensions of each sample (B, *), as a tensor (B,) on the CPU."""
    squares = sum_elements(at_least_float32(error).square(), 1)
    return (squares / error[0].numel()).double().cpu()


def own_inputs(model: ScoreModel) -> Inputs:
    """The inputs that the model passes to its network."""
    return Inputs(model.schedule, OWN, model.time, "" if model.time is None else "yours")


def all_inputs(model: ScoreModel) -> Iterator[Inputs]:
    """Yield inputs that the network may have received in training, in the data's own units."""
    own = model.schedule
    steps = len(own.alphas_cumprod) if isinstance(own, DiscreteSchedule) else 1000
    steps = steps if steps >= LEAST_STEPS else 1000
    plain: Times = {"": None}
    for text, schedule, times in [(OWN, own, _own_times(own, steps)), *_known(steps)]:
        if text == OWN or schedule != own:
            times = plain | times if model.time is None else {"yours": model.time} | plain | times
            for time_text, time in times.items():
                # On CUDA, a network that looks up an index must not get a negative one.
                negative = own.integer_time and "log" in time_text
                if not negative and (text != OWN or time is not model.time):
                    yield Inputs(schedule, text, time, time_text)


def _known(steps: int) -> Iterator[tuple[str, Schedule, Times]]:
    """Yield the known schedules, each as code and as an object, with alternative times."""
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
    """Yield other data units: bytes, centred bytes, unit variance, EDM's units, latents' units."""
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
