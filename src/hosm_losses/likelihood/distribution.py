"""The density of the probability-flow ODE as a `torch.distributions.Distribution`.

Purpose:
    `log_prob` returns the negated nll of `ode_nll`, and samples are drawn with `ode_sample`.
    Samples and the arguments of `log_prob` are points at the schedule's t_min. A tensor that
    conditions the network must contain one entry per distribution in the batch, unless the tensor
    is marked `Shared`.

Source:
    Rozet et al., zuko (software), for `rsample_and_log_prob`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from hosm_losses._checks import check_model_kwargs, check_shape, error_message, shown
from hosm_losses.likelihood.divergence import Divergence, check_divergence
from hosm_losses.likelihood.job import network_options
from hosm_losses.likelihood.ode import ode_nll, ode_sample
from hosm_losses.likelihood.solvers import FixedGrid, Solver
from hosm_losses.model import ScoreModel, check_model, map_tensors, per_sample


class ODEDistribution(Distribution):
    """The distribution of points at t_min under a model's probability-flow ODE.

    `log_prob`, `sample`, `rsample` and `rsample_and_log_prob` solve the ODE; the constructor only
    checks its arguments. The results of `log_prob`, `rsample` and `rsample_and_log_prob` are
    differentiable if gradients are enabled. These methods raise a ValueError if a path fails.

    Args:
        model: the score model.
        event_shape: the shape of a sample.
        solver: as in `ode_nll`.
        divergence: as in `ode_nll`; with "exact", `log_prob` is deterministic.
        model_kwargs: keyword arguments for the network. The shape of every tensor in
            `model_kwargs` must begin with `batch_shape`, unless the tensor is marked `Shared`.
            Real floating-point tensors are cast to the dtype of x. In `log_prob`, x has the dtype
            of `value`; when samples are drawn, x has the dtype of the network's first
            floating-point parameter.
        batch_shape: the shape of the batch of distributions; there is one distribution per
            condition.
        batch_size: as in `ode_nll`; None to process all samples in one batch.

    Raises:
        TypeError: if `model` is not a `ScoreModel`, if `divergence` has an invalid type, or if a
            shape is not a sequence.
        ValueError: if `divergence` is an unknown string, or if the shape of a tensor in
            `model_kwargs` does not begin with `batch_shape`.

    Example:
        >>> from hosm_losses import VESchedule
        >>> def normal(x, t, mean):
        ...     sigma = VESchedule().sigma(t)[:, None]
        ...     return sigma * (x - mean[:, None]) / (1 + sigma**2)
        >>> model = ScoreModel(normal, VESchedule())
        >>> means = {"mean": torch.tensor([0.0, 1.0, 2.0])}
        >>> solver = FixedGrid(data_std=1.0)
        >>> q = ODEDistribution(model, (2,), solver=solver, model_kwargs=means, batch_shape=(3,))
        >>> q.sample((4,)).shape, q.log_prob(torch.zeros(2)).shape
        (torch.Size([4, 3, 2]), torch.Size([3]))
    """

    arg_constraints: ClassVar[Any] = {}
    has_rsample = True

    def __init__(
        self,
        model: ScoreModel,
        event_shape: Sequence[int],
        *,
        solver: Solver = FixedGrid(),  # noqa: B008, it is frozen
        divergence: Divergence = "exact",
        model_kwargs: Mapping[str, Any] | None = None,
        batch_shape: Sequence[int] = (),
        batch_size: int | None = None,
    ) -> None:
        check_divergence(divergence)
        self.model, self.solver = check_model(model), solver
        self.divergence: Divergence = divergence
        self.model_kwargs, self.batch_size = check_model_kwargs(model_kwargs), batch_size
        batch = check_shape("batch_shape", batch_shape)
        super().__init__(batch, check_shape("event_shape", event_shape))
        self._repeated(self.batch_shape)  # raises if the shape of a tensor is invalid

    def __repr__(self) -> str:
        shapes = f"event_shape={tuple(self.event_shape)}, batch_shape={tuple(self.batch_shape)}"
        divergence = shown(self.divergence)
        return f"ODEDistribution({shapes}, solver={self.solver!r}, divergence={divergence})"

    @property
    def support(self) -> constraints.Constraint:
        """All real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ODEDistribution:
        """Return the same distributions, expanded to a new batch_shape without copying tensors."""
        batch = torch.Size(batch_shape)
        new: Any = self._get_checked_instance(ODEDistribution, _instance)
        vars(new).update(vars(self))
        new._batch_shape, new.model_kwargs = batch, self._repeated(batch)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values (..., batch_shape, event_shape).

        The dtype of the result is float64, or float32 on MPS.
        """
        self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        outer = shape[: len(shape) - len(self.event_shape)]
        x = value.expand(shape).reshape(-1, *self.event_shape)
        options = self._options(outer, value.dtype)
        with self._noting_conditions():
            result = ode_nll(self.model, x, divergence=self.divergence, **options)
        return -_all_good(result).nll.reshape(outer)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw differentiable samples (sample_shape, batch_shape, event_shape)."""
        return self._draw(sample_shape, None)[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw samples and compute their log-densities along the same ODE paths."""
        return self._draw(sample_shape, self.divergence)

    def _draw(
        self, sample_shape: Sequence[int], divergence: Divergence | None
    ) -> tuple[Tensor, Any]:
        outer = torch.Size(sample_shape) + self.batch_shape
        dtype = network_options(self.model)["dtype"]
        size, options = (outer.numel(), *self.event_shape), self._options(outer, dtype)
        with self._noting_conditions():
            drawn = ode_sample(self.model, size, divergence=divergence, **options)
        _all_good(drawn)
        log_prob = None if drawn.nll is None else -drawn.nll.reshape(outer)
        return drawn.x.reshape(outer + self.event_shape), log_prob

    def _options(self, outer: torch.Size, dtype: torch.dtype) -> dict[str, Any]:
        def rows(_: str, tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, *tensor.shape[len(outer) :])

        kwargs = per_sample(self._repeated(outer), rows)
        kwargs = map_tensors(kwargs, lambda t: t.to(dtype) if t.is_floating_point() else t)
        options = {"solver": self.solver, "model_kwargs": kwargs, "batch_size": self.batch_size}
        return options | {"enable_grad": torch.is_grad_enabled()}

    @contextmanager
    def _noting_conditions(self) -> Iterator[None]:
        """Add notes to errors that a missing batch_shape may have caused."""
        try:
            yield
        except Exception as error:
            shapes: dict[str, tuple[int, ...]] = {}
            per_sample(self.model_kwargs, lambda path, t: shapes.setdefault(path, tuple(t.shape)))
            for path, shape in shapes.items():
                if shape and not self.batch_shape:
                    error.add_note(
                        f"batch_shape is (), so each sample was passed all of {path} {shape}. If "
                        f"it has one entry per distribution, set batch_shape={shape[:1]}."
                    )
            raise

    def _repeated(self, outer: torch.Size) -> dict[str, Any]:
        """Return `model_kwargs` with unshared tensors expanded from batch_shape to `outer`."""
        batch = self.batch_shape

        def repeated(path: str, tensor: Tensor) -> Tensor:
            if tensor.shape[: len(batch)] != batch:
                expected = f"a tensor whose shape begins with the batch_shape {tuple(batch)}"
                remedy = "Mark a tensor that all distributions share: hosm_losses.Shared(tensor)."
                raise ValueError(error_message(path, expected, tensor, remedy))
            return tensor.expand(outer + tensor.shape[len(batch) :])

        return per_sample(self.model_kwargs, repeated)


def _all_good(result: Any) -> Any:
    failures = result.failures()
    if failures:
        row, why = next(iter(failures.items()))
        raise ValueError(
            f"distribution: expected a solution for each of {len(result.failed)} samples; got "
            f"{len(failures)} that failed. Row {row}: {why}."
        )
    return result
