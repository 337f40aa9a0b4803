"""diffusers: a model and the scheduler it is trained with."""

__all__ = ["from_diffusers"]

from typing import Any

from torch import Tensor, nn

from hosm_losses._checks import describe
from hosm_losses.interop._table import first_half, predicted, table_schedule
from hosm_losses.model import ScoreModel
from hosm_losses.schedules import LinearFlowSchedule

PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction"}


def from_diffusers(model: nn.Module, scheduler: Any) -> ScoreModel:
    """A ScoreModel of a diffusers model, with the scheduler's table and prediction type.

    Schedulers with a table (DDPM, DDIM, PNDM, Euler and others with `alphas_cumprod`) become a
    DiscreteSchedule: t is the timestep, integer in training, between two of them in the
    likelihood. x is what the model is given: for Euler that is `scheduler.scale_model_input` of
    its sample. A flow-matching scheduler becomes a LinearFlowSchedule: t is its sigma, and the
    model is given t · num_train_timesteps. A scheduler's shift only says which times are drawn:
    draw them yourself and pass t. Class labels, text states and so on go into `model_kwargs`.

    Args:
        model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel, or
            another that takes (sample, timestep=...) and returns an object with `.sample`.
        scheduler: the scheduler.

    Returns:
        The score model. Where the model has twice as many output as input channels, the second
        half, its variance, is left out.

    Raises:
        TypeError: for a scheduler that is neither of the two.
        ValueError: for zero terminal SNR, or an unknown prediction type.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> table = [0.9, 0.5, 0.1]
        >>> config = SimpleNamespace(prediction_type="v_prediction")
        >>> scheduler = SimpleNamespace(alphas_cumprod=table, config=config)
        >>> from_diffusers(torch.nn.Identity(), scheduler).prediction
        'v_prediction'
    """
    output = _sample
    config = getattr(model, "config", None)
    inputs, outputs = (getattr(config, f"{end}_channels", None) for end in ("in", "out"))
    if inputs is not None and outputs == 2 * inputs:
        output = _half_of_sample
    options: dict[str, Any] = {"output": output, "call": _by_name}
    if "FlowMatch" in type(scheduler).__name__:
        factor = float(scheduler.config.num_train_timesteps)
        return ScoreModel(model, LinearFlowSchedule(), "flow_prediction", time=factor, **options)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise TypeError(
            "scheduler: expected one with alphas_cumprod, such as DDPMScheduler, or a "
            f"flow-matching one; got {describe(scheduler)}. Build a ScoreModel with the schedule "
            "it stands for."
        )
    schedule = table_schedule(table, "scheduler.alphas_cumprod")
    kind = getattr(scheduler.config, "prediction_type", None)
    prediction = predicted(kind, PREDICTIONS, "scheduler.config.prediction_type")
    return ScoreModel(model, schedule, prediction, **options)


def _by_name(model: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    return model(x, timestep=t, **kwargs)  # not every model takes it in the second place


def _sample(returned: Any) -> Tensor:
    return returned.sample


def _half_of_sample(returned: Any) -> Tensor:
    return first_half(returned.sample)
