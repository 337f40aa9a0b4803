"""What both likelihoods are given: moments of the data, a prior, a dtype and a batch in chunks."""

__all__ = ["check_batch_size", "chunks", "data_coordinates", "log_prior_at", "network_dtype"]

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hosm_losses._checks import check_finite, check_like, describe, may_look
from hosm_losses.coordinates import Coordinates
from hosm_losses.divergence import accumulator
from hosm_losses.score_model import ScoreModel


def check_batch_size(batch_size: int | None) -> None:
    """Raise ValueError unless this is None or a positive whole number."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(
            f"batch_size: expected None or a whole number of at least 1; got "
            f"{describe(batch_size)}."
        )


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
        ValueError: for another shape, values that are not finite, or a std that is not positive.
    """
    coordinates = Coordinates(
        model.schedule, _of_data("data_mean", mean, x), _of_data("data_std", std, x)
    )
    if may_look(coordinates.std) and not bool((coordinates.std > 0).all()):
        raise ValueError(f"data_std: expected positive values; got {describe(std)}.")
    return coordinates


def _of_data(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """A moment of the data, expanded to (1, *)."""
    tensor = torch.as_tensor(value, dtype=accumulator(x), device=x.device)
    shape = (1, *x.shape[1:])
    try:
        expanded = tensor.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a number or a tensor that broadcasts to {shape}, one sample; got "
            f"{describe(value)}."
        ) from None
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
