"""diffusers: a model and the scheduler it is trained with."""

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from hosm_losses._checks import check_number
from hosm_losses.interop._table import check_has, first_half, predicted, table_schedule
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import LinearFlowSchedule

PREDICTIONS = {name: name for name in ("epsilon", "sample", "v_prediction")}
COUNT = "scheduler.config.num_train_timesteps"
SCHEDULER = "scheduler: expected one with {}, such as DDPMScheduler, or a flow-matching one"


def from_diffusers(model: nn.Module, scheduler: Any) -> ScoreModel:
    """Return the ScoreModel of a diffusers model, with the scheduler's table and prediction type.

    Schedulers with a table (DDPM, DDIM, PNDM, Euler and others with `alphas_cumprod`) become a
    DiscreteSchedule: t is the timestep, integer in training, between two of them in the
    likelihood. x is what the model is given: for Euler that is `scheduler.scale_model_input` of
    its sample. A flow-matching scheduler becomes a LinearFlowSchedule: t is its sigma, and the
    model is given t · num_train_timesteps. A scheduler's shift only says which times are drawn:
    draw them yourself and pass t. Class labels, text states and so on go into `model_kwargs`.

    Args:
        model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel, or
            another that takes (sample, timestep=...) and returns an object with `.sample`. If it
            has twice as many output as input channels, the second half, its variance, is left out.
        scheduler: one with a table, or for flow matching.

    Raises:
        TypeError: for a scheduler that is neither of the two.
        ValueError: for zero terminal SNR, or an unknown prediction type.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(prediction_type="v_prediction")
        >>> scheduler = SimpleNamespace(alphas_cumprod=[0.9, 0.5, 0.1], config=config)
        >>> from_diffusers(nn.Identity(), scheduler).prediction
        'v_prediction'
    """
    own = getattr(model, "config", None)
    inputs, outputs = (getattr(own, f"{end}_channels", None) for end in ("in", "out"))
    learned = inputs is not None and outputs == 2 * inputs
    output = _half_of_sample if learned else attrgetter("sample")
    options: dict[str, Any] = {"output": output, "call": _by_name}
    config = getattr(scheduler, "config", None)
    if "FlowMatch" in type(scheduler).__name__:
        count = getattr(config, "num_train_timesteps", None)
        factor = check_number(COUNT, count, "a number above 0", above=0)
        return ScoreModel(model, LinearFlowSchedule(), "flow_prediction", time=factor, **options)
    check_has(scheduler, SCHEDULER, "alphas_cumprod")
    schedule = table_schedule(scheduler.alphas_cumprod, "scheduler.alphas_cumprod")
    kind = getattr(config, "prediction_type", None)
    prediction = predicted(kind, PREDICTIONS, "scheduler.config.prediction_type")
    return ScoreModel(model, schedule, prediction, **options)


def _by_name(model: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    return model(x, timestep=t, **kwargs)  # not every model takes it in the second place


def _half_of_sample(returned: Any) -> Tensor:
    return first_half(returned.sample)
