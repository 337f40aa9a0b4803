r"""What the likelihoods share: a call with its arguments, in chunks and draws, to one result.

Failures:
    A sample fails where its number says nothing: one that is not finite in the network's own range
    (float32's at least), a path that did not arrive, or a solver error above 1000 nats and above
    0.1 nats an element, 0.14 bits per dimension, where the first-order estimate has lost its
    meaning.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from hosm_losses._checks import (
    check_flag,
    check_generator,
    check_model_kwargs,
    check_sample_batch,
    check_whole,
    complaint,
    may_look,
    over_elements,
    warn,
)
from hosm_losses._progress import progress_bar
from hosm_losses._torch_internals import differentiated, normal, outside_inference_mode, traced
from hosm_losses.likelihood.checkpoints import Checkpoints
from hosm_losses.likelihood.integers import (
    Dequantization,
    check_images,
    importance_weighted,
    refuse_flattery,
)
from hosm_losses.likelihood.paths import Batch, Coordinates, Divergence, choose_divergence
from hosm_losses.likelihood.result import NLLResult, solver_limit
from hosm_losses.likelihood.solvers import PlainMoment, expand_moment
from hosm_losses.likelihood.watch import Watch, buffers_restored, warn_of_training_mode
from hosm_losses.model import ScoreModel, check_model, condition

LogPrior = Callable[[Tensor], Tensor] | Distribution
MOMENTS = ("data_mean", "data_std")
MISMATCH = 1e-3  # nats an element
SCALED = 0.05  # of α(t_min) from 1


@dataclass(frozen=True)
class Call:
    """The arguments that `ode_nll`, `ode_sample` and `variational_nll` share, as they came."""

    model: ScoreModel
    x: Tensor
    moments: tuple[PlainMoment, PlainMoment]  # data_mean, data_std
    log_prior: LogPrior | None
    batch_size: int | None
    progress: bool
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None
    divergence: Divergence | None = None
    dequantization: Dequantization | None = None
    enable_grad: bool = False

    def evaluate(
        self,
        likelihood: Callable[[Batch], NLLResult],
        *,
        name: str = "x",
        at_start: bool = True,
        of_prior: bool = True,
    ) -> NLLResult:
        """Put together what `likelihood` gives for chunks of x, and for draws of u, after checks.

        `name` is that of x in errors; `at_start` says whether it is, or leads to, a point at
        t_min, `of_prior` whether it leads to, or was drawn at, latents of the prior.
        """
        model, x, integers = check_model(self.model), self.x, self.dequantization
        check_sample_batch(name, x) if integers is None else check_images(x)
        divergence = choose_divergence(self.divergence, x)
        if integers is not None:
            refuse_flattery(integers, divergence)
        log_prior = _log_density(self.log_prior, x)
        generator = check_generator(self.generator, x.device)
        kwargs = check_model_kwargs(self.model_kwargs)
        check_flag("progress", self.progress)
        check_flag("enable_grad", self.enable_grad)
        if differentiated() and not self.enable_grad:
            raise ValueError(
                "enable_grad: expected True under torch.func.grad, vjp or jacrev; got False, by "
                "which the gradient would be zero. Give it to ode_nll or ode_sample, or call "
                "under torch.no_grad() for the number alone."
            )
        count, draws = len(x), 1 if integers is None else integers.draws
        size = count if self.batch_size is None else check_whole("batch_size", self.batch_size, 1)
        modules = (
            dict(model.network.named_modules()) if isinstance(model.network, nn.Module) else {}
        )
        watch = Watch(
            not warn_of_training_mode(modules) and not traced(),
            model.primitives and not callable(self.divergence),
        )
        with (
            buffers_restored(modules, x),
            outside_inference_mode(),
            torch.set_grad_enabled(self.enable_grad),
            progress_bar(self.progress, count * draws, "sample") as advance,
        ):
            mean, std = map(expand_moment, MOMENTS, self.moments, (x, x))
            coordinates = Coordinates(model.schedule, mean, std)
            if integers is not None:
                coordinates = integers.starting(coordinates)
            start = at_start and coordinates.start is None
            _warn_of_ends(coordinates, start=start, prior=log_prior is None and of_prior)
            safe = None if self.enable_grad else False
            conditioned = condition(model, count, kwargs, primitives=safe)
            dtype, drawn = like_network(model, x).dtype, (log_prior, generator, advance, watch)
            ways = divergence, Checkpoints(model.network)
            batch = Batch(normal(x), conditioned, coordinates, dtype, *drawn, *ways)
            chunks, results = torch.arange(count, device=x.device).split(size), []
            for _ in range(draws):
                points, extra = batch.x, 0.0
                if integers is not None:
                    points, extra = integers.spread(x, coordinates, generator)
                parts = [likelihood(batch.rows(points, rows)) for rows in chunks]
                result = parts[0] if len(parts) == 1 else NLLResult.cat(parts)
                results.append(mark_failed(replace(result, nll=result.nll + extra)))
        if integers is None:
            return results[0]
        return importance_weighted(results, integers.quantization)


def _log_density(prior: LogPrior | None, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The log-density of a prior that was given for samples like those of x."""
    if isinstance(prior, Distribution):
        if tuple(prior.event_shape) != x.shape[1:] or prior.batch_shape:
            expected = f"a distribution of event_shape {tuple(x.shape[1:])} without a batch_shape"
            got = f"event_shape {tuple(prior.event_shape)}, batch_shape {tuple(prior.batch_shape)}"
            remedy = "torch.distributions.Independent makes one of a batch."
            raise ValueError(complaint("log_prior", expected, prior, remedy, got=got))
        return prior.log_prob
    if not (prior is None or callable(prior)):
        expected = "a callable of latents (n, *) that returns their log-densities (n,), a "
        raise TypeError(complaint("log_prior", expected + "torch Distribution or None", prior))
    return prior


def _warn_of_ends(coordinates: Coordinates, *, start: bool, prior: bool) -> None:
    """Warn, on the CPU, where x at t_min is not the data, or the latent not that of the prior."""
    schedule, mean = coordinates.schedule, coordinates.mean
    if not may_look(mean):
        return
    times = torch.tensor([schedule.t_min, schedule.t_max], dtype=mean.dtype, device="cpu")
    (first, alpha), (_, sigma) = (each.detach().unbind() for each in schedule(times))
    if start and schedule._starts_at_data and abs(float(first) - 1) > SCALED:
        warn(
            f"schedule: expected α(t_min) near 1; got {schedule!r}, with {float(first):g}. x and "
            "its density are those of a point at t_min, that many times the data: give ode_nll "
            "α x and subtract d log α from its nll, or give clean=True; divide samples by α."
        )
    spread = schedule.prior_std
    variance = ((alpha * coordinates.std).square() + sigma.square()) / spread**2
    shift = (alpha * mean / spread).square()
    apart = float((variance + shift - 1 - variance.log()).detach().sum()) / 2
    if prior and apart > MISMATCH * mean.numel():
        warn(
            f"schedule: expected one that ends in its prior, N(0, {spread:g}²); got "
            f"{schedule!r}, which ends {apart:.2g} nats a sample from it for data of this "
            "data_mean and data_std: likelihoods and samples are off by them. Look at the numbers "
            "of the schedule, or give log_prior, and to ode_sample latents of it."
        )


def add_noise(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch at t_min by a draw of noise, and what to add to its nll for that of x, (B,).

    −log p(x) ≤ E[−log p(x_tmin) + log q(x_tmin|x) − log p(x|x_tmin)], with the decoder of
    `variational`: the last two are ½ (‖ε̂ − ε‖² − ‖ε‖²) − d log α(t_min). They go with the noise
    that was drawn, ‖ε‖² and not its mean d: a change of p(x_tmin) with ε cancels, and the mean of
    exp(−nll) over draws is a density of x.
    """
    x, coordinates = batch.x, batch.coordinates
    start, _ = coordinates.ends(coordinates.span)
    noise = batch.draw_noise()
    points = start.alpha * x + start.sigma * noise
    error = batch.noise(points, start) - noise
    correction = over_elements(error.square() - noise.square(), 1) / 2
    correction = correction - x[0].numel() * start.alpha.log().reshape(())
    return replace(batch, x=points), correction


def mark_failed(result: NLLResult) -> NLLResult:
    """Put NaN where the number says nothing, judged in the dtype of the latent, the network's."""
    dtype, limit = result.latent.dtype, solver_limit(result.latent[0].numel())
    in_range = result.nll.detach().to(torch.promote_types(dtype, torch.float32))
    good = torch.isfinite(in_range) & (result.solver_error.detach() <= limit)
    failed = result.failed | ~good
    return replace(result, nll=result.nll.masked_fill(failed, math.nan), failed=failed)


def like_network(model: ScoreModel, *first: Tensor) -> Tensor:
    """The first floating-point tensor among these and the network's parameters."""
    parameters = model.network.parameters() if isinstance(model.network, nn.Module) else ()
    each = (each for each in chain(first, parameters) if each.is_floating_point())
    return next(each, torch.empty(0))
