"""Check, before training, that the derivatives of a network are correct.

The derivatives of a copy of the network are compared with finite differences of its values. A loss
itself cannot be checked this way: parts of a loss are detached, so its gradient differs from the
slope of its values.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses._checks import (
    DerivativeError,
    check_choice,
    check_model_kwargs,
    check_sample_batch,
    describe_value,
    error_message,
    fork_rng,
)
from hosm_losses._torch_internals import leave_inference_mode
from hosm_losses.derivatives import ENGINES, FOREIGN_CHECKPOINTS, Network, refusal
from hosm_losses.diagnostics.differences import NOT_FINITE, Agreement, Check, Smoothness
from hosm_losses.diagnostics.localize import (
    NO_DERIVATIVE,
    attempt,
    custom_functions,
    find_culprit,
    record_calls,
)
from hosm_losses.diagnostics.values import check_samples, check_values
from hosm_losses.model import (
    UNSHARD,
    BoundModel,
    ScoreModel,
    bind_model,
    check_model,
    check_time,
    map_tensors,
    refuse_wrapped,
)

GENERAL = (
    "Rewrite it with differentiable PyTorch operators, without .detach(), .data or "
    "torch.no_grad(), and check again."
)
FINITE = (
    "A root, a norm or a power has no derivative at zero: add a small number inside it. "
    "torch.where differentiates both branches: write torch.where(x > 0, x, 1.0).sqrt(). If "
    "all derivatives are finite on paper, try another `engine`."
)
ROUNDING = (
    "Derivatives disagree with finite differences in float32 but agree in a float64 copy: this "
    "is rounding error next to large values. Divide the data by their standard deviation."
)
SMOOTH = (
    "Derivatives miss the jumps, so a loss does not train them. Use a smooth activation, such as "
    "nn.SiLU, nn.GELU or nn.Softplus, and average pooling instead of max pooling; or train with "
    "order one, or two if only second derivatives jump."
)
CUSTOM = (
    "A custom autograd.Function needs a backward that can be differentiated again: write it with "
    "differentiable operators, or use the package's plain implementation."
)
FUSED = (
    "Fused attention kernels have no second derivative: switch to the package's plain attention, "
    "or to torch's scaled_dot_product_attention, which this library replaces."
)
# Keyed by a substring of a Function's lower-case name.
REMEDIES = {
    "checkpoint": (
        "This activation checkpoint recomputes outside the graph, which loses second "
        f"derivatives. Use hosm_losses.checkpoint in its place. {FOREIGN_CHECKPOINTS}"
    ),
    "attentionop": (
        "EDM's attention operator is right in reverse mode, with engine='auto' or 'reverse'. The "
        "engine 'taylor' needs torch.softmax in its place."
    ),
    "upfirdn2d": (
        "The compiled upfirdn2d drops higher derivatives: choose its reference implementation "
        "(impl='ref'), which is made of PyTorch operators."
    ),
    "flash": FUSED,
    "xformers": FUSED,
}


@dataclass(frozen=True)
class DerivativeReport:
    """The result of `check_derivatives`; printing it shows a verdict and any advice.

    Attributes:
        orders: the loss orders for which the network's values and derivatives are correct:
            (1, 2) or (1, 2, 3).
        engine: the engine used by a loss of the highest of these orders, "taylor" or "reverse".
        advice: sentences that point out skipped checks, slow derivatives and rounding errors.
    """

    orders: tuple[int, ...]
    engine: str
    advice: tuple[str, ...]

    def __str__(self) -> str:
        orders = ", ".join(map(str, self.orders[:-1]))
        verdict = f"ok: orders {orders} and {self.orders[-1]}, by the engine {self.engine!r}"
        return "\n".join([verdict, *self.advice])


def check_derivatives(
    model: ScoreModel,
    x0: Tensor,
    order: int = 3,
    *,
    t: Tensor | None = None,
    engine: str = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
) -> DerivativeReport:
    """If a derivative of the network is wrong, raise an error that names the module at fault.

    Otherwise, return a report that lists the orders checked, the engine and any advice.

    A loss cannot detect the following faults. The check looks for them in this order:

    - values that are not finite, or that differ between two calls with the same seed;
    - samples that affect each other, as in batch norm in training mode;
    - tensors in `model_kwargs` that are wrongly assumed to have one row for each sample (this test
      is skipped if the network draws random numbers);
    - operators whose first derivatives are discontinuous, such as ReLU; for order 3, also those
      whose second derivatives are, such as ELU. They are recognised by name;
    - derivatives that disagree with finite differences, whether taken with respect to x or to the
      parameters.

    The check accepts relative errors of up to 1 % in float32 and up to 1e-6 in float64. To find
    smaller faults, check a float64 copy. The page on derivatives lists the faults that the check
    cannot find.

    Your network, which is copied, and the random generators stay unchanged. If the network is not
    an nn.Module, only derivatives with respect to x are checked. Call `check_derivatives` once
    before training, with a small batch on a single device.

    Args:
        model: the score model, in the mode that training will use.
        x0: a small batch of data (B, *). Two samples are enough. With a single sample, the
            check cannot tell whether samples affect each other.
        order: the order of the loss that training will use, 2 or 3.
        t: times (B,), as in the losses. If None, the times are spread over the middle of the
            schedule.
        engine: the engine that training will use.
        model_kwargs: keyword arguments of the network.

    Returns:
        The report.

    Raises:
        DerivativeError: if the check finds a fault, or if a derivative cannot be computed.
        TypeError: if the network computes in half precision (check a float32 copy instead), or if
            the model or the network is wrapped, for example in DataParallel (use the wrapper's
            .module instead).
        ValueError: if an argument has an invalid shape, device, name or value.

    Example:
        >>> from hosm_losses import VPSchedule
        >>> model = ScoreModel(torch.nn.Bilinear(3, 1, 3), VPSchedule(), time=lambda t: t[:, None])
        >>> print(check_derivatives(model.double(), torch.randn(2, 3, dtype=torch.float64)))
        ok: orders 1, 2 and 3, by the engine 'taylor'
        >>> class Detaching(torch.nn.Module):
        ...     def forward(self, x, t):
        ...         return x * x.detach()
        >>> try:
        ...     check_derivatives(ScoreModel(Detaching(), VPSchedule()), torch.randn(2, 3))
        ... except DerivativeError as error:
        ...     print(str(error)[:54])
        network: expected derivatives that agree with differen
    """
    check_model(model)
    if order not in (2, 3):
        raise ValueError(error_message("order", "2 or 3", order))
    check_choice("engine", engine, ENGINES)
    check_sample_batch("x0", x0)
    refuse_wrapped(model.network)
    times = _spread_times(model, x0) if t is None else check_time(model, x0, t)
    kwargs = check_model_kwargs(model_kwargs)
    device = x0.device
    with (
        fork_rng(device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        copied, x = _copy_model(model), leave_inference_mode(x0.detach())
        kwargs = map_tensors(kwargs, lambda tensor: tensor.detach().clone())
        bound = bind_model(copied, len(times), kwargs, times)
        precision = check_values(bound, x)
        check_samples(bound, x, precision)
        checks = [kind(order, engine, precision) for kind in (Smoothness, Agreement)]
        rounded = [_check(check, bound, x) for check in checks]
        advice = [ROUNDING] if any(rounded) else []
    reason = refusal(copied.network, order) if engine == "auto" else None
    if engine == "auto":
        engine = "taylor" if reason is None else "reverse"
    if reason is not None:
        advice.append(
            f"The engine 'taylor' cannot differentiate it ({reason.rstrip('.')}): reverse mode, "
            "which is slower, takes its place."
        )
    if len(x) < 2:
        advice.append("A single sample cannot reveal effects between samples: check two.")
    if not isinstance(copied._innermost, nn.Module):
        advice.append("Parameter gradients were not checked: the network is not an nn.Module.")
    if precision == torch.float32:
        advice.append("A float64 copy shows faults below 1 %: copy.deepcopy(model).double().")
    return DerivativeReport(tuple(range(1, order + 1)), engine, tuple(advice))


def _copy_model(model: ScoreModel) -> ScoreModel:
    try:
        # copy.deepcopy would refuse a function, because it may refer to modules.
        copied = model._deep_copy({})
    except Exception as error:
        sharded = any(type(p).__name__ == "DTensor" for p in model.parameters())
        remedy = UNSHARD if sharded else "Check it in a fresh process before its first call."
        expected = "a network that copy.deepcopy can copy, so that yours stays unchanged"
        got = f"{describe_value(model.network)}, which says: {str(error).splitlines()[0]}"
        text = error_message("network", expected, model.network, remedy, got=got)
        raise TypeError(text) from error
    if not isinstance(copied.network, nn.Module) and copied.network is model.network:
        # A function is not copied, but anything cached about this function must not outlive the
        # check.
        copied.network = functools.partial(copied.network)
    return copied


def _check(check: Check, bound: BoundModel, x: Tensor) -> bool:
    """If the check finds a fault, raise an error that names the innermost faulty module.

    Return whether there is a fault that a float64 copy does not have, so that it is rounding.
    """
    # As in the losses, only the network is differentiated, not the term in x of a prediction.
    field: Network = bound
    fault = attempt(check, field, x)
    # In float32, a faulty Function may affect the network's output too little to be noticed.
    opaque = fault is None and isinstance(check, Agreement) and check.precision == torch.float32
    if fault is None and not (opaque and custom_functions(field, x)):
        return False
    where, primitives = "its own forward", bound.primitives == "all"
    missing = fault is None or fault.startswith(NO_DERIVATIVE)
    if not missing and _right_in_float64(check, bound, x):
        return True
    with_primitives: Network = replace(bound, primitives="all")
    culprit = find_culprit(check, record_calls(bound, x), primitives, opaque)
    if culprit is not None:
        field, fault = culprit
        where, x, with_primitives = field.call.where, field.x, replace(field, primitives=True)
    elif opaque:
        return False
    if isinstance(check, Smoothness):
        expected, advice = f"a smooth function of x, for order {check.order}", SMOOTH
    else:
        expected = "derivatives that agree with differences"
        if not primitives and attempt(check, with_primitives, x) is None:
            advice = "Leave primitives=True in ScoreModel, which replaces such operators."
        elif fault is not None and fault.endswith(NOT_FINITE):
            advice = FINITE
        else:
            advice = _remedy(custom_functions(field, x))
    got = f"{fault}, in {where}"
    raise DerivativeError(error_message("network", expected, field, advice, got=got))


def _right_in_float64(check: Check, bound: BoundModel, x: Tensor) -> bool:
    """Return True only if a float64 copy of a float32 network was checked and passed."""
    if check.precision != torch.float32 or not isinstance(check, Agreement):
        return False
    if custom_functions(bound, x):  # which may have other kernels in float64
        return False

    def wide(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    model = bound.model._deep_copy({}).double()
    kwargs = map_tensors(bound.kwargs, wide)
    copied = replace(bound, model=model, t=wide(bound.t), kwargs=kwargs)
    return attempt(replace(check, precision=torch.float64), copied, wide(x)) is None


def _remedy(functions: list[str]) -> str:
    if not functions:
        return GENERAL
    remedies = dict.fromkeys(  # without repetition
        next((remedy for part, remedy in REMEDIES.items() if part in name.lower()), CUSTOM)
        for name in functions
    )
    return f"In its graph: {', '.join(functions)}. {' '.join(remedies)} Otherwise: {GENERAL}"


def _spread_times(model: ScoreModel, x0: Tensor) -> Tensor:
    """Return times (B,) that are evenly spaced in log σ̂, away from both ends of the schedule.

    The times are integers if the schedule is a table.
    """
    low, high = model.schedule.log_sigma_hat_range
    place = (torch.arange(len(x0), dtype=x0.dtype, device=x0.device) + 1) / (len(x0) + 1)
    return model.schedule._training_time(low + (high - low) * (0.3 + 0.5 * place))
