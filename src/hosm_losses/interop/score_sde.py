"""yang-song/score_sde_pytorch: a model and its SDE."""

__all__ = ["from_score_sde"]

from typing import Any

from torch import nn

from hosm_losses._checks import describe
from hosm_losses.schedules import SubVPSchedule, VESchedule, VPSchedule
from hosm_losses.score_model import ScoreModel

LABELS = 999.0


def from_score_sde(model: nn.Module, sde: Any) -> ScoreModel:
    """A ScoreModel of a network trained in continuous time.

    Under VPSDE and subVPSDE the network predicts the noise and is given 999 t. Under VESDE it
    predicts the score and is given σ(t).

    Args:
        model: the network, model(x, labels).
        sde: a VPSDE, subVPSDE or VESDE, told apart by their attributes.

    Returns:
        The score model; t is the SDE's time, from 1e-5 to 1.

    Raises:
        TypeError: for another SDE.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> sde = SimpleNamespace(sigma_min=0.01, sigma_max=50.0)
        >>> from_score_sde(torch.nn.Identity(), sde).prediction
        'score'
    """
    if hasattr(sde, "sigma_min") and hasattr(sde, "sigma_max"):
        schedule = VESchedule(sigma_min=float(sde.sigma_min), sigma_max=float(sde.sigma_max))
        return ScoreModel(model, schedule, "score", time=schedule.sigma)
    if hasattr(sde, "beta_0") and hasattr(sde, "beta_1"):
        # VPSDE has the discrete betas of DDPM beside the continuous ones; subVPSDE has not.
        kind = VPSchedule if hasattr(sde, "discrete_betas") else SubVPSchedule
        schedule = kind(beta_min=float(sde.beta_0), beta_max=float(sde.beta_1))
        return ScoreModel(model, schedule, "epsilon", time=LABELS)
    raise TypeError(
        "sde: expected a VPSDE or subVPSDE with beta_0 and beta_1, or a VESDE with sigma_min and "
        f"sigma_max; got {describe(sde)}. Build a ScoreModel with a Schedule of your own."
    )
