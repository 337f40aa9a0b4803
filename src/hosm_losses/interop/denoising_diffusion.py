"""lucidrains denoising-diffusion-pytorch: a GaussianDiffusion, which holds its network."""

from typing import Any

from hosm_losses.interop._table import check_has, predicted, table_schedule
from hosm_losses.model import ScoreModel

PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def from_denoising_diffusion(diffusion: Any) -> ScoreModel:
    """Return the ScoreModel of the network in a GaussianDiffusion, with its table and objective.

    t is the index of the table. x is in the range the network sees: give
    `diffusion.normalize(images)` to the losses and to `ode_nll`. The project's own loss weights
    make all its objectives the squared error of the noise, which is the first term of the losses
    here; with min_snr_loss_weight pass that weight as a callable. The network is
    `diffusion.model`, so the project's Trainer, optimizer and EMA hold the same parameters.

    Raises:
        TypeError: for an object that is no GaussianDiffusion.
        ValueError: for self-conditioning, an unknown objective, or zero terminal SNR.

    Example:
        >>> from types import SimpleNamespace
        >>> diffusion = SimpleNamespace(
        ...     model=lambda x, t: x, objective="pred_v", alphas_cumprod=[0.9, 0.5, 0.1]
        ... )
        >>> from_denoising_diffusion(diffusion).prediction
        'v_prediction'
    """
    names = ("model", "objective", "alphas_cumprod")
    check_has(diffusion, "diffusion: expected a GaussianDiffusion with {}", *names)
    if getattr(diffusion, "self_condition", False):
        raise ValueError(
            "diffusion: expected a network without self-conditioning; got self_condition=True. "
            "Its prediction depends on an earlier one, so it has no score that could be matched "
            "or integrated: build the Unet with self_condition=False."
        )
    schedule = table_schedule(diffusion.alphas_cumprod, "diffusion.alphas_cumprod")
    prediction = predicted(diffusion.objective, PREDICTIONS, "diffusion.objective")
    return ScoreModel(diffusion.model, schedule, prediction)
