r"""The gap between the likelihood of a model's SDE and that of its ODE, by noise level.

Formula, at x_t = α x₀ + σ ε, with f = σ s of the model, f* of the reference, u = log σ̂, and
p = p_t^ODE the density of the model's own ODE:
    first        E‖f − f*‖²                           what order one makes small
    trace        E (tr A − tr A*)², A = σ ∂f/∂x       order two
    second       E‖A − A*‖²_F                         order two
    third        E‖σ² ∇∇·f − σ² ∇∇·f*‖²               order three
    rate         E a², a = tr A − tr A* + (f − f*)·f*  what the ODE's log-density feels
    fisher       E‖σ ∇log p − f*‖²
    own score    E‖σ ∇log p − f‖²                     how far the ODE's score is from the model's

    J_SM = ∫ first du,   J_Fisher = ∫ fisher du,   J_ODE = ∫ E (f − f*)·(σ ∇log p − f*) du
    KL(q₀ ‖ p₀) − KL(q_T ‖ p_T) = J_ODE ≤ √(J_SM J_Fisher) for the ODE, and at most J_SM for the
    SDE. The integrals are Gauss-Legendre sums over the nodes.

    ∇log p is minus the gradient of `ode_nll` from the node's noise level on.

Source:
    Lu et al., ICML 2022, arXiv 2206.08265, theorems 3.1 and 3.2.
"""

import copy
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hosm_losses._checks import (
    check_flag,
    check_generator,
    check_model_kwargs,
    check_sample_batch,
    check_whole,
    error_message,
    expand_right,
    progress_bar,
    sum_elements,
)
from hosm_losses._torch_internals import leave_inference_mode, outside_inference_mode
from hosm_losses.derivatives import Snapshot, gradients
from hosm_losses.likelihood import FixedGrid, ode_nll, variational_nll
from hosm_losses.model import ScoreModel, bind_model, check_model
from hosm_losses.probes import unit_vectors
from hosm_losses.schedules import Schedule

CURVES = ("first", "trace", "second", "third", "rate", "fisher", "own score")
INTEGRALS = {"j_sm": "first", "j_ode": "ode", "j_fisher": "fisher"}


@dataclass(frozen=True)
class GapEstimate:
    """A mean over samples, with its standard error.

    Attributes:
        value: the mean.
        error: its standard error; NaN for a single sample.
        samples: how many there were. A sample whose path failed is not among them.
    """

    value: float
    error: float
    samples: int


@dataclass(frozen=True, repr=False)
class GapReport:
    """What `likelihood_gap` found; it prints as a table.

    Attributes:
        log_sigma_hat: the nodes u.
        curves: by name, an estimate at every node.
        numbers: by name, in nats.
        evaluations: how often the network was evaluated for each sample.
        samples: the number of samples that were given.

    Without a reference, or with ode_score=False, some curves and numbers are absent.
    """

    log_sigma_hat: list[float]
    curves: dict[str, list[GapEstimate]]
    numbers: dict[str, GapEstimate]
    evaluations: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and numbers, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        """The numbers, without the curves."""
        numbers = "".join(f", {name} {number.value:.4g}" for name, number in self.numbers.items())
        levels = len(self.log_sigma_hat)
        return f"GapReport({self.samples} samples, {levels} noise levels{numbers})"

    def __str__(self) -> str:
        """The curves at the nodes, then the numbers."""
        lines = ["".join(f"{name:>12}" for name in ("log σ̂", *self.curves))]
        for row, level in enumerate(self.log_sigma_hat):
            cells = "".join(f"{curve[row].value:12.4g}" for curve in self.curves.values())
            lines.append(f"{level:12.3f}{cells}")
        for name, number in self.numbers.items():
            left_out = self.samples - number.samples
            told = f"; failed and left out: {left_out}" if left_out else ""
            lines.append(f"{name}: {number.value:.4f} ± {number.error:.4f} nats{told}")
        return "\n".join(lines)


def likelihood_gap(
    model: ScoreModel,
    x0: Tensor,
    *,
    reference: ScoreModel | Tensor | None = None,
    nodes: int = 16,
    steps: int = 64,
    ode_score: bool = True,
    progress: bool = False,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> GapReport:
    """Measure how far a model's ODE is from its SDE in likelihood, and which order is at fault.

    All derivatives are exact, with d directions: for small d. A sample whose path failed is left
    out where it is needed, and counted. Call `model.eval()` first if the network has dropout or
    batch norm; its buffers stay as they were. The cost for each sample is in
    `evaluations`; the gradients of the ODE's density, most of it, hold a graph of steps + 10
    evaluations.

    Args:
        model: the score model.
        x0: clean data (B, *).
        reference: the true score as a `ScoreModel`, atoms (N, *) that all data is made of, or a
            better model, of which the curves are then differences. Without one some cannot be had.
        nodes: noise levels, 2 or more.
        steps: of `ode_nll`.
        ode_score: whether the score of the ODE's own density is computed.
        progress: whether to show a progress bar.
        generator: the source of randomness, on the device of x0; the global one if None.
        model_kwargs: keyword arguments of the networks.

    Returns:
        The report. `ode nll` and `sde bound` are those of x0, both corrected for the start at
        t_min. `solver error of ode nll` is what more steps would change of it, estimated.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument has an invalid shape, device or value.
        DerivativeError: where the derivatives of a network cannot be taken.

    Example:
        >>> from hosm_losses import VESchedule
        >>> schedule = VESchedule(sigma_max=20.0)
        >>> def normal(x, t, std=1.0):
        ...     sigma = schedule.sigma(t)[:, None]
        ...     return sigma * x / (std**2 + sigma**2)
        >>> truth = ScoreModel(normal, schedule)
        >>> model = ScoreModel(lambda x, t: normal(x, t, 1.2), schedule)
        >>> report = likelihood_gap(model, torch.randn(8, 2), reference=truth, nodes=4)
        >>> sorted(report.numbers)[:5]
        ['j_fisher', 'j_ode', 'j_sm', 'ode nll', 'sde bound']
    """
    check_model(model)
    data = leave_inference_mode(check_sample_batch("x0", x0))
    count, steps = check_whole("nodes", nodes, 2), check_whole("steps", steps, 4)
    check_flag("ode_score", ode_score)
    check_flag("progress", progress)
    kwargs = check_model_kwargs(model_kwargs)
    source = check_generator(generator, data.device)
    truth = _reference(reference, model.schedule, data)
    low, high = model.schedule.log_sigma_hat_range
    places, weights = np.polynomial.legendre.leggauss(count)
    levels = [low + (high - low) * (place + 1) / 2 for place in places.tolist()]
    options: dict[str, Any] = {"model_kwargs": kwargs, "generator": source}
    exact: dict[str, Any] = {"solver": FixedGrid(steps), "divergence": "exact", "clean": True}
    before = Snapshot(model.network, data)
    with ExitStack() as stack:
        stack.callback(before.restore, generators=False)
        stack.enter_context(outside_inference_mode())
        done = stack.enter_context(progress_bar(progress, count, "node"))
        found: list[dict[str, Tensor]] = []
        for level in levels:
            x, t = _perturb(model.schedule, data, level, source)
            score = _ode_score(model, x, t, steps, kwargs) if ode_score else None
            found.append(at_node(model, truth, x, t, score, kwargs))
            done(1)
        solved = ode_nll(model, data, **exact, **options)
        bound = variational_nll(model, data, **options).nll
    difference = bound - solved.nll
    lost = ~torch.isfinite(difference)  # the same samples for all of them
    numbers = {
        "ode nll": solved.nll.masked_fill(lost, math.nan),
        "sde bound": bound.masked_fill(lost, math.nan),
        "sde bound less ode nll": difference,
        "solver error of ode nll": solved.solver_error.masked_fill(lost, math.nan),
    }
    widths = (high - low) / 2 * weights
    for number, curve in INTEGRALS.items():
        if curve in found[0]:
            parts = [width * each[curve] for width, each in zip(widths, found, strict=True)]
            numbers[number] = torch.stack(parts).sum(0)
    at_nodes = count * (2 + 2 * data[0].numel())
    return GapReport(
        log_sigma_hat=levels,
        curves={
            name: [_mean(each[name]) for each in found] for name in CURVES if name in found[0]
        },
        numbers={name: _mean(each) for name, each in numbers.items()},
        evaluations=at_nodes + (1 + ode_score * count) * (steps + 10) + 73,
        samples=len(data),
    )


def _perturb(
    schedule: Schedule, data: Tensor, level: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A draw of x_t (B, *) at a noise level u, and t (B,)."""
    t = torch.full((len(data),), level, dtype=torch.float64, device="cpu")
    t = schedule.time(t).to(data.device, torch.promote_types(data.dtype, torch.float32))
    t = schedule.clip(t)
    alpha, sigma = (expand_right(each, data) for each in schedule(t))
    noise = torch.randn(data.shape, generator=generator, dtype=data.dtype, device=data.device)
    return (alpha * data + sigma * noise).to(data.dtype), t


def at_node(
    model: ScoreModel,
    truth: ScoreModel | None,
    x: Tensor,
    t: Tensor,
    score: Tensor | None,
    kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:
    """What is averaged at x (B, *) and t (B,), each (B,); `score` is σ ∇log p of the ODE."""
    f, jacobian, third = _orders(model, x, t, kwargs)
    found: dict[str, Tensor] = {}
    if score is not None:
        found["own score"] = _square(score - f)
    if truth is None:
        return found
    true, true_jacobian, true_third = _orders(truth, x, t, kwargs)
    wrong, units = f - true, unit_vectors(x)
    traces = sum_elements(units * (jacobian - true_jacobian)).sum(0)
    found |= {
        "first": _square(wrong),
        "trace": traces.square(),
        "second": sum_elements((jacobian - true_jacobian).square()).sum(0),
        "third": _square(third - true_third),
        "rate": (traces + sum_elements(wrong * true, 1)).square(),
    }
    if score is not None:
        found["fisher"] = _square(score - true)
        found["ode"] = sum_elements(wrong * (score - true), 1)
    return found


def _orders(
    model: ScoreModel, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """f (B, *), σ ∂f/∂x e_i for every unit vector (d, B, *), and σ² ∇∇·f (B, *)."""
    sigma = expand_right(model.coefficients(t, x)[1], x).to(x.dtype)
    with torch.no_grad():
        field_of = bind_model(model, len(t), kwargs, t)
        found: Any = field_of.derive(x, sigma * unit_vectors(x), order=3, summed=True)
    value, directional, third = found
    return value[0], directional, third.sum(0)


def _ode_score(
    model: ScoreModel, x: Tensor, t: Tensor, steps: int, kwargs: Mapping[str, Any]
) -> Tensor:
    """σ ∇log p_t of the model's ODE at x (B, *), t the same for all."""
    names = ("prediction", "time", "output", "call", "primitives")
    chosen: dict[str, Any] = {name: getattr(model, name) for name in names}
    later = ScoreModel(model.network, _starting_at(model.schedule, float(t[0])), **chosen)
    point = x.detach().requires_grad_()
    options: dict[str, Any] = {"divergence": "exact", "enable_grad": True, "model_kwargs": kwargs}
    result = ode_nll(later, point, solver=FixedGrid(steps), **options)
    (slope,) = gradients(result.nll.sum(), [point])
    slope = slope.masked_fill(expand_right(result.failed, slope), math.nan)
    return -expand_right(model.coefficients(t, x)[1], x).to(x.dtype) * slope


def _starting_at(schedule: Schedule, t_min: float) -> Schedule:
    """A copy of a schedule that starts at a later time."""
    later = copy.copy(schedule)
    for name, value in (("t_min", t_min), ("_starts_at_data", False)):
        object.__setattr__(later, name, value)  # a frozen dataclass perhaps
    return later


def _reference(
    reference: ScoreModel | Tensor | None, schedule: Schedule, data: Tensor
) -> ScoreModel | None:
    if reference is None:
        return None
    if isinstance(reference, ScoreModel):
        if not _same(reference.schedule, schedule):
            expected = f"a model under the schedule {schedule!r}"
            got = f"one under {reference.schedule!r}, with another range, alpha or sigma"
            raise ValueError(error_message("reference", expected, reference, got=got))
        return reference
    atoms = check_sample_batch("reference", reference).to(data)
    if atoms.shape[1:] != data.shape[1:]:
        raise ValueError(error_message("reference", "atoms of the shape of the data", reference))

    def noise(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        alpha, sigma = (expand_right(each, x).unsqueeze(1) for each in schedule(t))
        noises = (x.unsqueeze(1) - alpha * atoms) / sigma
        shares = (-0.5 * sum_elements(noises.square())).softmax(1).to(x.dtype)
        return (expand_right(shares, noises) * noises).sum(1)

    return ScoreModel(noise, schedule)


def _same(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules have the same range, and the same α and σ on it."""
    if (one.t_min, one.t_max) != (other.t_min, other.t_max):
        return False
    t = torch.linspace(one.t_min, one.t_max, 65, dtype=torch.float64, device="cpu")
    pairs = zip(one(t), other(t), strict=True)
    return all(torch.allclose(value, same, rtol=1e-6, atol=0.0) for value, same in pairs)


def _square(difference: Tensor) -> Tensor:
    return sum_elements(difference.square(), 1)


def _mean(values: Tensor) -> GapEstimate:
    good = values.detach().double()
    good = good[torch.isfinite(good)]
    error = float(good.std()) / len(good) ** 0.5 if len(good) > 1 else math.nan
    return GapEstimate(float(good.mean()), error, len(good))
