r"""A start-up check that the derivatives of a network are right.

What:
    A network may contain operators whose higher derivatives are wrong in silence: a custom
    autograd.Function whose backward drops the graph, a kernel whose forward derivative drops the
    parameters, code that detaches. A copy of it is compared with differences of its values, as
    `hosm_losses.differences` says. Never the loss, whose detached parts make its gradient another
    number than its slope. Where the network disagrees, every module is compared alone, with the
    input it got, and the innermost that disagrees is named.
"""

__all__ = ["check_derivatives"]

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses._checks import DerivativeError, check_choice, check_sample_batch, describe
from hosm_losses.derivatives import ENGINES, Field
from hosm_losses.differences import STEP, TOLERANCE, Agreement
from hosm_losses.noise_field import NetworkField
from hosm_losses.primitive_mode import safe_primitives
from hosm_losses.remedies import remedy
from hosm_losses.score_model import ScoreModel, check_model


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

    It works on a copy of the network, so that parameters, buffers, gradients and training mode
    are as they were. Random numbers are forked and restored. A network that is no nn.Module has no
    parameters to be seen: its derivatives in x alone are checked. Call it once before training,
    on a small batch, on one device.

    Args:
        model: the score model, in the mode it will be trained in.
        x0: a small batch of data (B, *); two samples are enough.
        order: the order it will be trained with, 2 or 3.
        t: times (B,); spread over the schedule if None.
        derivative: the engine it will be trained with.
        model_kwargs: keyword arguments of the network.

    Raises:
        DerivativeError: where a derivative disagrees with a difference, the network is not
            deterministic, or a derivative cannot be taken at all.
        TypeError: for an argument of a wrong type, half precision included.
        ValueError: for a wrong value or name.

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
    if order not in (2, 3):
        raise ValueError(f"order: expected 2 or 3; got {describe(order)}.")
    check_choice("derivative", derivative, ENGINES)
    check_sample_batch("x0", x0)
    if x0.dtype not in STEP:
        raise TypeError(
            f"x0: expected float32 or float64, in which differences mean something; got "
            f"{describe(x0)}. Check a float32 copy of the network."
        )
    own = copy.deepcopy(model)
    times = _spread_times(model, x0) if t is None else t
    device = x0.device
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        # What the losses differentiate: the network alone, without the part of x in a prediction.
        field = NetworkField(own.field(times, model_kwargs))
        network = own.network if isinstance(own.network, nn.Module) else None
        _check_deterministic(field.native, x0, network)
        check = Agreement(order, derivative, TOLERANCE[x0.dtype], STEP[x0.dtype])
        fault = _attempt(check, field, x0, _parameters(network))
        if fault is None:
            return
        name, module, inner = _culprit(check, own, field, x0)
        where = f"the module {name!r} ({type(module).__name__})" if name else "its own forward"
        raise DerivativeError(
            f"network: expected derivatives that agree with differences; got {inner or fault}, in "
            f"{where}. {_advice(model, module, field, x0)}"
        )


def _advice(model: ScoreModel, module: object, field: Field, x: Tensor) -> str:
    advice = remedy(module, field(x.detach().clone().requires_grad_()))
    if model.primitives:
        return advice
    return f"Leave primitives=True in ScoreModel, which replaces such operators; or: {advice}"


def _spread_times(model: ScoreModel, x0: Tensor) -> Tensor:
    """Times (B,) evenly spread in log σ̂, away from both ends."""
    low, high = model.schedule.log_sigma_hat_range
    place = (torch.arange(len(x0), dtype=x0.dtype, device=x0.device) + 1) / (len(x0) + 1)
    return model.schedule.time(low + (high - low) * (0.3 + 0.5 * place))


def _parameters(network: nn.Module | None) -> list[Tensor]:
    if network is None:
        return []
    return [p for p in network.parameters() if p.requires_grad and p.is_floating_point()]


def _check_deterministic(field: Field, x: Tensor, network: nn.Module | None) -> None:
    """Raise where the same input, seed and parameters do not give the same output."""
    before = {} if network is None else {n: b.clone() for n, b in network.named_buffers()}

    def evaluate() -> Tensor:
        torch.manual_seed(0)
        return field(x).detach()

    first, second = evaluate(), evaluate()
    if torch.equal(first, second):
        return
    if network is not None:
        changed = [n for n, b in network.named_buffers() if not torch.equal(b, before[n])]
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(before[name])
        if changed and torch.equal(evaluate(), first):
            raise DerivativeError(
                "network: expected an output that depends on x, t and the parameters alone; got "
                f"one that changes with the buffers {', '.join(changed)}, which every call "
                "updates. Freeze them (module.eval(), or the module's own switch) while you train "
                "with orders two and three."
            )
    if float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
        raise DerivativeError(
            "network: expected the same output for the same input and seed; got another. Make it "
            "draw from torch's generators only, and use deterministic operators."
        )


@dataclass(frozen=True)
class _ModuleField:
    """One module alone, as a field: (Σ module(x) r) u for fixed random r and u.

    Its D and G hold the first and second derivatives of the module, whatever its output's shape.
    x is its argument at `position`; the others are as the network gave them.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    position: int
    primitives: bool

    def __call__(self, x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(1)
        before, after = self.args[: self.position], self.args[self.position + 1 :]
        with safe_primitives(self.primitives):
            returned = self.module(*before, x, *after, **self.kwargs)
        outputs = [out for out in _tensors(returned) if out.is_floating_point()]
        total = x.new_zeros(())
        for out in outputs:
            r = torch.randn(out.shape, generator=generator, dtype=out.dtype, device=out.device)
            total = total + (out * r).sum().to(x.dtype)
        u = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return total * u

    @property
    def owner(self) -> object:
        return self.module

    @property
    def native(self) -> "_ModuleField":
        return replace(self, primitives=False)

    def repeat(self, count: int) -> "_ModuleField":
        raise NotImplementedError(f"a module is checked with one probe; got {count}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _culprit(
    check: Agreement, model: ScoreModel, field: Field, x: Tensor
) -> tuple[str, object, str | None]:
    """Name, module and fault of the innermost module that disagrees alone."""
    network = model.network
    if not isinstance(network, nn.Module):
        return "", network, None
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = []
    for name, module in network.named_modules():
        if name:

            def record(
                _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                calls.setdefault(name, (args, kwargs))

            handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    with torch.no_grad():
        field(x)
    for handle in handles:
        handle.remove()
    for name in sorted(calls, key=lambda name: -name.count(".")):
        module = network.get_submodule(name)
        args, kwargs = calls[name]
        position = next(
            (i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()),
            None,
        )
        if position is None or not args[position].ndim:
            continue

        alone = _ModuleField(module, args, kwargs, position, model.primitives)
        inner = _attempt(check, alone, args[position], _parameters(module))
        if inner is not None:
            return name, module, inner
    return "", network, None


def _attempt(
    check: Agreement, field: Field, x: Tensor, parameters: Sequence[Tensor]
) -> str | None:
    """Say what disagrees, or that a derivative cannot be taken."""
    try:
        return check.find(field, x, parameters)
    except (RuntimeError, AttributeError, DerivativeError) as error:
        return f"no derivative at all ({str(error).splitlines()[0]})"
