r"""What both likelihoods share: checked options, a batch with its conditions, and its result.

A sample fails where its number says nothing: one that is not finite in the network's own range
(float32's at least), a path that did not arrive, or a solver error above 1000 nats and above 0.1
nats an element, 0.14 bits per dimension, where the first-order estimate has lost its meaning.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses._checks import (
    check_dense,
    check_finite,
    check_flag,
    check_generator,
    check_like,
    check_model_kwargs,
    check_sample_batch,
    check_whole,
    describe,
    may_look,
    over_elements,
)
from hosm_losses._progress import progress_bar
from hosm_losses._torch_internals import normal, outside_inference_mode
from hosm_losses.likelihood.coordinates import Coordinates, NoiseLevel, accumulator
from hosm_losses.likelihood.dequantize import check_images, dequantize, importance_weighted
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.model import ConditionedModel, NoiseField, ScoreModel, check_model, condition

SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT = 1000.0, 0.1


@dataclass(frozen=True)
class Batch:
    """Samples whose likelihood is asked for, and all that goes with them."""

    x: Tensor  # (B, *), in the precision of sums
    model: ConditionedModel
    coordinates: Coordinates
    dtype: torch.dtype  # the network's
    log_prior: Callable[[Tensor], Tensor] | None = None
    generator: torch.Generator | None = None
    advance: Callable[[float], object] = lambda _: None  # told the samples' worth of work done

    def rows(self, x: Tensor, rows: Tensor) -> "Batch":
        """Return the rows alone, at the points x of the whole batch."""
        points = x[rows].to(accumulator(x))
        return replace(self, x=points, model=self.model.rows(rows))

    def field(self, level: NoiseLevel, rows: Tensor | None = None) -> NoiseField:
        """Return f = −ε̂ at a level, for the rows (n,) of the batch, all if None."""
        model = self.model if rows is None else self.model.rows(rows)
        count = len(self.x) if rows is None else len(rows)
        t = level.t.to(torch.promote_types(self.dtype, torch.float32)).expand(count)
        return model.at(t)

    def noise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """ε̂ at other points (B, *) of the batch, in their precision."""
        return -self.field(level)(x.to(self.dtype)).to(x.dtype)

    def log_prior_at(self, latent: Tensor) -> Tensor:
        """Log-density (B,) of the prior at latents (B, *), in their precision."""
        if self.log_prior is None:
            std = self.coordinates.schedule.prior_std
            normalisation = latent[0].numel() * math.log(2 * math.pi * std**2)
            return -0.5 * (over_elements(latent.square(), 1) / std**2 + normalisation)
        value = self.log_prior(latent.to(self.dtype))
        shape = (len(latent),)
        check_like("log_prior(latent)", value, shape, self.dtype, latent.device, "x")
        return value.to(latent.dtype)


def whole_batch(
    model: ScoreModel,
    x: Tensor,
    data_mean: float | Tensor,
    data_std: float | Tensor,
    log_prior: Callable[[Tensor], Tensor] | None,
    dequantization: str | None,
    generator: torch.Generator | None,
    model_kwargs: Mapping[str, Any] | None,
) -> Batch:
    """All of x, as it came, after checks; the arguments are those of `ode_nll`."""
    check_model(model)
    if dequantization is None:
        check_sample_batch("x", x)
    else:
        check_images(x, dequantization)
    if not (log_prior is None or callable(log_prior)):
        raise TypeError(
            "log_prior: expected a callable of latents (n, *) that returns their log-densities "
            f"(n,), or None; got {describe(log_prior)}."
        )
    generator = check_generator(generator, x.device)
    kwargs = check_model_kwargs(model_kwargs)
    with outside_inference_mode():
        coordinates = data_coordinates(model, x, data_mean, data_std)
        conditions = condition(model, len(x), kwargs)
        dtype = _network_dtype(model, x)
        return Batch(normal(x), conditions, coordinates, dtype, log_prior, generator)


def evaluate(
    likelihood: Callable[[Batch], NLLResult],
    batch: Batch,
    dequantization: str | None,
    batch_size: int | None,
    progress: bool,
    draws: int = 1,
    enable_grad: bool = False,
) -> NLLResult:
    """Put together what `likelihood` gives for chunks of a batch, and for draws of u."""
    check_flag("progress", progress)
    count = len(batch.x)
    size = count if batch_size is None else check_whole("batch_size", batch_size, 1)
    # By numbers and not slices: a network that writes to its conditions writes to copies.
    chunks = torch.arange(count, device=batch.x.device).split(size)
    bar = progress_bar(True, count * draws, "sample") if progress else nullcontext(batch.advance)
    conditions = batch.model if enable_grad else replace(batch.model, primitives=False)
    results = []
    with outside_inference_mode(), torch.set_grad_enabled(enable_grad), bar as advance:
        whole = replace(batch, model=conditions, advance=advance)
        for _ in range(draws):
            x = dequantize(batch.x, batch.generator) if dequantization else batch.x
            parts = [likelihood(whole.rows(x, rows)) for rows in chunks]
            results.append(mark_failed(parts[0] if len(parts) == 1 else NLLResult.cat(parts)))
    return importance_weighted(results) if dequantization else results[0]


def mark_failed(result: NLLResult) -> NLLResult:
    """Put NaN where the number says nothing, judged in the dtype of the latent, the network's."""
    latent = result.latent
    limit = max(SOLVER_LIMIT, SOLVER_LIMIT_PER_ELEMENT * latent[0].numel())
    in_range = result.nll.detach().to(torch.promote_types(latent.dtype, torch.float32))
    good = torch.isfinite(in_range) & (result.solver_error.detach() <= limit)
    failed = result.failed | ~good
    return replace(result, nll=result.nll.masked_fill(failed, math.nan), failed=failed)


def data_coordinates(
    model: ScoreModel, x: Tensor, mean: float | Tensor, std: float | Tensor
) -> Coordinates:
    """The coordinates that the data's moments set, in the precision sums are kept in."""
    mean, deviation = _moment("data_mean", mean, x), _moment("data_std", std, x)
    if may_look(deviation) and not bool((deviation > 0).all()):
        raise ValueError(f"data_std: expected positive values; got {describe(std)}.")
    return Coordinates(model.schedule, mean, deviation)


def _moment(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """A moment of the data, expanded to (1, *)."""
    shape = (1, *x.shape[1:])
    wanted = f"{name}: expected a number or a tensor that broadcasts to {shape}, one sample"
    try:
        tensor = normal(torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{wanted}; got {describe(value)}.")
    check_dense(name, tensor)
    try:
        expanded = tensor.to(x.device, accumulator(x)).expand(shape)
    except RuntimeError:
        raise ValueError(f"{wanted}; got {describe(value)}.") from None
    check_finite(name, expanded)
    return expanded


def _network_dtype(model: ScoreModel, x: Tensor) -> torch.dtype:
    """The dtype of x, or for integers that of the network's first floating-point parameter."""
    parameters = model.network.parameters() if isinstance(model.network, nn.Module) else ()
    dtypes = (each.dtype for each in chain((x,), parameters) if each.is_floating_point())
    return next(dtypes, torch.get_default_dtype())
