"""The networks of EDM."""

from typing import Any

from hosm_losses.interop.foreign import check_has
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import EDMSchedule


def from_edm(net: Any) -> ScoreModel:
    """Return the ScoreModel of an EDM denoiser D(x, σ, class_labels); t is σ.

    The noise runs over the network's sigma_min and sigma_max, within [0.002, 80], the range of
    EDM's sampler. One-hot labels go into `model_kwargs` as class_labels. third="laplacian" needs a
    plain attention in the place of EDM's.

    The first term is the loss of EDM's trainer with

        ThirdOrderDSM(from_edm(net), weighting=EDMWeighting(net.sigma_data))

    Raises:
        TypeError: for a network without sigma_min and sigma_max.

    Example:
        >>> from torch import nn
        >>> net = nn.Identity()
        >>> net.sigma_min, net.sigma_max = 0.0, float("inf")
        >>> from_edm(net).schedule.t_max
        80.0
    """
    expected = "net: expected an EDM network with {}, such as EDMPrecond"
    advice = "For another denoiser D(x, sigma): ScoreModel(net, EDMSchedule(), 'sample')."
    check_has(net, expected, "sigma_min", "sigma_max", advice=advice)
    low = max(float(net.sigma_min), EDMSchedule.t_min)
    high = min(float(net.sigma_max), EDMSchedule.t_max)
    return ScoreModel(net, EDMSchedule(t_min=low, t_max=high), "sample")
