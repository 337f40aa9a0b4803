"""NVlabs/edm: a preconditioned network, which is a denoiser D(x, σ)."""

__all__ = ["from_edm"]

from typing import Any

from torch import nn

from hosm_losses._checks import describe
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import EDMSchedule


def from_edm(net: nn.Module) -> ScoreModel:
    """A ScoreModel of an EDM denoiser D(x, σ, class_labels).

    The noise runs over what the network declares as sigma_min and sigma_max, within [0.002, 80],
    the range of EDM's sampler. Labels go into `model_kwargs` as class_labels. EDM's own loss,
    (σ² + σ_d²)/(σ σ_d)² times the squared error of D, is the callable weighting
    `lambda t: (t**2 + sigma_data**2) / sigma_data**2` in units of the noise. EDM's own attention
    is right at orders two and three in reverse mode, which is what "auto" takes; the estimators
    "laplacian" and "sliced" need a plain one.

    Args:
        net: the network, with sigma_min and sigma_max.

    Returns:
        The score model; t is σ.

    Raises:
        TypeError: for a network without these.

    Example:
        >>> import torch
        >>> net = torch.nn.Identity()
        >>> net.sigma_min, net.sigma_max = 0.0, float("inf")
        >>> from_edm(net).schedule.t_max
        80.0
    """
    low, high = (_number(net, name) for name in ("sigma_min", "sigma_max"))
    schedule = EDMSchedule()
    schedule = EDMSchedule(t_min=max(low, schedule.t_min), t_max=min(high, schedule.t_max))
    return ScoreModel(net, schedule, "sample")


def _number(net: Any, name: str) -> float:
    value = getattr(net, name, None)
    if value is None:
        raise TypeError(
            f"net: expected an EDM network with {name}, such as EDMPrecond; got {describe(net)}. "
            "For another denoiser D(x, sigma): ScoreModel(net, EDMSchedule(), 'sample')."
        )
    return float(value)
