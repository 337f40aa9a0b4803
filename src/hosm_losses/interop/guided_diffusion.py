"""The diffusions of guided-diffusion and improved-diffusion."""

from typing import Any

from torch import nn

from hosm_losses.interop.foreign import check_has, first_half, predicted, table_schedule
from hosm_losses.model import Prediction, ScoreModel
from hosm_losses.schedules import step_labels

# The project's names of what its networks predict, and ours.
PREDICTIONS: dict[str, Prediction] = {"EPSILON": "epsilon", "START_X": "sample"}


def from_guided_diffusion(model: nn.Module, diffusion: Any) -> ScoreModel:
    """Return the ScoreModel of a model and its GaussianDiffusion or SpacedDiffusion.

    t is an index of the diffusion's own table, and the model is given what the project gives it:
    the step before respacing, between two indices the one with that noise; times 1000 over its
    number of steps with rescale_timesteps. Class labels go into `model_kwargs` as y. Of a model
    that learns its variance the first half of the channels is used. The project's own checkpoint,
    which its attention calls as well, has to be replaced above order one.

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
    schedule = table_schedule(diffusion, "diffusion")
    kind = getattr(diffusion.model_mean_type, "name", None)
    prediction = predicted(kind, PREDICTIONS, "diffusion.model_mean_type")
    learned = getattr(diffusion.model_var_type, "name", None) in ("LEARNED", "LEARNED_RANGE")
    output = first_half if learned else None
    steps = len(schedule.alphas_cumprod)
    indices = getattr(diffusion, "timestep_map", range(steps))
    rescaled = 1000.0 / getattr(diffusion, "original_num_steps", steps)
    factor = rescaled if getattr(diffusion, "rescale_timesteps", False) else 1.0
    time = step_labels(schedule, indices, factor)
    return ScoreModel(model, schedule, prediction, time=time, output=output)
