r"""A start-up check that the derivatives of a network are right.

What:
    A network may contain operators whose higher derivatives are wrong in silence: a custom
    autograd.Function whose backward drops the graph, a kernel whose forward derivative drops the
    parameters, code that detaches, kinks. A copy of it is compared with differences of its values,
    as `differences` says. Never the loss, whose detached parts make its gradient
    another number than its slope. Where the network disagrees, every module is compared alone,
    with the input it got, and the innermost that disagrees is named.
"""

__all__ = ["check_derivatives"]

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses._checks import (
    DerivativeError,
    check_choice,
    check_model_kwargs,
    check_sample_batch,
    describe,
)
from hosm_losses._torch_internals import normal
from hosm_losses.derivatives import ENGINES, Field
from hosm_losses.diagnostics.differences import STEP, TOLERANCE, Agreement, Check
from hosm_losses.diagnostics.kinks import Smoothness
from hosm_losses.diagnostics.module_fields import (
    attempt,
    culprit,
    functions_at_fault,
    parameters_of,
)
from hosm_losses.diagnostics.remedies import SMOOTH, remedy
from hosm_losses.diagnostics.samples import check_samples
from hosm_losses.diagnostics.values import check_values, evaluate
from hosm_losses.model import (
    NetworkField,
    NoiseField,
    ScoreModel,
    check_model,
    check_time,
    noise_field,
    refuse_wrapped,
)


def check_derivatives(
    model: ScoreModel,
    x0: Tensor,
    order: int = 3,
    *,
    t: Tensor | None = None,
    derivative: str = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Raise an error that names the module at fault if a derivative of the network is wrong.

    It looks for what a loss cannot notice, in this order:

    - values that are not finite, or differ between two calls with the same seed;
    - samples that see each other: one is kept, the others are replaced, and its output has to stay
      (batch norm in training, a mean over the batch);
    - tensors of `model_kwargs` that were taken for the samples' and are not: the batch is
      permuted, and the outputs have to follow (not where the network draws random numbers, as for
      dropout, for these go by place);
    - jumps: for order 3 a first derivative that jumps, as in a network of ReLUs, whose second
      derivatives are zero; for either order values that jump. A network that is linear in x
      passes, and so do jumps that make up less than 1 % of the change over a few times the size of
      x;
    - derivatives, in x and in the parameters, that disagree with differences.

    Differences are as good as the precision in which the network works, which need not be the
    dtype of x0: it is the least precise dtype of what depends on x or on a trained parameter. A
    network that casts float64 data to float32 is checked to 1 %, one in float64 to 1e-6. One that
    works in half precision anywhere is refused: check a float32 copy of it. TF32 on an accelerator
    is not seen: turn it off.

    It works on a copy of the network, so that parameters, buffers, gradients and training mode
    are as they were. Random numbers are forked and restored. A network that is no nn.Module has no
    parameters to be seen: its derivatives in x alone are checked. Call it once before training,
    on a small batch, on one device.

    Args:
        model: the score model, in the mode it will be trained in.
        x0: a small batch of data (B, *); two samples are enough, and one sees no others.
        order: the order it will be trained with, 2 or 3.
        t: times (B,) as the losses take them; spread over the schedule if None.
        derivative: the engine it will be trained with.
        model_kwargs: keyword arguments of the network.

    Raises:
        DerivativeError: for what is listed above, or where a derivative cannot be taken at all.
        TypeError: for an argument of a wrong type, a dtype with which the network's own call
            fails, half precision, or a wrapped network (DataParallel: give model.module).
        ValueError: for a wrong value, shape or name.

    Example:
        >>> from hosm_losses import VPSchedule
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
    if not isinstance(order, Integral) or order not in (2, 3):
        raise ValueError(f"order: expected 2 or 3; got {describe(order)}.")
    check_choice("derivative", derivative, ENGINES)
    check_sample_batch("x0", x0)
    if x0.dtype not in STEP:
        raise TypeError(
            f"x0: expected float32 or float64, in which differences mean something; got "
            f"{describe(x0)}. Check a float32 copy of the network."
        )
    refuse_wrapped(model.network)
    times = None if t is None else check_time(model, x0, t)
    given = check_model_kwargs(model_kwargs)
    device = x0.device
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        own, x = _copied(model), normal(x0.detach())
        field = noise_field(own, _spread_times(own, x) if times is None else times, given)
        field = field.with_conditions([tensor.detach().clone() for tensor in field.conditions()])
        precision = check_values(field, x)
        check_samples(field, x, precision)
        _check(Smoothness(int(order), derivative, precision), field, x)
        _check(Agreement(int(order), derivative, TOLERANCE[precision], STEP[precision]), field, x)


def _copied(model: ScoreModel) -> ScoreModel:
    try:
        own = copy.deepcopy(model)
    except Exception as error:
        raise TypeError(
            "network: expected one that copy.deepcopy can copy, so that yours stays as it is; got "
            f"{describe(model.network)}, which says: {str(error).splitlines()[0]}. Check it in a "
            "fresh process before its first call."
        ) from error
    if not isinstance(own.network, nn.Module) and own.network is model.network:
        # A function has no copy, and what is remembered of this one is not to stay.
        own.network = functools.partial(own.network)
    return own


def _check(check: Check, noise_field: NoiseField, x: Tensor) -> None:
    """Raise an error that names the innermost module with the fault."""
    # What the losses differentiate: the network alone, without the part of x in a prediction.
    field: Field = NetworkField(noise_field)
    network = noise_field.model.network
    primitives = noise_field.primitives
    fault = attempt(check, field, x, parameters_of(network))
    if fault is None:
        return
    where = "its own forward"
    found = culprit(check, network, lambda: evaluate(noise_field, x), primitives)
    replaced: Field = NetworkField(replace(noise_field, primitives=True))
    if found is not None:
        where, field, x, fault = found.field.call.where, found.field, found.x, found.fault
        replaced = replace(found.field, primitives=True)
    if isinstance(check, Smoothness):
        expected, advice = f"a smooth function of x, for order {check.order}", SMOOTH
    else:
        expected = "derivatives that agree with differences"
        own = parameters_of(field.owner)
        if not primitives and attempt(check, replaced, x, own) is None:
            advice = "Leave primitives=True in ScoreModel, which replaces such operators."
        else:
            advice = remedy(functions_at_fault(check, field, x, own))
    raise DerivativeError(f"network: expected {expected}; got {fault}, in {where}. {advice}")


def _spread_times(model: ScoreModel, x0: Tensor) -> Tensor:
    """Times (B,) evenly spread in log σ̂, away from both ends."""
    low, high = model.schedule.log_sigma_hat_range
    place = (torch.arange(len(x0), dtype=x0.dtype, device=x0.device) + 1) / (len(x0) + 1)
    return model.schedule.time(low + (high - low) * (0.3 + 0.5 * place))
