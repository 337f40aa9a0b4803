r"""Search for the faulty part of a network: the innermost module with a fault of its own.

Formula:
    A module is evaluated with the arguments that it received in the network. If it returns the
    tensors y_k, and r_k and u are fixed random tensors, the map x → (Σ_k y_k · r_k) u is a field
    whose D and G depend on all first and second derivatives of the module with respect to x.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hosm_losses._torch_internals import custom_function, graph_nodes
from hosm_losses.derivatives import ASK_THE_CHECK, Network, never_warn
from hosm_losses.diagnostics.differences import Check, Smoothness, random_like, reseed
from hosm_losses.model import BoundModel, map_tensors, tensors_in
from hosm_losses.taylor import safe_primitives

NO_DERIVATIVE = "no derivative at all"


@dataclass(frozen=True)
class Call:
    """One call of a module, with copies of its arguments and of its result."""

    name: str
    module: nn.Module
    arguments: dict[int | str, Any]
    returned: Any

    @property
    def where(self) -> str:
        """The name and class of the module, as a phrase for error messages."""
        return f"the module {self.name!r} ({type(self.module).__name__})"


def evaluate(bound: BoundModel, x: Tensor, seed: int = 0) -> Tensor:
    """Return the network's prediction at x, without a graph, using PyTorch's own operators."""
    reseed(x, seed)
    with torch.no_grad():
        return bound.native(x.clone()).detach().clone()


def record_calls(bound: BoundModel, x: Tensor) -> list[Call]:
    """Evaluate a network at x, and return the module calls in order of completion."""
    network: object = bound.model.network
    calls: list[Call] = []
    entered: list[dict[int | str, Any]] = []
    handles = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = [*enumerate(args), *kwargs.items()]
        entered.append({key: _copy(value) for key, value in arguments})

    def after(name: str, module: nn.Module, _args: Any, _kwargs: Any, returned: Any) -> None:
        calls.append(Call(name, module, entered.pop(), _copy(returned)))

    modules = list(network.named_modules())[1:] if isinstance(network, nn.Module) else []
    for name, module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
    try:
        evaluate(bound, x)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copy(value: Any) -> Any:
    """Copy the tensors in a value, because the network may later overwrite the originals."""
    try:
        return map_tensors(value, lambda tensor: tensor.detach().clone())
    except TypeError:
        return value


def floats_in(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a value, however deeply nested."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def attempt(check: Check, field: Network, x: Tensor) -> str | None:
    """Describe the fault that a check finds in a field, or return None if there is no fault."""
    never_warn(field.owner)
    try:
        return check.find(field, x)
    except (torch.OutOfMemoryError, Warning):
        raise
    # The values can be computed, so any error comes from the derivatives.
    except Exception as error:
        if isinstance(check, Smoothness):  # a fault for Agreement to find
            return None
        reason = (str(error) or repr(error)).splitlines()[0].replace(ASK_THE_CHECK, "").strip()
        return f"{NO_DERIVATIVE} ({reason})"


@dataclass(frozen=True)
class Part:
    """A module as a function of one argument; the network's call supplies the other arguments."""

    call: Call
    place: int | str
    primitives: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the module at x, and map its outputs to one tensor with the shape of x."""
        arguments = {**self.call.arguments, self.place: x}
        args = [value for key, value in arguments.items() if isinstance(key, int)]
        kwargs = {key: value for key, value in arguments.items() if isinstance(key, str)}
        with safe_primitives(self.primitives):
            returned = floats_in(self.call.module(*args, **kwargs))
        randn = random_like(x, seed=1)
        total = x.new_zeros(())
        for tensor in returned:
            total = total + (tensor * randn(tensor)).sum().to(x.dtype)
        return total * randn(x)

    @property
    def x(self) -> Tensor:
        """The argument that is varied, as the module received it in the network."""
        return self.call.arguments[self.place]

    @property
    def owner(self) -> nn.Module:
        """The module."""
        return self.call.module

    @property
    def native(self) -> "Part":
        """The same part, evaluated with PyTorch's own operators."""
        return replace(self, primitives=False)

    def repeat(self, count: int) -> "Part":
        """Raise NotImplementedError, because parts are checked with a single probe."""
        raise NotImplementedError(f"a part is checked with one probe; got {count}")


def find_culprit(
    check: Check, calls: Iterable[Call], primitives: bool, opaque: bool
) -> tuple[Part, str] | None:
    """Return the innermost module that has a fault of its own, and describe the fault.

    If `opaque`, the network as a whole shows no fault: only modules that contain a custom Function
    are checked, and one that cannot be differentiated on its own is not reported.
    """
    parts = _parts(calls, primitives)
    for part in _around_functions(parts) if opaque else parts:
        fault = attempt(check, part, part.x)
        if fault is not None and not (opaque and fault.startswith(NO_DERIVATIVE)):
            return part, fault
    return None


def _parts(calls: Iterable[Call], primitives: bool) -> Iterator[Part]:
    """Yield a part for the first call of each module, the most deeply nested modules first."""
    first: dict[str, Call] = {}
    for call in calls:
        first.setdefault(call.name, call)
    for call in sorted(first.values(), key=lambda call: -call.name.count(".")):
        for place, x in call.arguments.items():
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim:
                yield Part(call, place, primitives)
                break


def _around_functions(parts: Iterable[Part]) -> Iterator[Part]:
    """Yield the innermost modules whose graphs contain a custom Function."""
    seen: set[nn.Module] = set()
    for part in parts:
        with suppress(Exception):  # some modules cannot be called on their own
            if seen.isdisjoint(part.owner.modules()) and custom_functions(part, part.x):
                seen.add(part.owner)
                yield part


def custom_functions(field: Network, x: Tensor) -> list[str]:
    """Return the names of the custom autograd.Functions in the graph of a field."""
    reseed(x)
    value = field.native(x.detach().clone().requires_grad_())
    functions = [custom_function(node) for node in graph_nodes([value])]
    return list(dict.fromkeys(kind.__name__ for kind in functions if kind is not None))
