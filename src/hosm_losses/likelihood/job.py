r"""Code shared by all likelihood functions to check arguments, form batches and join results.

Failures:
    A sample fails under any of these conditions:

    - Its path did not reach the end.
    - The end of its path is not finite in the network's dtype.
    - Its nll is not finite in this dtype or in float32, whichever has the larger range.
    - Its solver error is above both 1000 nats and 0.1 nats per element (0.14 bits per dimension).
      The first-order estimate of such a large error is meaningless.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from hosm_losses._checks import (
    can_read_values,
    check_model_kwargs,
    check_sample_batch,
    error_message,
    progress_bar,
    sum_elements,
    warn,
)
from hosm_losses._torch_internals import (
    differentiated,
    is_traced,
    leave_inference_mode,
    outside_inference_mode,
)
from hosm_losses.likelihood.checkpoints import RecomputedEvaluations
from hosm_losses.likelihood.dequantize import (
    Dequantization,
    check_images,
    importance_weighted,
    refuse_biased_draws,
    warn_of_levels,
)
from hosm_losses.likelihood.divergence import (
    Divergence,
    DivergenceFunction,
    resolve_divergence,
)
from hosm_losses.likelihood.paths import (
    Coordinates,
    FirstEvaluation,
    Paths,
    buffers_restored,
    warn_of_training_mode,
)
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.likelihood.solvers import PlainMoment, expand_moment
from hosm_losses.model import ScoreModel, bind_model, check_model
from hosm_losses.schedules import Schedule

LogPrior = Callable[[Tensor], Tensor] | Distribution
FINISHED = (
    "The first {} samples are done: they are in `.result` of this exception. In a notebook, read "
    "sys.last_value.result."
)
MISMATCH = 1e-3  # the largest mismatch of the prior without a warning, in nats per element
SCALED = 0.05  # the largest deviation of α(t_min) from 1 without a warning


class CallOptions(NamedTuple):
    """The options of `ode_nll` that all likelihood functions share."""

    log_prior: LogPrior | None
    batch_size: int | None
    progress: bool
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None
    enable_grad: bool = False


class Ends(NamedTuple):
    """What is expected of the two ends of a call's paths."""

    name: str  # of x in error messages
    at_t_min: bool = True  # whether the data end is at t_min
    of_prior: bool = True  # whether the latents follow the prior


class Job:
    """The checked arguments that `ode_nll`, `ode_sample` and `variational_nll` share.

    `run` solves the ODE, or estimates the bound, batch by batch.
    """

    def __init__(
        self,
        model: object,
        x: Tensor,
        moments: tuple[PlainMoment, PlainMoment],
        ends: Ends,
        options: CallOptions,
        divergence: Divergence | None = None,
        dequantization: Dequantization | None = None,
    ) -> None:
        """Check the arguments."""
        self.model, self.x, self.dequantization = check_model(model), x, dequantization
        if dequantization is None:
            check_sample_batch(ends.name, x, images=ends.name == "x")
            if ends.name == "x":
                warn_of_levels(x)
        else:
            check_images(x)
        self.divergence = resolve_divergence(divergence, x)
        if dequantization is not None:
            refuse_biased_draws(dequantization, self.divergence)
        self.log_prior = _log_density(options.log_prior, x)
        self.kwargs = check_model_kwargs(options.model_kwargs)
        if differentiated() and not options.enable_grad:
            raise ValueError(
                "enable_grad: expected True under torch.func.grad, vjp or jacrev; got False, "
                "which would make the gradient zero. Pass it to ode_nll or ode_sample, or call "
                "under torch.no_grad() if you only need the value."
            )
        self.draws = 1 if dequantization is None else dequantization.draws
        self.size = len(x) if options.batch_size is None else int(options.batch_size)
        self.moments, self.ends, self.options = moments, ends, options

    def run(
        self,
        solve: Callable[[Paths, Tensor | None], NLLResult],
        convert: Callable[[NLLResult], Any] = lambda joined: joined,
    ) -> Any:
        """Solve all batches, join their results, and return `convert(joined)`.

        `solve(batch, steps)` is called for each batch. `steps` is None for the first batch; for
        later batches, it contains the number of steps used for each sample of the first batch. If
        a KeyboardInterrupt is raised, its attribute `result` is set to the converted result of the
        finished batches, or to None if no batch has finished.
        """
        results: list[NLLResult] = []
        with self._running() as paths:
            try:
                for batch in self._batches(paths):
                    results.append(solve(batch, results[0].steps if results else None))
            except KeyboardInterrupt as interrupt:
                carrier: Any = interrupt
                carrier.result = done = convert(self._joined(results)) if results else None
                interrupt.add_note(FINISHED.format(0 if done is None else len(done.nfe)))
                raise
            return convert(self._joined(results))

    @contextmanager
    def _running(self) -> Iterator[Paths]:
        """Yield the paths of all samples, and restore the network's buffers afterwards."""
        model, x, network = self.model, self.x, self.model.network
        modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
        draws = isinstance(self.divergence, DivergenceFunction) and self.divergence.is_random
        watch = FirstEvaluation(
            look_for_draws=not (warn_of_training_mode(modules) or is_traced() or draws),
            look_for_constants=self.divergence.products > 0 and model.primitives,
        )
        total = len(x) * self.draws
        with (
            buffers_restored(modules, x),
            outside_inference_mode(),
            torch.set_grad_enabled(self.options.enable_grad),
            progress_bar(self.options.progress, total, "sample") as advance,
        ):
            _refuse_learnt(model.schedule, x.device)
            mean, std = map(expand_moment, ("data_mean", "data_std"), self.moments, (x, x))
            log_size = float(np.log(np.square(self.moments[1]).mean()) / 2)
            dtype = x.dtype if x.is_floating_point() else network_options(model)["dtype"]
            coordinates = Coordinates(model, dtype, mean, std, log_size)
            if self.dequantization is not None:
                coordinates = self.dequantization.start_coordinates(coordinates)
            start = self.ends.at_t_min and coordinates.start is None
            prior = self.log_prior is None and self.ends.of_prior
            _warn_of_ends(coordinates, start=start, prior=prior)
            yield Paths(
                x=leave_inference_mode(x),
                model=bind_model(model, len(x), self.kwargs, graph=self.options.enable_grad),
                coordinates=coordinates,
                log_prior=self.log_prior,
                generator=self.options.generator,
                advance=advance,
                watch=watch,
                divergence=self.divergence,
                evaluations=RecomputedEvaluations(network),
                size=min(self.size, len(x)),
            )

    def _batches(self, paths: Paths) -> Iterator[Paths]:
        """For each draw of the dequantization noise, yield all paths in batches of batch_size."""
        for _ in range(self.draws):
            x, nll_offset = paths.x, None
            if self.dequantization is not None:
                generator = self.options.generator
                x, nll_offset = self.dequantization.draw(self.x, paths.coordinates, generator)
            for rows in torch.arange(len(x), device=x.device).split(self.size):
                yield paths.rows(x, rows, nll_offset)

    def _joined(self, results: Sequence[NLLResult]) -> NLLResult:
        """Join the results of all batches, and average the densities over draws.

        After an interrupt, only complete draws are averaged. If no draw is complete, the finished
        part of the first draw is returned.
        """
        batches = math.ceil(len(self.x) / self.size)
        results = results[: len(results) // batches * batches] or results
        parts = [results[start : start + batches] for start in range(0, len(results), batches)]
        draws = [NLLResult.cat(part) if len(part) > 1 else part[0] for part in parts]
        if self.dequantization is None:
            return draws[0]
        return importance_weighted(draws, self.dequantization.quantization)


def _refuse_learnt(schedule: Schedule, device: torch.device) -> None:
    parts = schedule(torch.full((1,), float(schedule.t_min), device=device))
    if any(part.requires_grad for part in parts):
        expected = "α and σ without gradients of their own if enable_grad is True"
        remedy = (
            "The gradient in the schedule's parameters would be wrong: call "
            "requires_grad_(False) on them, or set enable_grad=False and take differences."
        )
        got = f"{schedule!r}, whose α or σ requires grad"
        raise ValueError(error_message("schedule", expected, schedule, remedy, got=got))


def _warn_of_ends(coordinates: Coordinates, *, start: bool, prior: bool) -> None:
    """Warn if α(t_min) is not near 1, or if the marginal at t_max is not near the prior.

    Both checks are made only if x is on the CPU.
    """
    schedule, mean = coordinates.schedule, coordinates.mean
    if not can_read_values(mean):
        return
    times = torch.tensor([schedule.t_min, schedule.t_max], dtype=mean.dtype, device="cpu")
    alphas, sigmas = (coefficient.detach() for coefficient in schedule(times))
    alpha_start, alpha, sigma = float(alphas[0]), alphas[1], sigmas[1]
    if start and schedule._starts_at_data and abs(alpha_start - 1) > SCALED:
        warn(
            f"schedule: expected α(t_min) near 1; got {schedule!r}, with {alpha_start:g}. x and "
            "its density belong to a point at t_min, which is α times the data: pass α x to "
            "ode_nll and subtract d log α from its nll, or set clean=True. Divide samples by α."
        )
    # The KL divergence of q at t_max from the prior, if both are Gaussian.
    std = schedule.prior_std
    variance = ((alpha * coordinates.std).square() + sigma.square()) / std**2
    shift = sum_elements((alpha * mean / std).square(), 1)
    divergence = float((sum_elements(variance - 1 - variance.log(), 1) + shift).detach()) / 2
    if prior and divergence > MISMATCH * mean.numel():
        warn(
            f"schedule: expected one that ends in its prior, N(0, {std:g}²); got {schedule!r}, "
            f"which ends {divergence:.2g} nats per sample away from it for data with this "
            "data_mean and data_std: likelihoods and samples are off by that much. Check the "
            "schedule's numbers, or set log_prior and draw the latents of ode_sample from that "
            "prior."
        )


def network_options(model: ScoreModel) -> dict[str, Any]:
    """Return the dtype and device of the network's first floating-point parameter.

    If there is no such parameter, PyTorch's defaults are returned.
    """
    for parameter in model.network.parameters() if isinstance(model.network, nn.Module) else ():
        if parameter.is_floating_point():
            return {"dtype": parameter.dtype, "device": parameter.device}
    return {"dtype": torch.get_default_dtype(), "device": torch.empty(0).device}


def _log_density(prior: LogPrior | None, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    if isinstance(prior, Distribution):
        if tuple(prior.event_shape) != x.shape[1:] or prior.batch_shape:
            expected = f"a distribution of event_shape {tuple(x.shape[1:])} without a batch_shape"
            got = f"event_shape {tuple(prior.event_shape)}, batch_shape {tuple(prior.batch_shape)}"
            remedy = "torch.distributions.Independent turns a batch into one distribution."
            raise ValueError(error_message("log_prior", expected, prior, remedy, got=got))
        return prior.log_prob
    return prior
