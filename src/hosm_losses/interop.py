"""Build ScoreModels from the objects of other projects, without importing those projects.

Each function reads the attributes that it needs. If an attribute is missing, an error names it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hosm_losses._checks import describe_value, error_message
from hosm_losses.model import Prediction, ScoreModel
from hosm_losses.schedules import (
    DiscreteSchedule,
    EDMSchedule,
    LinearFlowSchedule,
    Schedule,
    SubVPSchedule,
    VESchedule,
    VPSchedule,
    step_labels,
)

# The prediction types of other projects, with their names in this package.
OBJECTIVES: dict[str, Prediction] = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}
PREDICTION_TYPES: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v",
}
MEAN_TYPES: dict[str, Prediction] = {"EPSILON": "epsilon", "START_X": "x0"}
ZERO = (0.0, 2.0**-24)  # diffusers writes 2⁻²⁴ in place of 0
BUILD = "For another object, build a ScoreModel with its schedule and prediction."
# Flow-matching models of diffusers that multiply t by the number of timesteps themselves.
TAKE_FRACTIONS = ("Flux", "Chroma", "QwenImage", "AuraFlow", "LongCatImage", "OvisImage", "Krea2")
TAKE_FRACTIONS += ("BriaFibo2", "PRX")
# Models whose pipelines negate the velocity or reverse the time.
REVERSED = ("Lumina", "ZImage", "NucleusMoE", "HiDream", "Ideogram4")
# This model computes in its timestep's dtype. UNets may index a table with integer timesteps.
TAKES_ITS_DTYPE_FROM_T = "HunyuanDiT"
JUMPS = ("LCM", "TCD", "DMD")  # schedulers of distilled networks
PLAIN_FLOW = "FlowMatchEulerDiscreteScheduler(scheduler.config.num_train_timesteps)"
# Not from_config, which replaces betas that are defaults with defaults of its own.
PLAIN_TABLE = (
    "DDPMScheduler(trained_betas=scheduler.betas.tolist(), "
    "prediction_type=scheduler.config.prediction_type)"
)
WRAPPED = ("_orig_mod", "module", "base_model", "model")  # in torch.compile, DDP and PEFT
FLOW = "a model that takes the noise level and predicts noise minus data"
WRITE_FLOW = "Write ScoreModel(model, LinearFlowSchedule(), 'velocity', ...)."
LABELS = "A network trained on sde.N discrete steps takes step numbers as labels. Write "
DISCRETE_VP = "ScoreModel(model, DiscreteSchedule(sde.alphas_cumprod)), whose t is the label."
DISCRETE_VE = (
    "ScoreModel(model, VESchedule(sigma_min=sde.sigma_min, sigma_max=sde.sigma_max), 'score', "
    "time=lambda t: ((1 - t) * (sde.N - 1)).round().long()), which takes the nearest step."
)


def from_diffusers(model: nn.Module, scheduler: Any) -> ScoreModel:
    """Return a ScoreModel built from a diffusers model and its scheduler.

    A scheduler with a table (DDPM, DDIM, PNDM, Euler and others with `alphas_cumprod`) becomes a
    DiscreteSchedule, whose t is the timestep, an integer in training and possibly a fraction in a
    likelihood. A HunyuanDiT receives t in the dtype of x. With timestep_type="continuous" and
    prediction_type="v_prediction", the model receives ¼ log(σ/α) as its timestep. The model
    receives x unscaled: with an Euler scheduler, x is the sample after
    `scheduler.scale_model_input`.

    A flow-matching scheduler, or one such as UniPC with `use_flow_sigmas` and "flow_prediction",
    becomes a LinearFlowSchedule, whose t is the scheduler's sigma. The model receives
    t · num_train_timesteps; Flux, QwenImage, AuraFlow and others receive t itself, as in their
    pipelines. A scheduler's shift is ignored, because it affects only which times are drawn. To
    apply it, pass shifted times as t.

    Pass class labels, text embeddings and other inputs in `model_kwargs`.

    Args:
        model: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel, or
            another model that accepts (sample, timestep=...) and returns an object with `.sample`.
            If the model has twice as many output channels as input channels, the second half of
            the output is a variance and is dropped.
        scheduler: a scheduler with a table, or a flow-matching scheduler.

    Raises:
        TypeError: if the model is not an nn.Module (for example, a pipeline), or if the scheduler
            is of neither kind.
        ValueError: if the table has zero terminal SNR, if the prediction type is unknown, if a
            flow runs in reverse (`invert_sigmas`, Lumina2, ZImage), or if the scheduler is for
            networks distilled to jump to other noise levels (LCM, TCD, DMD) or has several stages
            (Helios).

    Example:
        A pipeline contains both the model and the scheduler::

            pipeline = DDPMPipeline.from_pretrained("google/ddpm-cifar10-32")
            model = from_diffusers(pipeline.unet, pipeline.scheduler)
            loss = first_order_dsm(model, images, weighting="native")
    """
    if not isinstance(model, nn.Module):  # perhaps a pipeline
        expected = "an nn.Module, such as pipeline.unet or pipeline.transformer"
        raise TypeError(error_message("model", expected, model))
    of_model = getattr(model, "config", None)
    inputs, outputs = (getattr(of_model, f"{end}_channels", None) for end in ("in", "out"))
    learned = inputs is not None and outputs == 2 * inputs
    learned |= bool(getattr(of_model, "learn_sigma", False))  # if no channels are given
    names = _class_names(model)
    like_x = any(name.startswith(TAKES_ITS_DTYPE_FROM_T) for name in names)
    options = dict[str, Any](
        output=_half_of_sample if learned else _sample,
        call=_by_name_like_x if like_x else _by_name,
    )
    config = getattr(scheduler, "config", None)
    kind = getattr(config, "prediction_type", None)
    # Schedulers such as UniPC can ignore their table, and sample along alpha = 1 - sigma.
    flow = getattr(config, "use_flow_sigmas", False) and kind == "flow_prediction"
    flow = flow or "FlowMatch" in type(scheduler).__name__
    _refuse_jumps(scheduler, config, PLAIN_FLOW if flow else PLAIN_TABLE)
    if flow:
        reversed_by = [name for name in names if name.startswith(REVERSED)]
        if getattr(config, "invert_sigmas", False):
            reversed_by.insert(0, "invert_sigmas=True")
        if reversed_by:
            got = f"{reversed_by[0]}, which reverses the time or the sign"
            raise ValueError(error_message("model", FLOW, model, WRITE_FLOW, got=got))
        fractions = any(name.startswith(TAKE_FRACTIONS) for name in names)
        factor = 1.0 if fractions else float(scheduler.config.num_train_timesteps)
        return ScoreModel(model, LinearFlowSchedule(), "velocity", time=factor, **options)
    expected = "a scheduler with {}, such as DDPMScheduler, or a flow-matching scheduler"
    check_has("scheduler", scheduler, expected, "alphas_cumprod")
    prediction = our_prediction(kind, PREDICTION_TYPES, "scheduler.config.prediction_type")
    schedule = table_schedule(scheduler, "scheduler")
    if prediction == "v" and getattr(config, "timestep_type", None) == "continuous":
        options["time"] = partial(_quarter_of_log_sigma_hat, schedule)
    return ScoreModel(model, schedule, prediction, **options)


def _refuse_jumps(scheduler: Any, config: Any, plain: str) -> None:
    """Raise ValueError if a scheduler is for networks without one path from data to noise."""
    name, stages = type(scheduler).__name__, getattr(config, "stages", 1)
    if stages > 1:
        got = f"{name}, whose {stages} stages are flows of their own"
    elif any(part in name for part in JUMPS):
        got = f"{name}, whose networks are distilled to jump to other noise levels"
    else:
        return
    expected = "a scheduler for networks that predict a score or the velocity of a single flow"
    remedy = f"If your network predicts one, pass {plain}."
    raise ValueError(error_message("scheduler", expected, scheduler, remedy, got=got))


def _class_names(model: nn.Module) -> list[str]:
    """Return the class and base-class names of a module and of the modules that it wraps."""
    names, modules = list[str](), [model]
    for module in modules:  # grows during the loop
        names += [kind.__name__ for kind in type(module).__mro__]
        inside = (module._modules.get(name) for name in WRAPPED)
        modules += [wrapped for wrapped in inside if wrapped is not None]
    return names


def _quarter_of_log_sigma_hat(schedule: DiscreteSchedule, t: Tensor) -> Tensor:
    return schedule.log_sigma_hat(t) / 4


def _by_name(model: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    return model(x, timestep=t, **kwargs)  # not always the second argument


def _by_name_like_x(model: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    return model(x, timestep=t.to(x.dtype), **kwargs)


def _sample(returned: Any) -> Tensor:
    return returned[0] if isinstance(returned, tuple) else returned.sample  # return_dict=False


def _half_of_sample(returned: Any) -> Tensor:
    return first_half(_sample(returned))


def from_denoising_diffusion(diffusion: Any) -> ScoreModel:
    """Return a ScoreModel with the network, table and objective of a GaussianDiffusion.

    t is an index into the table. x has to be in the range that the network expects: pass
    `diffusion.normalize(images)` to the losses and to `ode_nll`. With the default weighting, the
    first term of this package's losses equals the project's own loss. To reproduce
    min_snr_loss_weight, pass the weighting min(SNR, min_snr_gamma)/SNR, whatever the objective is.
    The ScoreModel uses `diffusion.model` itself, so the project's Trainer, optimizer and EMA work
    on the same parameters. In training mode, a network from the project's
    `classifier_free_guidance` drops class labels at random, as in the project's loss; after
    `.eval()`, it drops none. The variance that a LearnedGaussianDiffusion predicts is not used.

    Raises:
        TypeError: if `diffusion` is not a GaussianDiffusion.
        ValueError: if the network is self-conditioned, the objective is unknown, or the table has
            zero terminal SNR.

    Example:
        Pass the project's objects unchanged::

            diffusion = GaussianDiffusion(Unet(dim=64), image_size=32)
            model = from_denoising_diffusion(diffusion)
            loss = first_order_dsm(model, diffusion.normalize(images))
    """
    names = ("model", "objective", "alphas_cumprod")
    check_has("diffusion", diffusion, "a GaussianDiffusion with {}", *names)
    if getattr(diffusion, "self_condition", False):
        remedy = (
            "Its prediction depends on an earlier prediction, so it has no score that could be "
            "matched or integrated. Build the Unet with self_condition=False."
        )
        expected, got = "a network without self-conditioning", "self_condition=True"
        raise ValueError(error_message("diffusion", expected, diffusion, remedy, got=got))
    schedule = table_schedule(diffusion, "diffusion")
    prediction = our_prediction(diffusion.objective, OBJECTIVES, "diffusion.objective")
    network = diffusion.model
    channels, outputs = (getattr(network, name, None) for name in ("channels", "out_dim"))
    learned = channels is not None and outputs == 2 * channels
    output = first_half if learned else None
    call = _call_dropping_classes if hasattr(network, "cond_drop_prob") else None
    return ScoreModel(network, schedule, prediction, output=output, call=call)


def _call_dropping_classes(network: Any, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    drop_none = {} if getattr(network, "training", True) else {"cond_drop_prob": 0.0}
    return network(x, t, **drop_none | kwargs)


def from_edm(net: Any) -> ScoreModel:
    """Return a ScoreModel for an EDM denoiser D(x, σ, class_labels); t is σ.

    σ ranges from the network's sigma_min to its sigma_max, with both limits clipped to
    [0.002, 80], the range of EDM's sampler. Pass one-hot labels in `model_kwargs` as class_labels.

    The first term of the following objective equals the loss of EDM's trainer if that loss is
    averaged over elements:

        ThirdOrderDSM(from_edm(net), weighting=EDMWeighting(net.sigma_data))

    Raises:
        TypeError: if the network lacks sigma_min or sigma_max.

    Example:
        >>> from torch import nn
        >>> net = nn.Identity()
        >>> net.sigma_min, net.sigma_max = 0.0, float("inf")
        >>> from_edm(net).schedule.t_max
        80.0
    """
    expected = "an EDM network with {}, such as EDMPrecond"
    remedy = "For another denoiser D(x, sigma), write ScoreModel(net, EDMSchedule(), 'x0')."
    check_has("net", net, expected, "sigma_min", "sigma_max", remedy=remedy)
    low = max(float(net.sigma_min), EDMSchedule.t_min)
    high = min(float(net.sigma_max), EDMSchedule.t_max)
    return ScoreModel(net, EDMSchedule(t_min=low, t_max=high), "x0")


def from_flow_matching(
    network: Callable[..., Any],
    schedule: Schedule | None = None,
    *,
    data_at: Literal[0, 1],
    time: float = 1.0,
    time_first: bool = False,
) -> ScoreModel:
    """Return a ScoreModel for a velocity network from flow matching or rectified flow.

    The network receives `time` · s as its time and predicts the velocity dx/ds. In this package,
    clean data are at t = 0. If `data_at` is 0, s is t. If `data_at` is 1, s is 1 - t and the
    velocity is negated.

    Args:
        network: `network(x, t, **kwargs)`, or `network(t, x, **kwargs)` if `time_first` is True.
        schedule: the path, with time running from the data to the noise. None means the straight
            path, `LinearFlowSchedule()`.
        data_at: the value of s at which the data are clean. Pass 1 for a network from torchcfm,
            flow_matching or RectifiedFlow, and 0 for a network that predicts noise minus data, as
            Stable Diffusion 3 does.
        time: the factor by which s is multiplied to obtain the network's time, such as 999 for
            RectifiedFlow. The velocity is not rescaled.
        time_first: whether the time is the network's first argument, before x, as in torchcfm.

    Raises:
        ValueError: if `data_at` is neither 0 nor 1.

    Example:
        >>> model = from_flow_matching(lambda t, x: -x, data_at=1, time_first=True)
        >>> model.denoise(torch.ones(1, 2), torch.tensor([0.5]))
        tensor([[0.5000, 0.5000]])
    """
    if data_at not in (0, 1):
        expected = "0 or 1, the network's time for clean data"
        raise ValueError(error_message("data_at", expected, data_at))
    return ScoreModel(
        network,
        LinearFlowSchedule() if schedule is None else schedule,
        "velocity",
        time=partial(_time_from_noise, time) if data_at == 1 else time,
        output=torch.neg if data_at == 1 else None,
        call=_by_time_first if time_first else None,
    )


def _time_from_noise(factor: float, t: Tensor) -> Tensor:
    return factor * (1 - t)


def _by_time_first(network: Callable[..., Any], x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    return network(t, x, **kwargs)


def from_guided_diffusion(model: nn.Module, diffusion: Any) -> ScoreModel:
    """Return a ScoreModel for a model and its GaussianDiffusion or SpacedDiffusion.

    t is an index into the diffusion's own table. As in the project, the model receives the number
    of the step in the original table, before respacing; between two indices, the fractional number
    at the noise level of t. If `rescale_timesteps` is set, this number is multiplied by 1000 and
    divided by the original number of steps. Pass class labels in `model_kwargs` as y. If the model
    learns its variance, only the first half of its output channels is used.

    For orders two and three, replace the project's checkpoint function, which loses second
    derivatives and which attention blocks call even if `use_checkpoint` is False, with one that
    calls `hosm_losses.checkpoint`.

    Raises:
        TypeError: if `diffusion` is neither a GaussianDiffusion nor a SpacedDiffusion.
        ValueError: if the network predicts the previous x, or the table has zero terminal SNR.

    Example:
        The project's own function returns both objects::

            unet, diffusion = create_model_and_diffusion(**model_and_diffusion_defaults())
            model = from_guided_diffusion(unet, diffusion)
            loss = first_order_dsm(model, images, model_kwargs={"y": classes})
    """
    names = ("alphas_cumprod", "model_mean_type", "model_var_type")
    check_has("diffusion", diffusion, "a GaussianDiffusion with {}", *names)
    schedule = table_schedule(diffusion, "diffusion")
    kind = getattr(diffusion.model_mean_type, "name", None)
    prediction = our_prediction(kind, MEAN_TYPES, "diffusion.model_mean_type")
    learned = getattr(diffusion.model_var_type, "name", None) in ("LEARNED", "LEARNED_RANGE")
    output = first_half if learned else None
    steps = len(schedule.alphas_cumprod)
    indices = getattr(diffusion, "timestep_map", range(steps))
    rescaled = 1000.0 / getattr(diffusion, "original_num_steps", steps)
    factor = rescaled if getattr(diffusion, "rescale_timesteps", False) else 1.0
    time = step_labels(schedule, indices, factor)
    return ScoreModel(model, schedule, prediction, time=time, output=output)


def from_score_sde(model: nn.Module, sde: Any, *, continuous: bool = True) -> ScoreModel:
    """Return a ScoreModel for a network trained in continuous time; t runs from 1e-5 to 1.

    With a VPSDE or subVPSDE, the network predicts the noise and receives 999 t as its time. With a
    VESDE, the network predicts the score and receives σ(t). The project's `create_model` returns a
    DataParallel. For orders two and three, pass the network inside it, `model.module`.

    Args:
        model: the network, called as model(x, labels).
        sde: a VPSDE, subVPSDE or VESDE, recognised by its attributes.
        continuous: the value of `config.training.continuous`, also checked in the configuration
            that a network such as NCSN++ stores. Except with a subVPSDE, a network trained with
            continuous=False expects step numbers; the error says what to write instead.

    Raises:
        TypeError: if the SDE's attributes or its `marginal_prob` match none of these SDEs.
        ValueError: if the network was trained on discrete steps.

    Example:
        Pass the network without its DataParallel wrapper, and the SDE used in training::

            sde = sde_lib.VESDE(sigma_min=0.01, sigma_max=50, N=1000)
            model = from_score_sde(score_model.module, sde, continuous=True)
            loss = first_order_dsm(model, images)
    """
    if hasattr(sde, "sigma_min") and hasattr(sde, "sigma_max"):
        _refuse_discrete(model, continuous, DISCRETE_VE)
        exploding = VESchedule(sigma_min=float(sde.sigma_min), sigma_max=float(sde.sigma_max))
        return ScoreModel(model, _check_marginal(exploding, sde), "score", time=exploding.sigma)
    expected = "a VPSDE or subVPSDE with {}, or a VESDE with sigma_min and sigma_max"
    check_has("sde", sde, expected, "beta_0", "beta_1")
    kind = SubVPSchedule
    # VPSDE has DDPM's discrete betas besides the continuous ones; subVPSDE does not.
    if hasattr(sde, "discrete_betas"):
        _refuse_discrete(model, continuous, DISCRETE_VP)
        kind = VPSchedule
    schedule = kind(beta_min=float(sde.beta_0), beta_max=float(sde.beta_1))
    return ScoreModel(model, _check_marginal(schedule, sde), "epsilon", time=999.0)


def _refuse_discrete(model: nn.Module, continuous: bool, advice: str) -> None:
    config = getattr(getattr(model, "module", model), "config", None)
    configured = getattr(getattr(config, "training", None), "continuous", True)
    if not (continuous and configured):
        got = "False in model.config.training" if continuous else "False"
        expected = "True, for a network trained in continuous time"
        raise ValueError(error_message("continuous", expected, False, LABELS + advice, got=got))


def _check_marginal(schedule: Schedule, sde: Any) -> Schedule:
    if marginal := getattr(sde, "marginal_prob", None):
        t = torch.tensor([0.3], dtype=torch.float64, device="cpu")
        # One number at one time is enough, since the data may have any dimension.
        alpha_sigma = torch.cat([part.flatten().to(t) for part in marginal(torch.ones_like(t), t)])
        if not torch.allclose(alpha_sigma, torch.cat(schedule(t)), rtol=1e-3):
            expected = f"the marginal_prob(x, t) of {schedule}"
            got = f"{describe_value(sde)} with another marginal_prob"
            raise TypeError(error_message("sde", expected, sde, BUILD, got=got))
    return schedule


def check_has(
    name: str, value: object, expected: str, *attributes: str, remedy: str = BUILD
) -> None:
    """Raise TypeError if an attribute is missing.

    In the error, the attribute's name replaces the {} in `expected`.
    """
    for attribute in attributes:
        if getattr(value, attribute, None) is None:
            raise TypeError(error_message(name, expected.format(attribute), value, remedy))


def table_schedule(owner: Any, name: str) -> DiscreteSchedule:
    """Return the schedule for another project's table ᾱ.

    Raise ValueError if ᾱ ends at 0.
    """
    table = torch.as_tensor(owner.alphas_cumprod, dtype=torch.float64, device="cpu").detach()
    zero = table.ndim == 1 and len(table) > 0 and float(table[-1]) in ZERO
    if (sigma := getattr(owner, "sqrt_one_minus_alphas_cumprod", None)) is not None:
        # If both are in float32, √(1 − ᾱ) keeps digits that 1 − ᾱ loses at the first steps.
        table = table / (table + torch.as_tensor(sigma).detach().to(table).square())
    if zero:
        where = f"{name}.alphas_cumprod"
        got = f"one that ends at {float(owner.alphas_cumprod[-1]):g} (zero terminal SNR)"
        remedy = (
            "At its end, sigma/alpha is infinite. Leave out the last entry and wrap the network "
            f"yourself: ScoreModel(network, DiscreteSchedule({where}[:-1]), prediction=..., ...)."
        )
        raise ValueError(error_message(where, "a table that ends above 0", table, remedy, got=got))
    return DiscreteSchedule(table)


def our_prediction(value: object, names: Mapping[str, Prediction], where: str) -> Prediction:
    """Return this package's name for another project's prediction type.

    `where` names the attribute that holds the prediction type, for the error message.
    """
    if isinstance(value, str) and value in names:
        return names[value]
    remedy = "Build a ScoreModel with an equivalent prediction, or convert the network's output."
    raise ValueError(error_message(where, f"one of {', '.join(map(repr, names))}", value, remedy))


def first_half(returned: Tensor) -> Tensor:
    """Return the first half of the channels: the prediction, without the variance."""
    return returned.chunk(2, 1)[0]
