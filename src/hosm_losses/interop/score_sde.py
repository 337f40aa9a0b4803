"""The networks and SDEs of score_sde_pytorch."""

from typing import Any

import torch
from torch import nn

from hosm_losses._checks import check_flag, describe
from hosm_losses.interop.foreign import OWN, check_has
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import Schedule, SubVPSchedule, VESchedule, VPSchedule

DISCRETE = (
    "continuous: expected True, for a network trained in continuous time; got False{}. One "
    "trained on sde.N discrete steps is given their numbers as labels: "
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
    predicts the score and is given σ(t). Of the DataParallel that `create_model` returns
    orders two and three take the network inside, `model.module`.

    Args:
        model: the network, model(x, labels).
        sde: a VPSDE, subVPSDE or VESDE, told apart by their attributes.
        continuous: what `config.training.continuous` says. A network trained with False, except
            under subVPSDE, is given step numbers: it is refused, and the error says what to write
            instead. The configuration that a network keeps, as NCSN++ does, is checked as well.

    Raises:
        TypeError: for another SDE, by its attributes or its `marginal_prob`.
        ValueError: for a network trained on discrete steps.

    Example:
        >>> from types import SimpleNamespace
        >>> sde = SimpleNamespace(sigma_min=0.01, sigma_max=50.0)
        >>> from_score_sde(nn.Identity(), sde).prediction
        'score'
    """
    check_flag("continuous", continuous)
    if hasattr(sde, "sigma_min") and hasattr(sde, "sigma_max"):
        _refuse_discrete(model, continuous, DISCRETE_VE)
        exploding = VESchedule(sigma_min=float(sde.sigma_min), sigma_max=float(sde.sigma_max))
        return ScoreModel(model, _confirmed(exploding, sde), "score", time=exploding.sigma)
    expected = "sde: expected a VPSDE or subVPSDE with {}, a VESDE with sigma_min, sigma_max"
    check_has(sde, expected, "beta_0", "beta_1")
    kind = SubVPSchedule
    # VPSDE has the discrete betas of DDPM beside the continuous ones; subVPSDE has not.
    if hasattr(sde, "discrete_betas"):
        _refuse_discrete(model, continuous, DISCRETE_VP)
        kind = VPSchedule
    schedule = kind(beta_min=float(sde.beta_0), beta_max=float(sde.beta_1))
    return ScoreModel(model, _confirmed(schedule, sde), "epsilon", time=999.0)


def _refuse_discrete(model: nn.Module, continuous: bool, advice: str) -> None:
    """Raise ValueError where the caller or the network says that it was trained on steps."""
    config = getattr(getattr(model, "module", model), "config", None)
    kept = getattr(getattr(config, "training", None), "continuous", True)
    if not (continuous and kept):
        where = " in model.config.training" if continuous else ""
        raise ValueError(DISCRETE.format(where) + advice)


def _confirmed(schedule: Schedule, sde: Any) -> Schedule:
    """The schedule; TypeError if the SDE says another α and σ than those of its attributes."""
    if marginal := getattr(sde, "marginal_prob", None):
        t = torch.tensor([0.3], dtype=torch.float64, device="cpu")
        # One number at one time, which may be data of any dimension.
        own = torch.cat([part.flatten().to(t) for part in marginal(torch.ones_like(t), t)])
        if not torch.allclose(own, torch.cat(schedule(t)), rtol=1e-3):
            expected = f"sde: expected the marginal_prob(x, t) of {schedule}"
            raise TypeError(f"{expected}; got {describe(sde)}, with another. {OWN}")
    return schedule
