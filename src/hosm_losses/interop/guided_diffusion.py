"""openai guided-diffusion and improved-diffusion: a model and its GaussianDiffusion."""

__all__ = ["from_guided_diffusion"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses._checks import describe
from hosm_losses.interop._table import first_half, predicted, table_schedule
from hosm_losses.score_model import ScoreModel

PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample"}
LEARNED = ("LEARNED", "LEARNED_RANGE")
STEPS = 1000.0


def from_guided_diffusion(model: nn.Module, diffusion: Any) -> ScoreModel:
    """A ScoreModel of a model with its table, respaced or not, and its prediction type.

    t is an index of the diffusion's own table, and the model is given what the project would give
    it: the index before respacing, times 1000 over its number of steps with rescale_timesteps.
    Class labels go into `model_kwargs` as y. Of a model that learns its variance the first half of
    the channels is used. The project's own checkpoint, which its attention calls as well, has to
    be replaced above order one.

    Args:
        model: the network, `model(x, timesteps, **kwargs)`.
        diffusion: a GaussianDiffusion or SpacedDiffusion.

    Returns:
        The score model.

    Raises:
        TypeError: for an object that is none.
        ValueError: for a prediction of the previous x, or zero terminal SNR.

    Example:
        >>> from types import SimpleNamespace as Is
        >>> diffusion = Is(
        ...     alphas_cumprod=[0.9, 0.5, 0.1], model_mean_type=Is(name="EPSILON"),
        ...     model_var_type=Is(name="LEARNED_RANGE"), rescale_timesteps=False,
        ... )
        >>> from_guided_diffusion(nn.Identity(), diffusion).prediction
        'epsilon'
    """
    for name in ("alphas_cumprod", "model_mean_type", "model_var_type"):
        if not hasattr(diffusion, name):
            raise TypeError(
                f"diffusion: expected a GaussianDiffusion with {name}; got {describe(diffusion)}."
            )
    schedule = table_schedule(diffusion.alphas_cumprod, "diffusion.alphas_cumprod")
    kind = getattr(diffusion.model_mean_type, "name", None)
    prediction = predicted(kind, PREDICTIONS, "diffusion.model_mean_type")
    steps = len(schedule.alphas_cumprod)
    indices = tuple(float(i) for i in getattr(diffusion, "timestep_map", range(steps)))
    original = getattr(diffusion, "original_num_steps", steps)
    factor = STEPS / original if getattr(diffusion, "rescale_timesteps", False) else 1.0
    learned = getattr(diffusion.model_var_type, "name", None) in LEARNED
    return ScoreModel(
        model,
        schedule,
        prediction,
        time=_Labels(tuple(factor * index for index in indices)),
        output=first_half if learned else None,
    )


@dataclass(frozen=True)
class _Labels:
    """What the model is given for an index of the table, linear between two of them."""

    labels: tuple[float, ...]

    def __call__(self, t: Tensor) -> Tensor:
        if t.is_floating_point():
            left = t.detach().floor().clamp(0, len(self.labels) - 2).long()
        else:
            left = t.clamp(0, len(self.labels) - 2)
        dtype = t.dtype if t.is_floating_point() else torch.get_default_dtype()
        labels = torch.tensor(self.labels, dtype=dtype, device=t.device)
        return labels[left] + (t - left) * (labels[left + 1] - labels[left])
