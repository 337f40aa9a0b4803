"""What both likelihoods are given: moments of the data, a prior, a dtype and a batch in chunks."""

__all__ = ["check_options", "chunks", "data_coordinates", "log_prior_at", "network_dtype"]

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hosm_losses._checks import (
    check_dense,
    check_finite,
    check_flag,
    check_generator,
    check_like,
    check_whole,
    describe,
    may_look,
)
from hosm_losses._torch_internals import normal, outside_inference_mode
from hosm_losses.likelihood.coordinates import Coordinates
from hosm_losses.likelihood.divergence import accumulator
from hosm_losses.model import ScoreModel


def check_options(
    batch_size: object, log_prior: object, progress: object, generator: object, x: Tensor
) -> tuple[int | None, torch.Generator | None]:
    """Check what both likelihoods take beside their numbers.

    Args:
        batch_size: None or a positive whole number.
        log_prior: None or a callable.
        progress: True or False.
        generator: None or a generator of the device of x.
        x: the data.

    Returns:
        The batch size and the generator.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for another number or device.
    """
    if not (log_prior is None or callable(log_prior)):
        raise TypeError(
            "log_prior: expected a callable of latents (n, *) that returns their log-densities "
            f"(n,), or None; got {describe(log_prior)}."
        )
    check_flag("progress", progress)
    size = None if batch_size is None else check_whole("batch_size", batch_size, 1)
    return size, check_generator(generator, x.device)


def chunks(x: Tensor, batch_size: int | None) -> tuple[Tensor, ...]:
    """Row numbers of a batch, in chunks of batch_size; one chunk if None."""
    return torch.arange(len(x), device=x.device).split(batch_size or len(x))


def network_dtype(model: ScoreModel, x: Tensor) -> torch.dtype:
    """The dtype of x, or for integers that of the network's first floating-point parameter."""
    if x.is_floating_point():
        return x.dtype
    network = model.network
    if isinstance(network, nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def data_coordinates(
    model: ScoreModel, x: Tensor, mean: float | Tensor, std: float | Tensor
) -> Coordinates:
    """The coordinates that the data's moments set, in the precision sums are kept in.

    Args:
        model: whose schedule it is.
        x: a batch (B, *), for its shape and device.
        mean: the data's mean, a number or a tensor that broadcasts to a sample.
        std: the data's standard deviation, likewise.

    Returns:
        The coordinates.

    Raises:
        TypeError: for what is no real number or tensor.
        ValueError: for another shape, values that are not finite, or a std that is not positive.
    """
    with outside_inference_mode():
        coordinates = Coordinates(
            model.schedule, _of_data("data_mean", mean, x), _of_data("data_std", std, x)
        )
    if may_look(coordinates.std) and not bool((coordinates.std > 0).all()):
        raise ValueError(f"data_std: expected positive values; got {describe(std)}.")
    return coordinates


def _of_data(name: str, value: float | Tensor, x: Tensor) -> Tensor:
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


def log_prior_at(
    log_prior: Callable[[Tensor], Tensor] | None, latent: Tensor, dtype: torch.dtype, std: float
) -> Tensor:
    """Log-density of the prior at latents (B, *), in their precision.

    Args:
        log_prior: the user's, which is given latents of `dtype`; N(0, std² I) if None.
        latent: in the precision of the sums.
        dtype: the network's.
        std: the schedule's prior_std.

    Returns:
        The log-density (B,).

    Raises:
        TypeError: if the user's returns no tensor of this dtype.
        ValueError: if it returns another shape than (B,).
    """
    if log_prior is None:
        squares = latent.reshape(len(latent), -1).square().sum(1)
        normalisation = latent[0].numel() * math.log(2 * math.pi * std**2)
        return -0.5 * (squares / std**2 + normalisation)
    value = log_prior(latent.to(dtype))
    check_like("log_prior(latent)", value, (len(latent),), dtype, latent.device, "x")
    return value.to(latent.dtype)
