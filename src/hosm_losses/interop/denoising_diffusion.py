"""The GaussianDiffusion of denoising-diffusion-pytorch."""

from typing import Any

from torch import Tensor

from hosm_losses.interop.foreign import check_has, first_half, predicted, table_schedule
from hosm_losses.model import Prediction, ScoreModel

# The project's names of what its networks predict, and ours.
PREDICTIONS: dict[str, Prediction] = {
    "pred_noise": "epsilon",
    "pred_x0": "sample",
    "pred_v": "v_prediction",
}


def from_denoising_diffusion(diffusion: Any) -> ScoreModel:
    """Return the ScoreModel of the network in a GaussianDiffusion, with its table and objective.

    t is the index of the table. x is in the range the network sees: give
    `diffusion.normalize(images)` to the losses and to `ode_nll`. The project's own loss is the
    first term here; with min_snr_loss_weight give the weighting min(SNR, min_snr_gamma)/SNR, for
    any objective. The network is `diffusion.model`, so the project's Trainer, optimizer and EMA
    hold its parameters. The one of `classifier_free_guidance` drops classes at every call, as in
    the project's loss, none after `.eval()`. The variance of a LearnedGaussianDiffusion is unused.

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
    schedule = table_schedule(diffusion, "diffusion")
    prediction = predicted(diffusion.objective, PREDICTIONS, "diffusion.objective")
    network = diffusion.model
    channels, outputs = (getattr(network, name, None) for name in ("channels", "out_dim"))
    learned = channels is not None and outputs == 2 * channels
    output = first_half if learned else None
    call = _dropping_classes if hasattr(network, "cond_drop_prob") else None
    return ScoreModel(network, schedule, prediction, output=output, call=call)


def _dropping_classes(network: Any, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    kept = {} if getattr(network, "training", True) else {"cond_drop_prob": 0.0}
    return network(x, t, **kept | kwargs)
