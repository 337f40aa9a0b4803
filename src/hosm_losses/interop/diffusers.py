"""Models and schedulers of diffusers."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from hosm_losses._checks import check_number, describe
from hosm_losses.interop.foreign import check_has, first_half, predicted, table_schedule
from hosm_losses.model import Prediction, ScoreModel
from hosm_losses.schedules import DiscreteSchedule, LinearFlowSchedule

# The project's names of what its networks predict, and ours.
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
}
# Models of diffusers under flow matching that multiply by the number of timesteps themselves.
TAKE_FRACTIONS = ("Flux", "Chroma", "QwenImage", "AuraFlow", "LongCatImage", "OvisImage", "Krea2")
TAKE_FRACTIONS += ("BriaFibo2", "PRX")
# And those whose pipelines turn the sign of the velocity, or the time.
REVERSED = ("Lumina", "ZImage", "NucleusMoE", "HiDream", "Ideogram4")
WRAPPED = ("_orig_mod", "module", "base_model", "model")  # in torch.compile, DDP and PEFT
TURNED = "model: expected one that is given the noise level and predicts noise less data; got {}, "
TURNED += "which turns one. Write ScoreModel(model, LinearFlowSchedule(), 'flow_prediction', ...)."


def from_diffusers(model: nn.Module, scheduler: Any) -> ScoreModel:
    """Return the ScoreModel of a diffusers model, with the scheduler's table and prediction type.

    Schedulers with a table (DDPM, DDIM, PNDM, Euler and others with `alphas_cumprod`) become a
    DiscreteSchedule: t is the timestep, integer in training, between two of them in the
    likelihood. x is what the model is given: for Euler that is `scheduler.scale_model_input` of
    its sample. A flow-matching scheduler, or one with `use_flow_sigmas` and "flow_prediction" as
    UniPC may be, becomes a LinearFlowSchedule: t is its sigma, and the
    model is given t · num_train_timesteps; Flux, QwenImage, AuraFlow and others are given t, as by
    their pipelines. A scheduler's shift only says which times are drawn: draw them yourself and
    pass t. With timestep_type="continuous" and "v_prediction" the model is given ¼ log(σ/α). Class
    labels, text states and so on go into `model_kwargs`.

    Args:
        model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel, or
            another that takes (sample, timestep=...) and returns an object with `.sample`. If it
            has twice as many output as input channels, the second half, its variance, is left out.
        scheduler: one with a table, or for flow matching.

    Raises:
        TypeError: for a pipeline, a scheduler that is neither of the two, or under flow matching a
            model that is no nn.Module.
        ValueError: for zero terminal SNR, an unknown prediction type, one other than
            "flow_prediction" with `use_flow_sigmas`, or a model as Lumina2 and ZImage, which are
            given 1 - t and predict data less noise.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(prediction_type="v_prediction")
        >>> scheduler = SimpleNamespace(alphas_cumprod=[0.9, 0.5, 0.1], config=config)
        >>> from_diffusers(nn.Identity(), scheduler).prediction
        'v_prediction'
    """
    if not isinstance(model, nn.Module) and hasattr(model, "scheduler"):  # a pipeline
        expected = "model: expected the network, such as pipeline.unet or pipeline.transformer"
        raise TypeError(f"{expected}; got {describe(model)}.")
    own = getattr(model, "config", None)
    inputs, outputs = (getattr(own, f"{end}_channels", None) for end in ("in", "out"))
    learned = inputs is not None and outputs == 2 * inputs
    options = dict[str, Any](output=_half_of_sample if learned else _sample, call=_by_name)
    config = getattr(scheduler, "config", None)
    if "FlowMatch" in type(scheduler).__name__ or _samples_a_flow(scheduler, config):
        if not isinstance(model, nn.Module):
            expected = "model: expected an nn.Module, whose class says which time it is given"
            raise TypeError(f"{expected}; got {describe(model)}.")
        where = "scheduler.config.num_train_timesteps"
        factor = getattr(config, "num_train_timesteps", None)
        factor = check_number(where, factor, "a number above 0", above=0)
        turned, names = getattr(config, "invert_sigmas", False), _class_names(model)
        for name in ["invert_sigmas=True"] * turned + [n for n in names if n.startswith(REVERSED)]:
            raise ValueError(TURNED.format(name))
        factor = 1.0 if any(each.startswith(TAKE_FRACTIONS) for each in names) else factor
        return ScoreModel(model, LinearFlowSchedule(), "flow_prediction", time=factor, **options)
    expected = "scheduler: expected one with {}, such as DDPMScheduler, or a flow-matching one"
    check_has(scheduler, expected, "alphas_cumprod")
    kind = getattr(config, "prediction_type", None)
    prediction = predicted(kind, PREDICTIONS, "scheduler.config.prediction_type")
    schedule = table_schedule(scheduler, "scheduler")
    if prediction == "v_prediction" and getattr(config, "timestep_type", None) == "continuous":
        options["time"] = partial(_quarter_of_log_sigma_hat, schedule)
    return ScoreModel(model, schedule, prediction, **options)


def _class_names(model: nn.Module) -> list[str]:
    """The names of the classes of a module, and of one in a wrapper."""
    names, modules = list[str](), [model]
    for module in modules:  # which grows
        names += [kind.__name__ for kind in type(module).__mro__]
        inside = (module._modules.get(name) for name in WRAPPED)
        modules += [each for each in inside if each is not None]
    return names


def _samples_a_flow(scheduler: Any, config: Any) -> bool:
    """Whether a scheduler with a table goes along alpha = 1 - sigma, and not along the table."""
    if not (getattr(config, "use_flow_sigmas", False) and hasattr(scheduler, "alphas_cumprod")):
        return False
    if (kind := getattr(config, "prediction_type", None)) == "flow_prediction":
        return True
    raise ValueError(
        "scheduler.config: expected prediction_type='flow_prediction' with use_flow_sigmas=True; "
        f"got {kind!r}. It samples along alpha = 1 - sigma, not by its table "
        "alphas_cumprod. Set use_flow_sigmas=False for a model trained with the table, or write "
        "ScoreModel(model, LinearFlowSchedule(), ...) for one trained with the flow."
    )


def _quarter_of_log_sigma_hat(schedule: DiscreteSchedule, t: Tensor) -> Tensor:
    return schedule.log_sigma_hat(t) / 4


def _by_name(model: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    return model(x, timestep=t, **kwargs)  # not every model takes it in the second place


def _sample(returned: Any) -> Tensor:
    return returned[0] if isinstance(returned, tuple) else returned.sample  # return_dict=False


def _half_of_sample(returned: Any) -> Tensor:
    return first_half(_sample(returned))
