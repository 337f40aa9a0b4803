r"""What the likelihoods share: a call with its arguments, in chunks and draws, to one result.

Failures:
    A sample fails where its number says nothing: one that is not finite in the network's own range
    (float32's at least), a path that did not arrive, or a solver error above 1000 nats and above
    0.1 nats an element, 0.14 bits per dimension, where the first-order estimate has lost its
    meaning.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from hosm_losses._checks import (
    can_read_values,
    check_flag,
    check_generator,
    check_model_kwargs,
    check_sample_batch,
    check_whole,
    error_message,
    progress_bar,
    warn,
)
from hosm_losses._torch_internals import (
    differentiated,
    is_traced,
    leave_inference_mode,
    outside_inference_mode,
)
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations
from hosm_losses.likelihood.coordinates import Coordinates
from hosm_losses.likelihood.integers import (
    Dequantization,
    check_images,
    importance_weighted,
    refuse_flattery,
)
from hosm_losses.likelihood.paths import Chosen, Divergence, Paths, choose_divergence
from hosm_losses.likelihood.result import NLLResult, solver_limit
from hosm_losses.likelihood.solvers import PlainMoment, expand_moment
from hosm_losses.likelihood.watch import FirstEvaluation, buffers_restored, warn_of_training_mode
from hosm_losses.model import ScoreModel, bind_model, check_model

LogPrior = Callable[[Tensor], Tensor] | Distribution
MOMENTS = ("data_mean", "data_std")
MISMATCH = 1e-3  # nats an element
SCALED = 0.05  # of α(t_min) from 1


class Job:
    """The arguments that `ode_nll`, `ode_sample` and `variational_nll` share, checked.

    In its `with` block, in which modes and buffers of the network are put back, `paths()` gives
    the batch in pieces, for which `add` takes results; `result()` puts them together.
    """

    def __init__(
        self,
        model: object,
        x: Tensor,
        moments: tuple[PlainMoment, PlainMoment],
        *,
        log_prior: LogPrior | None,
        batch_size: int | None,
        progress: bool,
        generator: torch.Generator | None,
        model_kwargs: Mapping[str, Any] | None,
        divergence: Divergence | None = None,
        dequantization: Dequantization | None = None,
        enable_grad: bool = False,
        name: str = "x",
        at_start: bool = True,
        of_prior: bool = True,
    ) -> None:
        """`name` is that of x in errors; `at_start` whether it is, or leads to, a point at t_min.

        `of_prior` says whether it leads to, or was drawn at, latents of the prior.
        """
        self.model, self.x, self.integers = check_model(model), x, dequantization
        check_sample_batch(name, x) if dequantization is None else check_images(x)
        self.divergence: Chosen | None = choose_divergence(divergence, x)
        if dequantization is not None:
            refuse_flattery(dequantization, self.divergence)
        self.log_prior = _log_density(log_prior, x)
        self.generator = check_generator(generator, x.device)
        self.kwargs = check_model_kwargs(model_kwargs)
        check_flag("progress", progress)
        check_flag("enable_grad", enable_grad)
        if differentiated() and not enable_grad:
            raise ValueError(
                "enable_grad: expected True under torch.func.grad, vjp or jacrev; got False, by "
                "which the gradient would be zero. Give it to ode_nll or ode_sample, or call "
                "under torch.no_grad() for the number alone."
            )
        self.draws = 1 if dequantization is None else dequantization.draws
        self.size = len(x) if batch_size is None else check_whole("batch_size", batch_size, 1)
        self.moments, self.progress, self.graph = moments, progress, enable_grad
        self.at_start, self.of_prior = at_start, of_prior
        self.results: list[list[NLLResult]] = []

    @contextmanager
    def running(self) -> Iterator[Iterator[Paths]]:
        """A block in which the pieces are evaluated, `batch_size` samples at a time."""
        model, x, network = self.model, self.x, self.model.network
        modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
        differentiates = not (self.divergence is None or callable(self.divergence))
        watch = FirstEvaluation(
            look_for_draws=not warn_of_training_mode(modules) and not is_traced(),
            look_for_constants=differentiates and model.primitives,
        )
        total = len(x) * self.draws
        with (
            buffers_restored(modules, x),
            outside_inference_mode(),
            torch.set_grad_enabled(self.graph),
            progress_bar(self.progress, total, "sample") as advance,
        ):
            mean, std = map(expand_moment, MOMENTS, self.moments, (x, x))
            coordinates = Coordinates(model.schedule, mean, std)
            if self.integers is not None:
                coordinates = self.integers.starting(coordinates)
            start = self.at_start and coordinates.start is None
            prior = self.log_prior is None and self.of_prior
            _warn_of_ends(coordinates, start=start, prior=prior)
            whole = Paths(
                x=leave_inference_mode(x),
                model=bind_model(model, len(x), self.kwargs, graph=self.graph),
                coordinates=coordinates,
                dtype=like_network(model, x).dtype,
                log_prior=self.log_prior,
                generator=self.generator,
                advance=advance,
                watch=watch,
                divergence=self.divergence,
                checkpoints=RecomputedEvaluations(network),
            )
            yield self._pieces(whole)

    def _pieces(self, whole: Paths) -> Iterator[Paths]:
        chunks = torch.arange(len(self.x), device=self.x.device).split(self.size)
        for _ in range(self.draws):
            points, extra, parts = whole.x, 0.0, list[NLLResult]()
            if self.integers is not None:
                points, extra = self.integers.spread(self.x, whole.coordinates, self.generator)
            self.results.append(parts)
            for rows in chunks:
                yield whole.rows(points, rows)
            found = parts[0] if len(parts) == 1 else NLLResult.cat(parts)
            parts[:] = [mark_failed(replace(found, nll=found.nll + extra))]

    def result(self) -> NLLResult:
        """What `results` come to together."""
        results = [parts[0] for parts in self.results]
        if self.integers is None:
            return results[0]
        return importance_weighted(results, self.integers.quantization)


def _log_density(prior: LogPrior | None, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The log-density of a prior that was given for samples like those of x."""
    if isinstance(prior, Distribution):
        if tuple(prior.event_shape) != x.shape[1:] or prior.batch_shape:
            expected = f"a distribution of event_shape {tuple(x.shape[1:])} without a batch_shape"
            got = f"event_shape {tuple(prior.event_shape)}, batch_shape {tuple(prior.batch_shape)}"
            remedy = "torch.distributions.Independent makes one of a batch."
            raise ValueError(error_message("log_prior", expected, prior, remedy, got=got))
        return prior.log_prob
    if not (prior is None or callable(prior)):
        expected = "a callable of latents (n, *) that returns their log-densities (n,), a "
        raise TypeError(error_message("log_prior", expected + "torch Distribution or None", prior))
    return prior


def _warn_of_ends(coordinates: Coordinates, *, start: bool, prior: bool) -> None:
    """Warn, on the CPU, where x at t_min is not the data, or the latent not that of the prior."""
    schedule, mean = coordinates.schedule, coordinates.mean
    if not can_read_values(mean):
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
