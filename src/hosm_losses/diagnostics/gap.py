r"""The gap between the likelihoods of a model's SDE and ODE, by noise level.

Formula:
    All curves are means at x_t = α x₀ + σ ε. Here, f = σ s belongs to the model and f* to the
    reference, A = σ ∂f/∂x, u = log σ̂, and p = p_t^ODE is the density of the model's own ODE.

    - first: E‖f − f*‖², which the loss of order one reduces.
    - trace: E (tr A − tr A*)², which the loss of order two reduces.
    - second: E‖A − A*‖²_F, which the loss of order two reduces.
    - third: E‖σ² ∇∇·f − σ² ∇∇·f*‖², which the loss of order three reduces.
    - rate: E a², where a = tr A − tr A* + (f − f*)·f* is the error in the rate of change of the
      ODE's log-density.
    - fisher: E‖σ ∇log p − f*‖², which compares the score of the ODE with the reference.
    - own score: E‖σ ∇log p − f‖², which compares the score of the ODE with the model.

    There are three integrals: J_SM = ∫ first du, J_Fisher = ∫ fisher du, and
    J_ODE = ∫ E (f − f*)·(σ ∇log p − f*) du. For the ODE,
    KL(q₀ ‖ p₀) − KL(q_T ‖ p_T) = J_ODE ≤ √(J_SM J_Fisher). For the SDE, the same difference of KL
    divergences is at most J_SM. The integrals are computed as Gauss-Legendre sums over the nodes.

    ∇log p is the negative gradient of `ode_nll` for an ODE that starts at the node's noise level.

Source:
    Lu et al., ICML 2022, arXiv 2206.08265, theorems 3.1 and 3.2.
"""

from __future__ import annotations

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
from hosm_losses.derivatives import NetworkState, gradients
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
        error: the standard error of the mean; NaN for a single sample.
        samples: the number of samples in the mean, excluding samples whose path failed.
    """

    value: float
    error: float
    samples: int


@dataclass(frozen=True, repr=False)
class GapReport:
    """The result of `likelihood_gap`; printing it shows a table.

    Attributes:
        log_sigma_hat: the nodes u.
        curves: the estimates at the nodes, keyed by the name of the curve.
        numbers: estimates in nats, keyed by name.
        evaluations: the number of network evaluations for each sample.
        samples: the number of samples, including samples whose path failed.

    Without a reference, or with ode_score=False, some curves and numbers are absent.
    """

    log_sigma_hat: list[float]
    curves: dict[str, list[GapEstimate]]
    numbers: dict[str, GapEstimate]
    evaluations: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible dicts, lists and numbers."""
        return asdict(self)

    def __repr__(self) -> str:
        """Return the numbers, without the curves."""
        numbers = "".join(f", {name} {number.value:.4g}" for name, number in self.numbers.items())
        levels = len(self.log_sigma_hat)
        return f"GapReport({self.samples} samples, {levels} noise levels{numbers})"

    def __str__(self) -> str:
        """Return the curves at the nodes, then the numbers."""
        lines = ["".join(f"{name:>12}" for name in ("log σ̂", *self.curves))]
        for row, level in enumerate(self.log_sigma_hat):
            cells = "".join(f"{curve[row].value:12.4g}" for curve in self.curves.values())
            lines.append(f"{level:12.3f}{cells}")
        for name, number in self.numbers.items():
            failed = self.samples - number.samples
            note = f"; failed and left out: {failed}" if failed else ""
            lines.append(f"{name}: {number.value:.4f} ± {number.error:.4f} nats{note}")
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
    """Measure the likelihood gap between a model's ODE and SDE, and the errors that cause it.

    All derivatives are exact and computed along d directions, where d is the number of elements of
    a sample, so d should be small. Samples whose path fails are counted and excluded from the
    averages that depend on the path. Call `model.eval()` first if the network has dropout or batch
    norm. The network's buffers are left unchanged. In the report, `evaluations` is the cost per
    sample. Most of the cost is due to the gradient of the ODE's log-density, for which a graph of
    at most steps + 8 evaluations is stored.

    Args:
        model: the score model.
        x0: clean data (B, *).
        reference: the true score as a `ScoreModel`, a better model, or the atoms (N, *) of a
            finite data set. All curves except `own score` measure differences from the reference.
            Without a reference, some curves and numbers are absent.
        nodes: the number of noise levels, at least 2.
        steps: the number of solver steps in `ode_nll`.
        ode_score: whether to compute the score of the ODE's own density.
        progress: whether to show a progress bar.
        generator: the source of randomness, on the device of x0; the global one if None.
        model_kwargs: keyword arguments for the networks.

    Returns:
        The report. The numbers `ode nll` and `sde bound` apply to the clean data x0, because both
        include a correction for starting at t_min. `solver error of ode nll` estimates how much
        `ode nll` would change with more steps.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument has an invalid shape, device or value.
        DerivativeError: if a network cannot be differentiated.

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
    if model.subspace is not None:
        model.subspace_of("x0", data)
        data = model.project(data)
    truth = _reference(reference, model, data)
    low, high = model.schedule.log_sigma_hat_range
    places, weights = np.polynomial.legendre.leggauss(count)
    levels = [low + (high - low) * (place + 1) / 2 for place in places.tolist()]
    options: dict[str, Any] = {"model_kwargs": kwargs, "generator": source}
    exact: dict[str, Any] = {"solver": FixedGrid(steps), "divergence": "exact", "clean": True}
    before = NetworkState(model.network, data)
    with ExitStack() as stack:
        stack.callback(before.restore, generators=False)
        stack.enter_context(outside_inference_mode())
        advance = stack.enter_context(progress_bar(progress, count, "node"))
        at_nodes: list[dict[str, Tensor]] = []
        evaluations = 72  # for the bound
        for level in levels:
            x, t = _perturb(model, data, level, source)
            score, calls = _ode_score(model, x, t, steps, kwargs) if ode_score else (None, 0)
            evaluations += calls + 2 + 2 * data[0].numel()
            at_nodes.append(at_node(model, truth, x, t, score, kwargs))
            advance(1)
        solved = ode_nll(model, data, **exact, **options)
        evaluations += int(solved.nfe[0])
        bound = variational_nll(model, data, **options).nll
    difference = bound - solved.nll
    nonfinite = ~torch.isfinite(difference)  # all numbers exclude the same samples
    numbers = {
        "ode nll": solved.nll.masked_fill(nonfinite, math.nan),
        "sde bound": bound.masked_fill(nonfinite, math.nan),
        "sde bound less ode nll": difference,
        "solver error of ode nll": solved.solver_error.masked_fill(nonfinite, math.nan),
    }
    widths, curves = (high - low) / 2 * weights, at_nodes[0].keys()
    for number, curve in INTEGRALS.items():
        if curve in curves:
            parts = [width * node[curve] for width, node in zip(widths, at_nodes, strict=True)]
            numbers[number] = torch.stack(parts).sum(0)
    return GapReport(
        log_sigma_hat=levels,
        curves={
            curve: [_mean(node[curve]) for node in at_nodes] for curve in CURVES if curve in curves
        },
        numbers={name: _mean(values) for name, values in numbers.items()},
        evaluations=evaluations,
        samples=len(data),
    )


def _perturb(
    model: ScoreModel, data: Tensor, level: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw x_t (B, *) at a noise level u, and return it with t (B,)."""
    schedule = model.schedule
    t = torch.full((len(data),), level, dtype=torch.float64, device="cpu")
    t = schedule.time(t).to(data.device, torch.promote_types(data.dtype, torch.float32))
    t = schedule.clip(t)
    alpha, sigma = (expand_right(number, data) for number in schedule(t))
    noise = torch.randn(data.shape, generator=generator, dtype=data.dtype, device=data.device)
    return (alpha * data + sigma * model.project(noise)).to(data.dtype), t


def at_node(
    model: ScoreModel,
    truth: ScoreModel | None,
    x: Tensor,
    t: Tensor,
    score: Tensor | None,
    kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The values (B,) whose means form the curves; `score` is σ ∇log p for the ODE's density p."""
    f, jacobian, third = _orders(model, x, t, kwargs)
    values: dict[str, Tensor] = {}
    if score is not None:
        values["own score"] = _square(score - f)
    if truth is None:
        return values
    true, true_jacobian, true_third = _orders(truth, x, t, kwargs)
    error, jacobian_error = f - true, jacobian - true_jacobian
    trace_error = sum_elements(unit_vectors(x) * jacobian_error).sum(0)
    values |= {
        "first": _square(error),
        "trace": trace_error.square(),
        "second": sum_elements(jacobian_error.square()).sum(0),
        "third": _square(third - true_third),
        "rate": (trace_error + sum_elements(error * true, 1)).square(),
    }
    if score is not None:
        values["fisher"] = _square(score - true)
        values["ode"] = sum_elements(error * (score - true), 1)
    return values


def _orders(
    model: ScoreModel, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return f (B, *), σ ∂f/∂x e_i (d, B, *) for the unit vectors e_i, and σ² ∇∇·f (B, *)."""
    sigma = expand_right(model.coefficients(t, x)[1], x).to(x.dtype)
    with torch.no_grad():
        bound = bind_model(model, len(t), kwargs, t)
        units = model.project(unit_vectors(x), 2)
        derived: Any = bound.derive(x, sigma * units, order=3, summed=True)
    value, directional, third = derived
    return value[0], directional, third.sum(0)


def _ode_score(
    model: ScoreModel, x: Tensor, t: Tensor, steps: int, kwargs: Mapping[str, Any]
) -> tuple[Tensor, int]:
    """Return σ ∇log p_t of the model's ODE at x (B, *), and the number of network evaluations.

    All entries of t must be equal.
    """
    later = copy.copy(model)
    later.schedule = _starting_at(model.schedule, float(t[0]))
    point = x.detach().requires_grad_()
    options: dict[str, Any] = {"divergence": "exact", "enable_grad": True, "model_kwargs": kwargs}
    result = ode_nll(later, point, solver=FixedGrid(steps), **options)
    (slope,) = gradients(result.nll.sum(), [point])
    slope = slope.masked_fill(expand_right(result.failed, slope), math.nan)
    sigma = expand_right(model.coefficients(t, x)[1], x).to(x.dtype)
    return -sigma * slope, int(result.nfe[0])


def _starting_at(schedule: Schedule, t_min: float) -> Schedule:
    """Return a copy of `schedule` that starts at the later time `t_min`."""
    later = copy.copy(schedule)
    for name, value in (("t_min", t_min), ("_starts_at_data", False)):
        object.__setattr__(later, name, value)  # it may be a frozen dataclass
    return later


def _reference(
    reference: ScoreModel | Tensor | None, model: ScoreModel, data: Tensor
) -> ScoreModel | None:
    schedule = model.schedule
    if reference is None:
        return None
    if isinstance(reference, ScoreModel):
        if (reference.subspace is None) != (model.subspace is None):
            expected, got = "a model on the subspace of `model`, if any", "a subspace in only one"
            raise ValueError(error_message("reference", expected, reference, got=got))
        if not _same(reference.schedule, schedule):
            expected = f"a model under the schedule {schedule!r}"
            got = f"a model under {reference.schedule!r}, whose range, alpha or sigma differs"
            raise ValueError(error_message("reference", expected, reference, got=got))
        return reference
    atoms = check_sample_batch("reference", reference).to(data)
    if atoms.shape[1:] != data.shape[1:]:
        raise ValueError(error_message("reference", "atoms shaped like the data", reference))

    def noise(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        alpha, sigma = (expand_right(number, x).unsqueeze(1) for number in schedule(t))
        noises = (x.unsqueeze(1) - alpha * atoms) / sigma
        weights = (-0.5 * sum_elements(noises.square())).softmax(1).to(x.dtype)
        return (expand_right(weights, noises) * noises).sum(1)

    return ScoreModel(noise, schedule, subspace=model.subspace)


def _same(a: Schedule, b: Schedule) -> bool:
    """Whether two schedules have the same range, and the same α and σ on that range."""
    if (a.t_min, a.t_max) != (b.t_min, b.t_max):
        return False
    t = torch.linspace(a.t_min, a.t_max, 65, dtype=torch.float64, device="cpu")
    return torch.allclose(torch.cat(a(t)), torch.cat(b(t)), rtol=1e-6, atol=0.0)


def _square(difference: Tensor) -> Tensor:
    return sum_elements(difference.square(), 1)


def _mean(values: Tensor) -> GapEstimate:
    values = values.detach().double()
    values = values[torch.isfinite(values)]
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return GapEstimate(float(values.mean()), error, len(values))
