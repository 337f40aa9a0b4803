r"""Check that a network's schedule, time, prediction and data units match those used in training.

Formula:
    If a wrapping uses another schedule and rescales the data to c x₀ + b, the noised data are
    x = α (c x₀ + b) + σ ε. At σ/α = c σ̂, this is x₀ + σ̂ ε, scaled and shifted, and ε is as
    predictable from one as from the other. The losses of different wrappings are therefore
    comparable at the same ε and the same u = log σ̂, where σ̂ is in the units of x₀.

    For data with mean m and covariance C, the best linear predictor is
    ε̂ = σ̂ (C + σ̂²)⁻¹ (x₀ − m + σ̂ ε). Its loss is ℓ(u) = mean_i λ_i/(λ_i + σ̂²), where λ_i are
    the eigenvalues of C.

    Losses are divided by ℓ(u) before they are compared, so that every level counts equally. The
    predicted ε is p · output + q x, where only p and q depend on the kind and sign of the
    prediction, so one network call yields the losses for all kinds and both signs.

    The candidates are ranked with one draw of noise per sample. The model's own wrapping and the
    three best candidates are then measured again, with eight fresh draws, because a wrong schedule
    that shifts a log-likelihood by a third of a nat may change the loss by only two per cent. Half
    of the draws are spread evenly over the levels, the others in proportion to how much the losses
    of the candidates differ there from the loss under the model's own wrapping.

    A barely trained network fits best where its output contributes least to the predicted ε: read
    as v, if the data have unit variance, q x alone is already the best linear predictor of ε. A
    candidate is therefore not reported if its loss minus the linear predictor's loss exceeds CLOSE
    times the candidate's loss. It must also have a significantly smaller loss than the linear
    predictor, on average or at one or more levels, unless it keeps the units of the data and makes
    no more changes of kind and sign than BELIEVED allows: on nearly Gaussian data, even a trained
    network is hardly better than the linear predictor.
"""

import copy
import math
import operator
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosm_losses._checks import (
    at_least_float32,
    check_model_kwargs,
    check_sample_batch,
    check_whole,
    error_message,
    noised,
    progress_bar,
    sum_elements,
)
from hosm_losses._torch_internals import leave_inference_mode, outside_inference_mode
from hosm_losses.derivatives import NetworkState
from hosm_losses.diagnostics.candidates import AS_THEY_ARE, UNITS, Inputs, all_inputs, all_units
from hosm_losses.diagnostics.values import check_rows
from hosm_losses.model import (
    TARGETS,
    BoundModel,
    ScoreModel,
    apply_affine,
    bind_model,
    check_model,
)
from hosm_losses.schedules import Schedule

LEAST_SAMPLES, LEVELS = 16, 12
SECONDS = 30.0  # fewer samples are used if the calls would take longer
SMALLEST, LARGEST = 0.02, 0.99  # levels are used if the linear loss is between these limits
MARGIN, ERRORS = 0.1, 2.0  # a clear difference exceeds this fraction plus these standard errors
FINE_MARGIN, FINE_ERRORS = 0.005, 4.0  # a slight difference exceeds both of these limits
WORSE = 0.25  # a network that is worse than linear at this fraction of levels is untrained
CLOSE = 0.01  # a network this much worse than the linear predictor may still be trained
# How many changes of kind and sign a candidate may have if its loss is merely close to the linear
# predictor's. The keys are kinds of prediction; for all other kinds, the limit is 1.
BELIEVED = {"v": 0, "velocity": -1}
REPEATED, DRAWS = 3, 8  # candidates to measure again, and fresh draws of noise for each
GOLDEN = (math.sqrt(5) - 1) / 2
CLIP = 10.0  # limit of a sample's multiple of ℓ, so that outliers do not dominate a mean
SIMILAR = 0.02  # losses within this fraction of the best count as equal
REFINED = 3  # schedule-time pairs that are also tried with other units of the data


@dataclass(frozen=True)
class WrappingCandidate:
    """A way to wrap a network, printed as arguments of `ScoreModel`.

    Attributes:
        schedule: the schedule, as code; "your schedule" for the model's own.
        prediction: "epsilon", "score", "x0", "v" or "velocity".
        time: the argument `time`, as code; "" if there is none, "yours" for the model's own.
        negated: whether the output has to be negated.
        units: the data to pass, as an expression in x0; "x0" for unchanged data.
        loss: the mean squared error of the predicted noise under this wrapping.
        own_loss: the same error under your own wrapping, at the same noise levels.
    """

    schedule: str
    prediction: str
    time: str
    negated: bool
    units: str
    loss: float
    own_loss: float

    def __str__(self) -> str:
        """Return the arguments, followed by any changes to the output and the data."""
        text = f"{self.schedule}, prediction={self.prediction!r}"
        text += f", time={self.time}" if self.time else ""
        text += ", the output times -1" if self.negated else ""
        return text + (f", the data as {self.units}" if self.units != "x0" else "")


@dataclass(frozen=True, repr=False)
class WrappingReport:
    """The result of `check_wrapping`; printing it shows a table and a verdict.

    Losses are mean squared errors of the predicted noise, over the final draws. One is clearly
    larger than another if the difference, minus twice its standard error, is more than 10 % of the
    larger. In the table, "worse" marks the levels in `is_worse`.

    Attributes:
        ok: whether your wrapping passes the check. It fails if `best` is not None, or if the
            network's loss is clearly larger than the best linear predictor's, either on average or
            at a quarter or more of the levels.
        best: the highest-ranked candidate that fits better than your wrapping, by more than half a
            per cent and by more than four standard errors, or None. A candidate is excluded if an
            untrained network, which is at best as good as a linear predictor, could achieve its
            loss.
        undecided: whether the loss of `best` is smaller than yours, but not clearly smaller.
        gain: your loss minus that of `best`, as a fraction of your loss; 0 if `best` is None. Each
            loss is first divided by the linear predictor's expected loss at the same level, then
            averaged over the levels.
        detectable_gain: the smallest true gain, at least half a per cent, at which the check
            finds, with a probability of 0.97, that one of the three highest-ranked candidates fits
            better than your wrapping and than the linear predictor. It falls as the number of
            samples grows.
        log_sigma_hat: the noise levels log(σ/α), where σ/α is in the units of the data.
        losses: the loss at each level, under your wrapping.
        linear: the loss of the best linear predictor at each level.
        best_losses: the loss at each level, under `best`. NaN at levels outside the schedule of
            `best`, and None if `best` is None.
        is_worse: for each level, whether your loss is clearly larger than the linear predictor's.
        calls: the number of calls to the network, without those that were only timed.
        samples: the number of samples of x0 that were used.
        batch_size: the number of samples in x0.
    """

    ok: bool
    best: WrappingCandidate | None
    undecided: bool
    gain: float
    detectable_gain: float
    log_sigma_hat: list[float]
    losses: list[float]
    linear: list[float]
    best_losses: list[float] | None
    is_worse: list[bool]
    calls: int
    samples: int
    batch_size: int

    def __repr__(self) -> str:
        """Return the verdict, without the losses."""
        return f"WrappingReport({self._verdict()})"

    def __str__(self) -> str:
        columns = {"log σ/α": self.log_sigma_hat, "yours": self.losses, "linear": self.linear}
        if self.best_losses is not None:
            columns["best"] = self.best_losses
        lines = ["".join(f"{name:>10}" for name in columns)]
        for *row, worse in zip(*columns.values(), self.is_worse, strict=True):
            lines.append("".join(f"{number:10.3g}" for number in row) + "  worse" * worse)
        used, of = self.samples, self.batch_size
        lines += [f"{used} of {of} samples; samples={of} uses all"] * (used < of)
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.undecided:
            return f"undecided: {self.best} fits better, by {100 * self.gain:.2g} %"
        if self.best is not None:
            return (
                f"fits best as {self.best}: {self.best.loss:.2g} where you have "
                f"{self.best.own_loss:.2g}"
            )
        worse, levels = sum(self.is_worse), len(self.is_worse)
        counted = self.ok or worse >= WORSE * levels
        where = f"at {worse} of {levels} noise levels" if counted else "on average"
        linear = f"worse than a linear predictor by over 10 % and two standard errors {where}"
        if not self.ok:
            return f"not trained, or no candidate fits: {linear}"
        low, high = self.log_sigma_hat[0], self.log_sigma_hat[-1]
        return (
            f"ok: no candidate fits better; one better by {100 * self.detectable_gain:.2g} %, "
            f"averaged over log σ/α from {low:.2g} to {high:.2g}, would have been seen; {linear}"
        )


class Read(NamedTuple):
    """A candidate: the inputs of the network, and how to interpret the network's output."""

    inputs: Inputs
    kind: str
    sign: int

    def text(self) -> tuple[str, str, str, bool, str]:
        """Return the values of the first five attributes of a `WrappingCandidate`."""
        inputs = self.inputs
        code = inputs.schedule_text, self.kind, inputs.time_text
        return *code, self.sign < 0, inputs.units.text


def check_wrapping(
    model: ScoreModel,
    x0: Tensor,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    samples: int | None = None,
    progress: bool = False,
    generator: torch.Generator | None = None,
) -> WrappingReport:
    """Compare the wrapping of a trained network with others that may have been used in training.

    A wrapping consists of the schedule, the time, the kind and sign of the prediction, and the
    units of the data. If any of these differs from what was used in training, no error is raised,
    but losses and likelihoods are wrong. The candidates combine the common schedules and times,
    every kind of prediction with both signs, and the usual ranges of data, at the same noise
    levels and with the same noise. Only a trained network can be checked.

    The network is called without gradients at most 182 times, and usually about 100 times, on all
    of the samples used. If these calls would take longer than about 30 seconds, only some samples
    of x0 are used, at least 16; to predict this, a few more calls are timed first. Fewer samples
    detect only larger gains. The states of the network and of the global random generators are
    left unchanged. Call `model.eval()` first if the network has dropout or batch norm.

    Args:
        model: the score model, with trained weights.
        x0: at least 16 samples of clean data (B, *), in the units that the model expects; use a
            few hundred samples if each sample has few elements.
        model_kwargs: keyword arguments of the network.
        samples: how many samples of x0 to use, at least 16. If None, their number depends on the
            time that the calls take. To repeat a check, pass `report.samples` and the same seed.
        progress: whether to show a progress bar, which requires tqdm.
        generator: the source of the noise, on the device of x0; the global generator if None.

    Returns:
        The report. If a candidate fits better than your wrapping, `ok` is False and the candidate
        is `best`. Wrap the network as `best` describes, unless `undecided` is True. `ok` is also
        False if the network is clearly worse than a linear predictor: it is untrained, or no
        candidate fits.

    Raises:
        DerivativeError: if the first dimension of a tensor in `model_kwargs` equals the batch
            size, but the tensor does not hold one row per sample; mark such a tensor as `Shared`.
        ImportError: if `progress` is True and tqdm is not installed.
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
    if len(data) < LEAST_SAMPLES:
        raise ValueError(error_message("x0", f"{LEAST_SAMPLES} samples or more", data))
    if samples is not None:
        check_whole("samples", samples, LEAST_SAMPLES)
    dtype = torch.promote_types(data.dtype, torch.float32)
    most = len(list(all_inputs(model))) + UNITS * (1 + REFINED) + DRAWS * (1 + REPEATED)
    before = NetworkState(model.network, data)
    try:
        with (
            outside_inference_mode(),
            torch.no_grad(),
            progress_bar(progress, most, "call") as bar,
        ):
            t = model.schedule.sample_time(len(data), device=data.device, dtype=dtype)
            bound = bind_model(model, len(data), kwargs, t)
            count = _affordable(bound, data, most) if samples is None else samples
            before.restore()
            if count < len(data):  # rows from all parts of x0, which may be sorted or repeat
                multiples = GOLDEN * torch.arange(len(data), device="cpu").double()
                rows = (multiples % 1).argsort()[:count].to(data.device)
                bound, data = bound.rows(rows), data[rows]
            search = _Search(bound, data, generator, bar)
            bar(most - search.calls)
            if kwargs:
                check_rows(bound, data)
            return search.report(len(x0))
    finally:
        before.restore()


def _affordable(bound: BoundModel, data: Tensor, calls: int) -> int:
    """Return how many samples to use so that this number of calls takes about SECONDS at most.

    It is all samples, or LEAST_SAMPLES times a power of two, which hardly depends on the timing.
    """
    count = LEAST_SAMPLES
    with suppress(Exception):  # such as that of a network for this batch size alone
        while count < len(data):
            rows, seconds = bound.rows(slice(count)).native, math.inf
            for _ in range(2):  # the first call may compile the network
                start = time.perf_counter()
                rows(data[:count]).sum().item()  # waits for an accelerator
                seconds = min(seconds, time.perf_counter() - start)
            if (multiple := SECONDS / (calls * seconds)) < 2:
                return count
            count *= 2 ** int(math.log2(multiple))
    return len(data)


class _Linear:
    """The best linear predictor of ε, computed from the second moments of the data.

    With fewer than four samples per element, only the variances of the elements are used.
    """

    def __init__(self, data: Tensor) -> None:
        flat = data.flatten(1).double().cpu()
        self.centred, self.basis = flat - flat.mean(0), None
        self.variances = self.centred.square().mean(0)
        if len(flat) >= 4 * flat.shape[1]:  # with fewer, the covariance is not useful
            covariance = self.centred.T @ self.centred / len(flat)
            variances, self.basis = torch.linalg.eigh(covariance)
            self.variances, self.centred = variances.clamp(min=0), self.centred @ self.basis

    def expected(self, levels: Tensor) -> Tensor:
        """Return ℓ(u), with the shape of `levels`."""
        sum_of_both = self.variances + (2 * levels[..., None]).exp()
        return (self.variances / sum_of_both).mean(-1)

    def losses(self, noise: Tensor, levels: Tensor) -> Tensor:
        """Return the loss of each sample, (B,)."""
        noise, sigma = noise.flatten(1).double().cpu(), levels.exp()[:, None]
        noise = noise if self.basis is None else noise @ self.basis
        error = self.variances * noise - sigma * self.centred
        return _mean_square(error / (self.variances + sigma.square()))

    def levels(self, schedule: Schedule, count: int) -> Tensor:
        """Return levels (count,) of the schedule where ℓ(u) is between SMALLEST and LARGEST."""
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
    """The losses (draws, B) of the candidates on one batch of data."""

    def __init__(
        self,
        bound: BoundModel,
        data: Tensor,
        source: torch.Generator | None,
        advance: Callable[[float], object],
    ) -> None:
        self.model, self.kwargs, self.data = bound.model, bound.kwargs, data
        self.source, self.advance = source, advance
        self.predictor, self.calls = _Linear(data), 0
        self.levels = self.predictor.levels(self.model.schedule, min(LEVELS, len(data) // 2))
        own, *others = all_inputs(self.model)
        self.own = Read(own, self.model.prediction, 1)
        self._draw(1, torch.ones_like(self.levels))
        self._measure(own)
        for inputs in others:
            self._try(inputs)
        scores = self._scores()
        best = dict.fromkeys(read.inputs for read in sorted(scores, key=scores.__getitem__))
        for inputs in dict.fromkeys([own, *list(best)[:REFINED]]):
            for units in all_units(data):
                self._try(replace(inputs, units=units))
        self.first = self._first()
        self._draw(DRAWS, self._shares())
        for inputs in dict.fromkeys(read.inputs for read in (self.own, *self.first)):
            self._measure(inputs)

    def _draw(self, count: int, shares: Tensor) -> None:
        """Draw noise (count, B, *) and levels (count, B) in these shares; forget earlier losses.

        The n-th draw for sample i uses the level at the quantile (n + (iφ mod 1))/count of the
        shares, where φ is the golden ratio. All samples then have similar sets of levels, and all
        levels similar sets of samples.
        """
        shape, dtype, device = (count, *self.data.shape), self.data.dtype, self.data.device
        self.noise = torch.randn(shape, generator=self.source, dtype=dtype, device=device)
        draw, sample = (torch.arange(n, device="cpu").double() for n in shape[:2])
        quantile = (draw[:, None] + GOLDEN * sample % 1) / count
        self.place = torch.searchsorted((shares / shares.sum()).cumsum(0)[:-1], quantile)
        self.weight = (1 / self.place.flatten().bincount().double())[self.place]
        self.expected = self.predictor.expected(self.levels)[self.place]
        pairs = zip(self.noise, self.levels[self.place], strict=True)
        self.linear = torch.stack([self.predictor.losses(*pair) for pair in pairs])
        self.losses: dict[Read, Tensor] = {}

    def _shares(self) -> Tensor:
        """Return each level's share of the draws, up to a common factor."""
        reads = torch.stack([self.losses[read] for read in (self.own, *self.first)])
        own, *others = self._multiples(reads)
        differences = self._by_level((torch.stack(others) - own).square()).sqrt()
        shares = (differences / differences.nansum(1, keepdim=True)).nan_to_num(0.0).sum(0)
        return shares + shares.sum().clamp(min=1) / len(shares)

    def _try(self, inputs: Inputs) -> None:
        with suppress(Exception):  # a network may refuse inputs that it was not made for
            self._measure(inputs)

    def _measure(self, inputs: Inputs) -> None:
        draws = [self._call(inputs, *each) for each in zip(self.noise, self.place, strict=True)]
        for read in draws[0]:
            self.losses[read] = torch.stack([losses[read] for losses in draws])

    def _call(self, inputs: Inputs, noise: Tensor, place: Tensor) -> dict[Read, Tensor]:
        """Call the network once; return the losses (B,) for all kinds and signs of prediction.

        They are NaN at levels outside the schedule.
        """
        schedule, units, data = inputs.schedule, inputs.units, self.data
        change = math.log(units.scale)
        level = self.levels + change
        low, high = schedule.log_sigma_hat_range
        outside = (level < low - 1e-6) | (level > high + 1e-6)
        t = schedule.time(level)
        t = t.round() if schedule.integer_time else t
        # The nearest entry of a table is at another level, where losses are larger or smaller.
        reached = self.predictor.expected(schedule.log_sigma_hat(t) - change)
        factor = (self.predictor.expected(self.levels) / reached).masked_fill(outside, math.nan)
        t = t[place].to(data.device, torch.promote_types(data.dtype, torch.float32))
        t = schedule.clip(t)
        if schedule.integer_time and self.model.schedule.integer_time:
            t = t.long()
        candidate = _with(self.model, schedule=schedule, time=inputs.time)
        x0 = units.scale * data + units.shift
        x = noised(x0, noise, *candidate.coefficients(t, data)).to(data.dtype)
        self.calls += 1
        self.advance(1)
        output, losses = candidate.predict(x, t, **self.kwargs), {}
        for kind in TARGETS:
            p, q = _with(candidate, prediction=kind).affine(t, x)
            part = apply_affine(output, None, p, None)
            of_x = -noise if q is None else q * x - noise
            for sign in (1, -1):
                loss = _mean_square(sign * part + of_x)
                losses[Read(inputs, kind, sign)] = loss.nan_to_num(math.inf) * factor[place]
        return losses

    def _by_level(self, losses: Tensor) -> Tensor:
        """Return the mean loss at each level, (…, L), from losses (…, draws, B)."""
        parts = [losses[..., self.place == place].mean(-1) for place in range(len(self.levels))]
        return torch.stack(parts, -1)

    def _multiples(self, losses: Tensor) -> Tensor:
        return (losses / self.expected).clamp(max=CLIP)

    def _scores(self) -> dict[Read, float]:
        """Return mean excesses over the lowest losses; infinite for too narrow schedules."""
        means = self._by_level(self._multiples(torch.stack(list(self.losses.values()))))
        scores = (means - means.nan_to_num(math.inf).amin(0)).nanmean(1)
        scores[means.isnan().double().mean(1) > 0.5] = math.inf
        return dict(zip(self.losses, scores.tolist(), strict=True))

    def _excess(
        self, losses: Tensor, reference: Tensor, place: int | None = None
    ) -> tuple[float, float]:
        """Return the excess of the losses over `reference` and its standard error, as fractions.

        Only the level with the index `place` counts or, by default, all levels equally. As the
        draws for one sample are not independent, the standard error is computed from one number
        per sample, the sum of its differences over all draws.
        """
        losses, reference = self._multiples(losses), self._multiples(reference)
        weight = self.weight if place is None else (self.place == place).double()
        weight = weight.masked_fill((losses + reference).isnan(), 0)
        losses, difference = (each.nan_to_num(0.0) for each in (losses, losses - reference))
        whole, excess = (weight * losses).sum(), (weight * difference).sum()
        error = (weight * (difference - excess / weight.sum())).sum(0).std()
        return float(excess / whole), float(error / whole) * math.sqrt(len(self.data))

    def _is_clear(self, losses: Tensor, reference: Tensor, place: int | None = None) -> bool:
        excess, error = self._excess(losses, reference, place)
        return excess - ERRORS * error > MARGIN

    def _is_better(self, losses: Tensor, reference: Tensor, place: int | None = None) -> bool:
        excess, error = self._excess(reference, losses, place)
        return excess > max(FINE_ERRORS * error, FINE_MARGIN)

    def _first(self) -> list[Read]:
        """Return the best-fitting candidates; of equals, those most like the model's own first."""
        scores = self._scores()
        order = [read for read in scores if scores[read] < math.inf and read != self.own]
        order.sort(key=scores.__getitem__)

        def is_worse_or_changes(read: Read) -> tuple[bool, int]:
            excess, error = self._excess(self.losses[read], self.losses[order[0]])
            changes = sum(map(operator.ne, read.text(), self.own.text()))
            return excess > max(SIMILAR, error), changes

        return list(dict.fromkeys([min(order, key=is_worse_or_changes), *order]))[:REPEATED]

    def _is_trained(self, read: Read) -> bool:
        losses = self.losses[read]
        if self._excess(losses, self.linear)[0] > CLOSE:
            return False
        # Read as v or a velocity, an untrained network may come close through q x alone.
        changes = (read.kind != self.own.kind) + (read.sign < 0)
        if read.inputs.units == AS_THEY_ARE and changes <= BELIEVED.get(read.kind, 1):
            return True
        places = [None, *range(len(self.levels))]
        return any(self._is_better(losses, self.linear, place) for place in places)

    def _detectable_gain(self) -> float:
        """Return the gain above which a candidate is detected with probability at least 0.97."""
        own = self.losses[self.own]
        excess, error = self._excess(own, self.linear)
        limits = [excess + FINE_ERRORS * error]
        for read in self.first:
            gain, error = self._excess(own, self.losses[read])
            # If two predictions differ by δ and one of them is right, their losses differ by δ².
            # The standard error is proportional to δ, so it is smaller at a smaller gain.
            if gain < 0:
                error = min(error, (FINE_ERRORS + ERRORS) * error**2 / -gain)
            limits.append(max(FINE_ERRORS * error, FINE_MARGIN) + ERRORS * error)
        return max(limits)

    def report(self, batch_size: int) -> WrappingReport:
        own = self.losses[self.own]
        better = (read for read in self.first if self._is_better(self.losses[read], own))
        best = next(filter(self._is_trained, better), None)
        losses = own if best is None else self.losses[best]
        by_level = self._by_level(torch.stack([own, self.linear, losses]))
        inside = by_level[:, ~by_level[2].isnan()].mean(1).tolist()
        is_worse = [self._is_clear(own, self.linear, k) for k in range(len(self.levels))]
        is_trained = sum(is_worse) < WORSE * len(is_worse) and not self._is_clear(own, self.linear)
        return WrappingReport(
            ok=is_trained and best is None,
            best=best and WrappingCandidate(*best.text(), loss=inside[2], own_loss=inside[0]),
            undecided=best is not None and not self._is_clear(own, losses),
            gain=self._excess(own, losses)[0],
            detectable_gain=self._detectable_gain(),
            log_sigma_hat=self.levels.tolist(),
            losses=by_level[0].tolist(),
            linear=by_level[1].tolist(),
            best_losses=best and by_level[2].tolist(),
            is_worse=is_worse,
            calls=self.calls,
            samples=len(self.data),
            batch_size=batch_size,
        )


def _with(model: ScoreModel, **changes: Any) -> ScoreModel:
    """Copy a model and set attributes on the copy; they hide any modules of the same names."""
    changed = copy.copy(model)
    vars(changed).update(changes)
    return changed


def _mean_square(error: Tensor) -> Tensor:
    """Return the mean squared error of each sample, as a tensor (B,) on the CPU."""
    squares = sum_elements(at_least_float32(error).square(), 1)
    return (squares / error[0].numel()).double().cpu()
