"""NVlabs/edm: a preconditioned network, which is a denoiser D(x, σ)."""

from typing import Any

from hosm_losses.interop._table import check_has
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import EDMSchedule

NETWORK = "net: expected an EDM network with {}, such as EDMPrecond"
DENOISER = "For another denoiser D(x, sigma): ScoreModel(net, EDMSchedule(), 'sample')."


def from_edm(net: Any) -> ScoreModel:
    """Return the ScoreModel of an EDM denoiser D(x, σ, class_labels); t is σ.

    The noise runs over what the network declares as sigma_min and sigma_max, within [0.002, 80],
    the range of EDM's sampler. Labels go into `model_kwargs` as class_labels. EDM's own loss,
    (σ² + σ_d²)/(σ σ_d)² times the squared error of D, is the callable weighting
    `lambda t: (t**2 + sigma_data**2) / sigma_data**2` in units of the noise. EDM's own attention
    is right at orders two and three in reverse mode, which is what "auto" takes; the estimators
    "laplacian" and "sliced" need a plain one.

    Raises:
        TypeError: for a network without sigma_min and sigma_max.

    Example:
        >>> from torch import nn
        >>> net = nn.Identity()
        >>> net.sigma_min, net.sigma_max = 0.0, float("inf")
        >>> from_edm(net).schedule.t_max
        80.0
    """
    check_has(net, NETWORK, "sigma_min", "sigma_max", advice=DENOISER)
    low = max(float(net.sigma_min), EDMSchedule.t_min)
    high = min(float(net.sigma_max), EDMSchedule.t_max)
    return ScoreModel(net, EDMSchedule(t_min=low, t_max=high), "sample")
