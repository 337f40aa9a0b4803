"""The ODE solvers and their options: `FixedGrid`, `ToTolerance` and `Adaptive`.

Instances of these classes can be compared, hashed and pickled. `data_mean` and `data_std` define
coordinates in which the paths of Gaussian data are constant (see `paths`), and determine
`prior_error`. The two moments also affect the solver's error and the number of network
evaluations, but not the density that the solver approximates.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hosm_losses._checks import check_whole, error_message, widest_dtype
from hosm_losses.likelihood.multistep import MINIMUM_STEPS

PlainMoment = float | tuple[Any, ...]
Moment = PlainMoment | Tensor | np.ndarray


class Solver:
    """Base class of the solvers."""

    data_mean: Moment | None
    data_std: Moment | None
    companion: bool = False

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
        FixedGrid(steps=128, companion=False, data_mean=None, data_std=(0.5, 0.25))
    """

    steps: int = 64
    _: KW_ONLY
    companion: bool = False
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


@dataclass(frozen=True)
class ToTolerance(Solver):
    """A fixed grid that is refined until the `solver_error` of each sample is within a tolerance.

    In the first batch, the number of steps for each sample is the smallest of 32, 64, …, 1024
    that meets the tolerance. A sample whose error exceeds the tolerance is recomputed on the next
    finer grid. If `group` is set, a single sample whose error exceeds the tolerance causes all
    processes to recompute their whole first batches; later batches are never recomputed. `nfe`
    includes the evaluations on coarser grids. If 1024 steps do not meet the tolerance, a warning
    is issued and the result with 1024 steps is returned.

    Later batches start with the median number of steps that the samples of the first batch needed.
    Some samples of later batches therefore use more steps than necessary.

    Args:
        tolerance: the largest acceptable `solver_error` for a sample, in nats.
        group: the process group whose processes must use the same number of steps; None to choose
            the number for each sample separately. The processes of a group use the smallest number
            of steps that meets the tolerance for all samples of their first batches.
        companion: as in `FixedGrid`. Without a companion, the true error of `ode_nll` may exceed
            the tolerance if a path amplifies small errors. Without a companion, `ode_sample` may
            use far more steps than necessary.
        data_mean: as in `FixedGrid`.
        data_std: as in `FixedGrid`.

    Raises:
        ValueError: if a moment is not finite, or if data_std is not positive.

    Example:
        >>> ToTolerance(0.1)
        ToTolerance(tolerance=0.1, group=None, companion=True, data_mean=None, data_std=None)
    """

    tolerance: float = 0.01
    _: KW_ONLY
    group: "dist.ProcessGroup | None" = None
    companion: bool = True
    data_mean: Moment | None = None
    data_std: Moment | None = None


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
