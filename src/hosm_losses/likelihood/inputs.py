r"""What the likelihoods share: checked options, batches with their conditions, and one result.

Failures:
    A sample fails where its number says nothing: one that is not finite in the network's own range
    (float32's at least), a path that did not arrive, or a solver error above 1000 nats and above
    0.1 nats an element, 0.14 bits per dimension, where the first-order estimate has lost its
    meaning.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states

from hosm_losses._checks import (
    check_dense,
    check_finite,
    check_flag,
    check_generator,
    check_model_kwargs,
    check_sample_batch,
    check_whole,
    complaint,
    may_look,
    over_elements,
    users_level,
)
from hosm_losses._progress import progress_bar
from hosm_losses._torch_internals import differentiated, normal, outside_inference_mode, traced
from hosm_losses.derivatives import Snapshot
from hosm_losses.likelihood.integers import check_images, dequantize, importance_weighted
from hosm_losses.likelihood.paths import Batch, Coordinates, accumulator, solver_limit
from hosm_losses.likelihood.result import NLLResult
from hosm_losses.model import ScoreModel, check_model, condition

Values = tuple[Tensor, ...]
TRAINING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
TRAINING += (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TRAINING += (nn.FeatureAlphaDropout, nn.RReLU, nn.MultiheadAttention)
MISMATCH = 1e-3  # nats an element
SCALED = 0.05  # of α(t_min) from 1
COMPARED = 16  # values with a first one, of a network that draws
INSTANCE_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)


def evaluate(
    likelihood: Callable[[Batch], NLLResult],
    model: ScoreModel,
    x: Tensor,
    data_mean: float | Tensor,
    data_std: float | Tensor,
    log_prior: Callable[[Tensor], Tensor] | None,
    dequantization: str | None,
    batch_size: int | None,
    progress: bool,
    generator: torch.Generator | None,
    model_kwargs: Mapping[str, Any] | None,
    draws: int = 1,
    enable_grad: bool = False,
    name: str = "x",
    at_start: bool = True,
    of_prior: bool = True,
) -> NLLResult:
    """Put together what `likelihood` gives for chunks of x, and for draws of u, after checks.

    `name` is that of x in errors; `at_start` says whether it is, or leads to, a point at t_min,
    `of_prior` whether it leads to, or was drawn at, latents of the prior. The other arguments are
    those of `ode_nll`.
    """
    check_model(model)
    if dequantization is None:
        check_sample_batch(name, x)
    else:
        check_images(x, dequantization)
    if not (log_prior is None or callable(log_prior)):
        expected = "a callable of latents (n, *) that returns their log-densities (n,), or None"
        raise TypeError(complaint("log_prior", expected, log_prior))
    generator = check_generator(generator, x.device)
    kwargs = check_model_kwargs(model_kwargs)
    check_flag("progress", progress)
    if differentiated() and not enable_grad:
        raise ValueError(
            "enable_grad: expected True under torch.func.grad, vjp or jacrev; got False, by which "
            "the gradient would be zero. Give enable_grad=True, which variational_nll does not "
            "have, nor a gradient; or call under torch.no_grad() for the number alone."
        )
    count = len(x)
    size = count if batch_size is None else check_whole("batch_size", batch_size, 1)
    chunks = torch.arange(count, device=x.device).split(size)
    network = model.network
    modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    training = _say_what_trains(modules)
    with (
        _kept(modules, x),
        outside_inference_mode(),
        torch.set_grad_enabled(enable_grad),
    ):
        mean, std = _moment("data_mean", data_mean, x), _moment("data_std", data_std, x)
        if may_look(std) and not bool((std > 0).all()):
            raise ValueError(complaint("data_std", "positive values", data_std))
        # PyTorch's first gradient of instance norm is wrong for one sample in channels_last, which
        # a network may make of a batch. Of one sample the field finds it by any name.
        safe = enable_grad or any(isinstance(each, INSTANCE_NORMS) for each in modules.values())
        conditions = condition(model, count, kwargs, primitives=None if safe else False)
        coordinates, dtype = Coordinates(model.schedule, mean, std), _network_dtype(model, x)
        _say_ends(coordinates, start=at_start, prior=log_prior is None and of_prior)
        results = []
        with progress_bar(progress, count * draws, "sample") as advance:
            given = (log_prior, generator, advance, Watch(not training and not traced()))
            whole = Batch(normal(x), conditions, coordinates, dtype, *given)
            for _ in range(draws):
                points = dequantize(whole.x, generator) if dequantization else whole.x
                parts = [likelihood(whole.rows(points, rows)) for rows in chunks]
                result = parts[0] if len(parts) == 1 else NLLResult.cat(parts)
                results.append(mark_failed(result))
    return importance_weighted(results) if dequantization else results[0]


@contextmanager
def _kept(modules: Mapping[str, nn.Module], x: Tensor) -> Iterator[None]:
    """A block after which the buffers of a network are what they were, as running statistics."""
    may_change = any(part.training and part._buffers for part in modules.values())
    before = Snapshot(modules[""], x) if may_change and not traced() else None
    try:
        yield
    finally:
        if before is not None:
            before.restore(generators=False)


def _say_what_trains(modules: Mapping[str, nn.Module]) -> bool:
    """Warn of a part whose training mode makes a likelihood another number, if there is one."""
    for name, part in modules.items():
        if not part.training or not isinstance(part, TRAINING):
            continue
        # The probability of a dropout, or of that inside an attention.
        if getattr(part, "p", getattr(part, "dropout", 1)) > 0:
            warnings.warn(
                f"network: expected evaluation mode, as after model.eval(); got {name or 'it'}, a "
                f"{type(part).__name__} in training mode. The numbers are random, or depend on "
                "what else is in the batch.",
                stacklevel=users_level(),
            )
            return True
    return False


class Watch:
    """Looks at the first evaluation of a network, and warns if its output is random.

    No list of layers is complete: a network may drop labels, layers or words by code of its own.
    What draws leaves torch's generators elsewhere, and then values are compared: several, for what
    is dropped in one call of ten is rarely so in the first two.
    """

    def __init__(self, due: bool) -> None:
        self.due = due

    def __call__(
        self, value: Callable[[Tensor], Tensor], x: Tensor, evaluate: Callable[[], Values]
    ) -> Values:
        """What `evaluate` returns, which evaluates at x (B, *) what `value` is the value of."""
        if not self.due:
            return evaluate()
        self.due, before = False, _generators(x)
        found = evaluate()
        if all(map(torch.equal, before, _generators(x))):
            return found
        after = Snapshot(None, x)
        with torch.no_grad():
            one = value(x)
            same = partial(torch.allclose, one, rtol=1e-3, atol=0, equal_nan=True)
            random = not all(same(value(x)) for _ in range(COMPARED))
        after.restore()
        if not random:
            return found
        warnings.warn(
            "network: expected the same output for the same input; got one that draws random "
            "numbers, as dropout does in training mode. The likelihood is another one in every "
            "call. Call model.eval() first, and look for what draws where its mode is not asked.",
            stacklevel=users_level(),
        )
        return found


def _generators(x: Tensor) -> list[Tensor]:
    """The states of torch's generators on the devices of x; none inside a CUDA graph."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return []
    return [torch.get_rng_state(), *get_device_states(x)[1]]


def _say_ends(coordinates: Coordinates, *, start: bool, prior: bool) -> None:
    """Warn, on the CPU, where x at t_min is not the data, or the latent not that of the prior."""
    schedule, mean = coordinates.schedule, coordinates.mean
    if not may_look(mean):
        return
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=mean.dtype, device="cpu")
    (alphas, sigmas), spread = schedule(ends), schedule.prior_std
    (first, alpha), (_, sigma) = alphas.detach().unbind(), sigmas.detach().unbind()
    if start and schedule._starts_at_data and abs(float(first) - 1) > SCALED:
        warnings.warn(
            f"schedule: expected α(t_min) near 1; got {schedule!r}, with {float(first):g}. x and "
            "its density are those of a point at t_min, which is that many times the data. Give "
            "ode_nll α x for data x and subtract d log α from its nll, or give clean=True; divide "
            "the samples of ode_sample by α.",
            stacklevel=users_level(),
        )
    variance = ((alpha * coordinates.std).square() + sigma.square()) / spread**2
    shift = (alpha * mean / spread).square()
    apart = float((variance + shift - 1 - variance.log()).detach().sum()) / 2
    if prior and apart > MISMATCH * mean.numel():
        warnings.warn(
            f"schedule: expected one that ends in its prior, N(0, {spread:g}²); got "
            f"{schedule!r}, which ends {apart:.2g} nats a sample from it for data of this "
            "data_mean and data_std. Likelihoods have them as a part, and samples from the prior "
            "are off by them. Look at the numbers of the schedule, or give log_prior, and to "
            "ode_sample latents of it.",
            stacklevel=users_level(),
        )


def noised(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch at t_min by a draw of noise, and what to add to its nll for that of x, (B,).

    −log p(x) ≤ E[−log p(x_tmin) + log q(x_tmin|x) − log p(x|x_tmin)], with the decoder of
    `variational`: the last two are ½ (‖ε̂ − ε‖² − ‖ε‖²) − d log α(t_min). They go with the noise
    that was drawn, ‖ε‖² and not its mean d: a change of p(x_tmin) with ε cancels, and the mean of
    exp(−nll) over draws is a density of x.
    """
    x, coordinates = batch.x, batch.coordinates
    start, _ = coordinates.ends(coordinates.schedule.log_sigma_hat_range)
    noise = torch.randn(x.shape, generator=batch.generator, device=x.device, dtype=x.dtype)
    points = start.alpha * x + start.sigma * noise
    error = batch.noise(points, start) - noise
    correction = over_elements(error.square() - noise.square(), 1) / 2
    correction = correction - x[0].numel() * start.alpha.log().reshape(())
    return replace(batch, x=points), correction


def mark_failed(result: NLLResult) -> NLLResult:
    """Put NaN where the number says nothing, judged in the dtype of the latent, the network's."""
    latent = result.latent
    limit = solver_limit(latent[0].numel())
    in_range = result.nll.detach().to(torch.promote_types(latent.dtype, torch.float32))
    good = torch.isfinite(in_range) & (result.solver_error.detach() <= limit)
    failed = result.failed | ~good
    return replace(result, nll=result.nll.masked_fill(failed, math.nan), failed=failed)


def _moment(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """A moment of the data, expanded to (1, *)."""
    shape = (1, *x.shape[1:])
    wanted = complaint(name, f"a number or a tensor that broadcasts to {shape}, one sample", value)
    try:
        tensor = normal(
            value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        )
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(wanted)
    check_dense(name, tensor)
    try:
        expanded = tensor.to(x.device, accumulator(x)).expand(shape)
    except RuntimeError:
        raise ValueError(wanted) from None
    check_finite(name, expanded)
    return expanded


def _network_dtype(model: ScoreModel, x: Tensor) -> torch.dtype:
    """The dtype of x, or for integers that of the network's first floating-point parameter."""
    parameters = model.network.parameters() if isinstance(model.network, nn.Module) else ()
    dtypes = (each.dtype for each in chain((x,), parameters) if each.is_floating_point())
    return next(dtypes, torch.get_default_dtype())
