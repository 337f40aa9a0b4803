"""The ODE solvers: `FixedGrid`, `ToTolerance` and `Adaptive`, and `Solver` for one of your own.

Instances of these classes can be compared, hashed and pickled. `data_mean` and `data_std` define
coordinates in which the paths of Gaussian data are constant (see `paths`), and determine
`prior_error`. The two moments also affect the solver's error and the number of network
evaluations, but not the density that the solver approximates.
"""

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hosm_losses._checks import check_whole, error_message, warn, widest_dtype
from hosm_losses._torch_internals import is_traced
from hosm_losses.likelihood.adaptive import least_tolerance, solve_adaptive
from hosm_losses.likelihood.divergence import NO_DIVERGENCE
from hosm_losses.likelihood.multistep import MINIMUM_STEPS, solve_on_grid
from hosm_losses.likelihood.paths import Paths, Span, rounding
from hosm_losses.likelihood.result import Cause, NLLResult, ODESolution, all_finite, mark_failed

PlainMoment = float | tuple[Any, ...]
Moment = PlainMoment | Tensor | np.ndarray
# The numbers of steps that ToTolerance tries. Below 32, the error estimate is unreliable.
GRIDS = (32, 64, 128, 256, 512, 1024)


class Solver:
    """Base class of the solvers; a subclass that defines `integrate` can be passed as `solver`.

    Example:
        The classical Runge-Kutta method with 32 steps, without an estimate of its error:

        >>> from hosm_losses import ODESolution, ScoreModel, VPSchedule, ode_nll
        >>> class RK4(Solver):
        ...     def integrate(self, paths, z, span):
        ...         h = (span[1] - span[0]) / 32
        ...         probes, integral = paths.draw_probes(z), 0.0
        ...         for u in (span[0] + h * step for step in range(32)):
        ...             k1, q1 = paths.rates(z, u, probes)
        ...             k2, q2 = paths.rates(z + h / 2 * k1, u + h / 2, probes)
        ...             k3, q3 = paths.rates(z + h / 2 * k2, u + h / 2, probes)
        ...             k4, q4 = paths.rates(z + h * k3, u + h, probes)
        ...             z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        ...             integral = integral + h / 6 * (q1 + 2 * q2 + 2 * q3 + q4)
        ...         return ODESolution(z, integral, nfe=4 * 32)
        >>> schedule = VPSchedule()
        >>> model = ScoreModel(lambda x, t: schedule.sigma(t)[:, None] * x, schedule)
        >>> result = ode_nll(model, torch.zeros(1, 2), solver=RK4())
        >>> print(f"{result.nll.item():.3f} nats, {result.nfe.item()} evaluations")
        1.838 nats, 128 evaluations
    """

    data_mean: Moment | None = None
    data_std: Moment | None = None

    def integrate(self, paths: Paths, z: Tensor, span: Span) -> ODESolution:
        """Solve the ODE from states z (B, *) at u = span[0] to u = span[1], where u = log σ̂.

        The span increases in `ode_nll` and decreases in `ode_sample`. `paths.rates(z, u, probes)`
        returns dz/du and the integrand of the log-density, and `paths.draw_probes(z)` returns
        the probes, which are None if the divergence uses none. `paths.advance(samples)` moves the
        progress bar. Graphs are recorded by the caller.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected a method integrate(paths, z, span)."
        )

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError if a network's rounding error in this dtype exceeds the tolerance."""

    def compare(self, paths: Paths, result: NLLResult) -> NLLResult:  # noqa: ARG002
        """Return the result of a way to the data, after any comparison with the way back."""
        return result

    def solve(
        self,
        paths: Paths,
        steps: Tensor | None = None,  # noqa: ARG002
        *,
        backwards: bool = False,
    ) -> NLLResult:
        """Solve the ODE from data to latents, or from latents to data if `backwards` is True.

        The `latent` of the result contains the end points of the paths. `steps` contains the
        numbers of steps that `ToTolerance` chose for the samples of the first batch.
        """
        coordinates = paths.coordinates
        low, high = coordinates.span
        data, noise = coordinates.ends((low, high))
        start, end, span = (noise, data, (high, low)) if backwards else (data, noise, (low, high))
        solution = self.integrate(paths, coordinates.to_z(paths.x, start), span)
        x, integral = coordinates.to_x(solution.z, end), solution.integral
        latent, integral = (paths.x, -integral) if backwards else (x, integral)
        # log p_x(x₀) − log p_T(x_T), see `paths`
        log_density = coordinates.log_volume(noise) - coordinates.log_volume(data) + integral
        at_end, starts = x.to(paths.dtype), all_finite(paths.x)
        causes = [
            (Cause.OUTPUT, ~all_finite(x)),  # NaN stays in the state
            (Cause.DIVERGENCE, ~integral.isfinite()),
            (Cause.RANGE, ~all_finite(at_end)),
        ]
        if paths.divergence is not NO_DIVERGENCE:
            log_prior = paths.log_prior_at(latent)
            log_density = log_density + log_prior
            of_prior = Cause.RANGE if paths.log_prior is None else Cause.PRIOR
            causes.append((of_prior, ~log_prior.isfinite()))
        nll = -log_density if paths.nll_offset is None else paths.nll_offset - log_density
        none = torch.zeros_like(starts, dtype=torch.uint8)
        cause = none if solution.cause is None else solution.cause
        cause = cause.masked_fill(~starts, Cause.START)
        nfe = none.long() + solution.nfe
        products, error = solution.products, solution.solver_error
        result = NLLResult(
            nll,
            at_end,
            nfe,
            solution.standard_error,
            torch.zeros_like(nll.detach()) if error is None else error,
            failed=cause > 0,
            products=nfe * paths.divergence.products if products is None else products,
            steps=solution.steps,
            widening=solution.widening,
            kinks=solution.kinks,
            cause=cause,
        )
        result = mark_failed(self.compare(paths, result) if backwards else result, *causes)
        if error is None:
            result = replace(result, solver_error=torch.full_like(result.solver_error, math.nan))
        return result

    @property
    def moments(self) -> tuple[Any, Any]:
        """(data_mean, data_std) as numbers or nested tuples, with 0 and 0.5 in place of None."""
        mean, std = self.data_mean, self.data_std
        return 0.0 if mean is None else mean, 0.5 if std is None else std

    @property
    def knows_data(self) -> bool:
        """Whether both moments are set."""
        return self.data_mean is not None and self.data_std is not None

    def _name(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"

    def __post_init__(self) -> None:
        """Convert the moments to numbers or nested tuples."""
        for field in ("data_mean", "data_std"):
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, plain_moment(field, value, self._name(field)))


@dataclass(frozen=True)
class FixedGrid(Solver):
    """A grid in log σ̂ that is shared by the whole batch, with fresh probes at every node.

    Half of the nodes are spread evenly in log σ̂. The other half follow a logistic distribution in
    log σ̂, centred at the log of the root mean square of `data_std`. If the network predicts the
    velocity of a linear flow, a velocity grid is used instead. If the root mean square of
    `data_std` is 1, the steps in t of this grid are shortest near the two ends of the path, and
    have similar lengths in between.

    Args:
        steps: the number of steps, at least 4. The network is usually evaluated steps + 2 times.
            If σ̂ at the start of the path is between 1/20 and 20 times the data's standard
            deviation, the network is evaluated steps + 8 times. For a check during training, 20
            steps are enough. For results that you report, 40 steps are enough if the divergence is
            exact.
        companion: whether to compute a second solution, the companion. With a companion,
            `solver_error` also accounts for paths that amplify small errors. In `ode_nll`, the
            companion uses half as many steps as the first solution. If `steps` is 64, the
            companion usually adds 52 % to the number of evaluations. In `ode_sample`, the
            companion runs from the samples back to latents on the same grid, and usually doubles
            the number of evaluations. A companion requires an even number of steps, at least 8.
        compiled: whether `torch.compile` compiles the steps, which pays off for small networks if
            hundreds of batches of the same shape are solved. The compiled steps are kept for as
            long as the network exists. The first batch of each shape takes some ten seconds
            longer. Batches smaller than `batch_size`, and calls with `enable_grad`, are not
            compiled. If compiling fails, a warning is issued and the steps run without it.
        data_mean: the mean of the data, as a number or as a tensor that broadcasts to the shape of
            a sample. It is stored as a number or as nested tuples. `None` means 0.
        data_std: the standard deviation of the data, in the same form as `data_mean`. `None`
            means 0.5. If both moments are set, `ode_nll` also computes `prior_error`, unless
            `log_prior` is set.

    Raises:
        TypeError: if `steps` is not a whole number.
        ValueError: if the value of an argument is out of range.

    Example:
        >>> FixedGrid(128, data_std=torch.tensor([0.5, 0.25]))
        FixedGrid(steps=128, companion=False, compiled=False, data_mean=None, data_std=(0.5, 0.25))
    """

    steps: int = 64
    _: KW_ONLY
    companion: bool = False
    compiled: bool = False
    data_mean: Moment | None = None
    data_std: Moment | None = None

    def __post_init__(self) -> None:
        steps = check_whole(self._name("steps"), self.steps, MINIMUM_STEPS)
        least = 2 * MINIMUM_STEPS
        if self.companion and (steps % 2 or steps < least):
            expected, got = f"False, or even steps of {least} or more", f"True with {steps} steps"
            raise ValueError(error_message(self._name("companion"), expected, True, got=got))
        object.__setattr__(self, "steps", steps)
        super().__post_init__()

    def integrate(self, paths: Paths, z: Tensor, span: Span) -> ODESolution:
        """Solve on the grid; the companion of a way to the data is its way back, see `compare`."""
        companion, backwards = self._has_companion(paths), span[1] < span[0]
        paths = paths.at_half_speed() if companion and backwards else paths
        compiled = self.compiled and len(z) == paths.size and not torch.is_grad_enabled()
        return solve_on_grid(
            paths,
            z,
            span,
            self.steps,
            companion=companion and not backwards,
            compiled=compiled and not is_traced(),
        )

    @torch.no_grad()
    def compare(self, paths: Paths, result: NLLResult) -> NLLResult:
        """Set `solver_error` to an estimate of the error in log p(x), where x ends a path.

        The path starts at a latent z. The ODE is then solved back from x on the same grid, and
        this second path ends at a latent z'. Let D be the difference between the values of log
        p(x) from these two solutions. The estimate is the larger of |D| and the `solver_error` of
        the second path, or infinity if the second path fails. If the probes are random, the probe
        noise in the two integrals exceeds the solver's error. In that case, D is
        log p_T(z) − log p_T(z').
        """
        if not self._has_companion(paths):
            return result
        dtype = paths.x.dtype
        way_back = replace(paths, x=result.latent.to(dtype)).at_half_speed()
        back: Any = FixedGrid(self.steps, compiled=self.compiled).solve(way_back)
        difference = result.nll - back.nll
        if paths.divergence.is_random:
            difference = paths.log_prior_at(paths.x) - paths.log_prior_at(back.latent.to(dtype))
        error = torch.maximum(difference.abs(), back.solver_error)
        return replace(
            result,
            nfe=result.nfe + back.nfe,
            products=result.products + back.products,
            solver_error=error.masked_fill(back.failed, math.inf),
        )

    def _has_companion(self, paths: Paths) -> bool:
        return self.companion and paths.divergence is not NO_DIVERGENCE


@dataclass(frozen=True)
class ToTolerance(Solver):
    """A fixed grid that is refined until the `solver_error` of each sample is within a tolerance.

    In the first batch, the number of steps for each sample is the smallest of 32, 64, …, 1024
    that meets the tolerance. A sample whose error exceeds the tolerance is recomputed on the next
    finer grid. `nfe` includes the evaluations on coarser grids. If 1024 steps do not meet the
    tolerance, a warning is issued and the result with 1024 steps is returned.

    Later batches start with the median number of steps that the samples of the first batch needed.
    Some samples of later batches therefore use more steps than necessary.

    Args:
        tolerance: the largest acceptable `solver_error` for a sample, in nats.
        companion: as in `FixedGrid`. Without a companion, the true error of `ode_nll` may exceed
            the tolerance if a path amplifies small errors. Without a companion, `ode_sample` may
            use far more steps than necessary.
        data_mean: as in `FixedGrid`.
        data_std: as in `FixedGrid`.

    Raises:
        ValueError: if a moment is not finite, or if data_std is not positive.

    Example:
        >>> ToTolerance(0.1)
        ToTolerance(tolerance=0.1, companion=True, data_mean=None, data_std=None)
    """

    tolerance: float = 0.01
    _: KW_ONLY
    companion: bool = True
    data_mean: Moment | None = None
    data_std: Moment | None = None

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError if rounding exceeds the tolerance."""
        _check_tolerance("tolerance", self.tolerance, rounding(dtype), dtype)

    def solve(
        self, paths: Paths, steps: Tensor | None = None, *, backwards: bool = False
    ) -> NLLResult:
        """Compute each path on successively finer grids until its error is within the tolerance.

        If the `solver_error` of a path exceeds the tolerance, the path is computed again on the
        next grid with new probes. If the error is NaN or infinite on two grids in a row, the path
        is not computed again. Later batches start with the median number of steps that the samples
        of the first batch needed.
        """
        first = GRIDS[0] if steps is None else int(steps.median())
        grids = [FixedGrid(each, companion=self.companion) for each in GRIDS if each >= first]
        rows = torch.arange(len(paths.x), device=paths.x.device)
        nfe = products = torch.zeros_like(rows)
        lost = torch.zeros_like(rows, dtype=torch.bool)
        parts: list[NLLResult] = []
        places: list[Tensor] = []
        for grid in grids:
            chosen = replace(paths.rows(paths.x, rows, paths.nll_offset), advance=lambda _: None)
            part: Any = grid.solve(chosen, backwards=backwards)
            nfe, products = nfe + part.nfe, products + part.products
            lost_before, lost = lost, ~part.solver_error.isfinite()
            error = part.solver_error.masked_fill(lost, math.inf)
            error = error.masked_fill(lost & lost_before, -math.inf)
            again = error > self.tolerance
            if grid is grids[-1] and bool(again.any()):
                warn(
                    f"solver: expected a solver_error of at most {self.tolerance:g} nats on a "
                    f"grid of at most {grid.steps} steps; got {float(error.max()):.2g} on the "
                    "finest grid. Use a larger tolerance, float64 if rounding limits the error, "
                    "or Adaptive()."
                )
                again = torch.zeros_like(again)
            if not bool(again.all()):
                parts.append(replace(part, nfe=nfe, products=products)[~again])
                places.append(rows[~again])
                paths.advance(len(places[-1]))
            rows, nfe, products, lost = (each[again] for each in (rows, nfe, products, lost))
            if not len(rows):
                break
        return NLLResult.cat(parts)[torch.cat(places).argsort()]


@dataclass(frozen=True)
class Adaptive(Solver):
    """A solver that chooses the steps of each sample separately.

    Each sample keeps the same probes along its whole path. The ODE is solved twice.
    `solver_error` is computed from the difference between the two solutions and from the
    estimated errors of the steps. In `ode_sample` with divergence=None, the ODE is solved only
    once, with the tolerance `step_tolerance` / 10. A sample that needs more than 10,000 network
    evaluations for either solution is marked as failed.

    Args:
        step_tolerance: the acceptable error in the log-density, in nats, for each step of the
            first solution. The second solution, which is returned, uses a tenth of this value. In
            float32, rounding prevents most networks from meeting tolerances below about 1e-6.
        data_mean: as in `FixedGrid`.
        data_std: as in `FixedGrid`.

    Raises:
        ValueError: if a moment is not finite, or if data_std is not positive.

    Example:
        >>> Adaptive(1e-5)
        Adaptive(step_tolerance=1e-05, data_mean=None, data_std=None)
    """

    step_tolerance: float = 3e-4
    _: KW_ONLY
    data_mean: Moment | None = None
    data_std: Moment | None = None

    def integrate(self, paths: Paths, z: Tensor, span: Span) -> ODESolution:
        """Solve with separate steps for each sample."""
        return solve_adaptive(paths, z, span, tolerance=self.step_tolerance)

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError if rounding exceeds the tolerance."""
        _check_tolerance("step_tolerance", self.step_tolerance, least_tolerance(dtype), dtype)


def _check_tolerance(name: str, value: float, least: float, dtype: torch.dtype) -> None:
    if not value >= least:
        expected = f"at least {least:.2g} nats, because of rounding in {dtype}"
        remedy = "Few networks get below 1e-06 in float32: pass that, or x in float64."
        raise ValueError(error_message(f"solver.{name}", expected, value, remedy))


def plain_moment(field: str, value: Any, name: str) -> PlainMoment:
    """Return a moment as a number or as nested tuples; `name` is used in error messages."""
    nested = value.tolist() if isinstance(value, Tensor) else np.array(value).tolist()
    numbers = torch.as_tensor(nested, dtype=torch.float64, device="cpu")
    least, expected = (0.0, "positive, finite") if field == "data_std" else (-math.inf, "finite")
    if not bool(((numbers > least) & (numbers < math.inf)).all()):
        raise ValueError(error_message(name, f"{expected} values", value))
    return _as_tuples(nested)


def _as_tuples(nested: Any) -> Any:
    return tuple(map(_as_tuples, nested)) if isinstance(nested, list) else float(nested)


def expand_moment(name: str, value: PlainMoment, x: Tensor) -> Tensor:
    """Expand a number or nested tuples to a tensor (1, *) for samples x (B, *)."""
    dtype = torch.float64 if isinstance(value, tuple) else None
    numbers = torch.as_tensor(value, dtype=dtype, device="cpu").to(x.device, widest_dtype(x))
    try:
        return numbers.expand(1, *x.shape[1:])
    except RuntimeError:
        expected = f"a shape that broadcasts to that of a sample, {tuple(x.shape[1:])}"
        remedy = "One value for each channel of images has the shape (C, 1, 1)."
        got = str(tuple(numbers.shape))
        raise ValueError(error_message(name, expected, value, remedy, got=got)) from None
