"""yang-song/score_sde_pytorch: a model and its SDE."""

from typing import Any

from torch import nn

from hosm_losses._checks import check_flag
from hosm_losses.interop._table import check_has
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import SubVPSchedule, VESchedule, VPSchedule

LABELS = 999.0
SDE = "sde: expected a VPSDE or subVPSDE with {}, or a VESDE with sigma_min and sigma_max"
DISCRETE = (
    "continuous: expected True, for a network trained in continuous time; got False. One trained "
    "on sde.N discrete steps is given their numbers as labels:"
)
DISCRETE_VP = "ScoreModel(model, DiscreteSchedule(sde.alphas_cumprod)), whose t is the label."
DISCRETE_VE = (
    "ScoreModel(model, VESchedule(sigma_min=sde.sigma_min, sigma_max=sde.sigma_max), 'score', "
    "time=lambda t: ((1 - t) * (sde.N - 1)).round().long()), whose score is right at the steps "
    "t = i / (sde.N - 1) and taken from the nearest one between them."
)


def from_score_sde(model: nn.Module, sde: Any, *, continuous: bool = True) -> ScoreModel:
    """Return the ScoreModel of a network trained in continuous time; t runs from 1e-5 to 1.

    Under VPSDE and subVPSDE the network predicts the noise and is given 999 t. Under VESDE it
    predicts the score and is given σ(t). The project's `create_model` returns a DataParallel, with
    which order one and `ode_nll` work; orders two and three take the network inside,
    `model.module`, whose parameters are the same.

    Args:
        model: the network, model(x, labels).
        sde: a VPSDE, subVPSDE or VESDE, told apart by their attributes.
        continuous: what `config.training.continuous` says. A network trained with False is given
            the numbers of discrete steps, and is refused with what to write in place of this.

    Raises:
        TypeError: for another SDE.
        ValueError: for continuous=False.

    Example:
        >>> from types import SimpleNamespace
        >>> sde = SimpleNamespace(sigma_min=0.01, sigma_max=50.0)
        >>> from_score_sde(nn.Identity(), sde).prediction
        'score'
    """
    check_flag("continuous", continuous)
    explodes = hasattr(sde, "sigma_min") and hasattr(sde, "sigma_max")
    if not explodes:
        check_has(sde, SDE, "beta_0", "beta_1")
    if not continuous:
        raise ValueError(f"{DISCRETE} {DISCRETE_VE if explodes else DISCRETE_VP}")
    if explodes:
        schedule = VESchedule(sigma_min=float(sde.sigma_min), sigma_max=float(sde.sigma_max))
        return ScoreModel(model, schedule, "score", time=schedule.sigma)
    # VPSDE has the discrete betas of DDPM beside the continuous ones; subVPSDE has not.
    kind = VPSchedule if hasattr(sde, "discrete_betas") else SubVPSchedule
    schedule = kind(beta_min=float(sde.beta_0), beta_max=float(sde.beta_1))
    return ScoreModel(model, schedule, "epsilon", time=LABELS)
