"""openai guided-diffusion and improved-diffusion: a model and its GaussianDiffusion."""

from typing import Any

from torch import nn

from hosm_losses.interop._table import check_has, first_half, predicted, table_schedule
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import Table

PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample"}
STEPS = 1000.0


def from_guided_diffusion(model: nn.Module, diffusion: Any) -> ScoreModel:
    """Return the ScoreModel of a model and its GaussianDiffusion or SpacedDiffusion.

    t is an index of the diffusion's own table, and the model is given what the project would give
    it: the index before respacing, times 1000 over its number of steps with rescale_timesteps.
    Class labels go into `model_kwargs` as y. Of a model that learns its variance the first half of
    the channels is used. The project's own checkpoint, which its attention calls as well, has to
    be replaced above order one.

    Raises:
        TypeError: for a diffusion that is neither.
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
    names = ("alphas_cumprod", "model_mean_type", "model_var_type")
    check_has(diffusion, "diffusion: expected a GaussianDiffusion with {}", *names)
    schedule = table_schedule(diffusion.alphas_cumprod, "diffusion.alphas_cumprod")
    kind = getattr(diffusion.model_mean_type, "name", None)
    prediction = predicted(kind, PREDICTIONS, "diffusion.model_mean_type")
    learned = getattr(diffusion.model_var_type, "name", None) in ("LEARNED", "LEARNED_RANGE")
    output = first_half if learned else None
    steps = len(schedule.alphas_cumprod)
    indices = getattr(diffusion, "timestep_map", range(steps))
    rescaled = STEPS / getattr(diffusion, "original_num_steps", steps)
    factor = rescaled if getattr(diffusion, "rescale_timesteps", False) else 1.0
    time = Table(tuple(factor * float(index) for index in indices))
    return ScoreModel(model, schedule, prediction, time=time, output=output)
