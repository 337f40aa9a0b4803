r"""The part of a network at fault: a module, or a custom autograd.Function.

What:
    A module is taken alone, with the input that it got in the network. So is what is computed up
    to a custom autograd.Function: a Function is at fault if what it was given is right and what it
    returned is not.

Formula:
    Of whatever a part returns, (Σ returned · r) u for fixed random r and u: a field whose D and G
    hold all first and second derivatives.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosm_losses._torch_internals import custom_function
from hosm_losses.derivatives import ASK_THE_CHECK, Field, safe_primitives, say_no_price
from hosm_losses.diagnostics.differences import Check, Smoothness, random_like, reseed
from hosm_losses.model import map_tensors

NO_DERIVATIVE = "no derivative at all"


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments by place or name, and what it returned, all copied."""

    name: str
    module: nn.Module
    arguments: dict[int | str, Any]
    returned: Any

    @property
    def where(self) -> str:
        """The module, in words."""
        return f"the module {self.name!r} ({type(self.module).__name__})"


def recorded(network: object, evaluate: Callable[[], Tensor]) -> list[Call]:
    """The calls of the modules inside a network during one evaluation, in the order they ended."""
    calls: list[Call] = []
    entered: list[dict[int | str, Any]] = []
    handles = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*enumerate(args), *kwargs.items()]
        entered.append({key: _copied(each) for key, each in given})

    def after(name: str, module: nn.Module, _args: Any, _kwargs: Any, returned: Any) -> None:
        calls.append(Call(name, module, entered.pop(), _copied(returned)))

    modules = list(network.named_modules())[1:] if isinstance(network, nn.Module) else []
    for name, module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
    try:
        evaluate()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copied(value: Any) -> Any:
    """The value with tensors of its own: a network may write to those that it passed on."""
    try:
        return map_tensors(value, lambda tensor: tensor.detach().clone())
    except TypeError:
        return value


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors in a value, however deep in containers."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return [tensor for tensor in found if tensor.is_floating_point()]


class Watch(TorchFunctionMode):
    """Shows `look` every tensor that a function of PyTorch is given or returns."""

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            self.look(tensor)
        returned = func(*args, **(kwargs or {}))
        for tensor in tensors_in(returned):
            self.look(tensor)
        return returned


def attempt(check: Check, field: Field, x: Tensor) -> str | None:
    """Say what is wrong with a field, or that a derivative cannot be taken."""
    say_no_price(field.owner)
    try:
        return check.find(field, x)
    except (_UnseenError, torch.OutOfMemoryError, Warning):
        raise
    # The values can be computed, so whatever is raised is raised by the derivatives.
    except Exception as error:
        if isinstance(check, Smoothness):  # a fault for Agreement to find
            return None
        said = (str(error) or repr(error)).splitlines()[0].replace(ASK_THE_CHECK, "").strip()
        return f"{NO_DERIVATIVE} ({said})"


@dataclass(frozen=True)
class Part:
    """A part of a network as a field, of what `compute` returns for x and `primitives`."""

    owner: Any
    compute: Callable[[Tensor, bool], Iterable[Tensor]]
    primitives: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the part at x, contracted to the shape of x."""
        randn = random_like(x, seed=1)
        total = x.new_zeros(())
        for each in self.compute(x, self.primitives):
            total = total + (each * randn(each)).sum().to(x.dtype)
        return total * randn(x)

    @property
    def native(self) -> "Part":
        """The same with PyTorch's own operators."""
        return replace(self, primitives=False)

    def repeat(self, count: int) -> "Part":
        """Raise: no part is asked for more probes than one."""
        raise NotImplementedError(f"a part is checked with one probe; got {count}")


# A module in words, as a field, and its input.
_Alone = tuple[str, Part, Tensor]


def culprit(
    check: Check, calls: Iterable[Call], primitives: bool, opaque: bool
) -> tuple[str, Part, Tensor, str] | None:
    """The innermost module that has a fault alone: in words, as a field, its input, and the fault.

    With `opaque` only modules around a custom Function are tried, of a network without a fault as
    a whole. One that cannot be differentiated alone is then no finding.
    """
    parts = _alone(calls, primitives)
    for where, part, x in _opaque(parts) if opaque else parts:
        fault = attempt(check, part, x)
        if fault is not None and not (opaque and fault.startswith(NO_DERIVATIVE)):
            return where, part, x, fault
    return None


def _alone(calls: Iterable[Call], primitives: bool) -> Iterator[_Alone]:
    """Every module with the input of its first call, the innermost first."""
    first: dict[str, Call] = {}
    for call in calls:
        first.setdefault(call.name, call)
    for call in sorted(first.values(), key=lambda call: -call.name.count(".")):
        for place, x in call.arguments.items():
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim:
                yield call.where, Part(call.module, partial(_again, call, place), primitives), x
                break


def _opaque(parts: Iterable[_Alone]) -> Iterator[_Alone]:
    """The innermost with a custom Function in their graph."""
    found: set[nn.Module] = set()
    for where, part, x in parts:
        with suppress(Exception):  # some modules cannot be called alone
            if found.isdisjoint(part.owner.modules()) and custom_functions(part.native, x):
                found.add(part.owner)
                yield where, part, x


def _again(call: Call, place: int | str, x: Tensor, primitives: bool) -> list[Tensor]:
    """What a module returns with x at one place, and elsewhere what the network gave it."""
    arguments = {**call.arguments, place: x}
    args = [each for key, each in arguments.items() if isinstance(key, int)]
    kwargs = {key: each for key, each in arguments.items() if isinstance(key, str)}
    with safe_primitives(primitives):
        return tensors_in(call.module(*args, **kwargs))


class _UnseenError(LookupError):
    """What a Function returned was not seen, as in forward mode."""


# A node of the graph, and which of its outputs.
_Output = tuple[Any, int]


def functions_at_fault(check: Check, field: Field, x: Tensor) -> list[str]:
    """Names of the custom autograd.Functions in the graph of a field that are its fault.

    In forward mode that cannot be seen, and the Taylor engine takes none: there it is all of them.
    """
    names = custom_functions(field, x)
    if check.derivative not in ("forward", "taylor"):
        names = [name for place, name in enumerate(names) if _at_fault(check, field, x, place)]
    return list(dict.fromkeys(names))


def custom_functions(field: Field, x: Tensor) -> list[str]:
    """Names of the custom autograd.Functions in the graph of a field."""
    reseed(x)
    functions, _ = _seen(field, x.detach().clone().requires_grad_())
    return [getattr(custom_function(node), "__name__", "") for node, _ in functions]


def _at_fault(check: Check, field: Field, x: Tensor, place: int) -> bool:
    """Whether what the Function at this place was given is right, and what it returned is not."""
    given, returned = (Part(field.owner, partial(_up_to, field, place, end)) for end in (0, 1))
    try:
        return attempt(check, given, x) is None and attempt(check, returned, x) is not None
    except _UnseenError:
        return False


def _up_to(field: Field, place: int, end: int, x: Tensor, primitives: bool) -> list[Tensor]:
    """What the Function at this place was given, with x, or at its other end what it returned."""
    functions, seen = _seen(field if primitives else field.native, x)
    if place >= len(functions):
        raise _UnseenError
    if end:
        return [seen[functions[place]]]
    inputs = functions[place][0].next_functions
    given = [seen.get(each, getattr(each[0], "variable", None)) for each in inputs]
    return [x, *(tensor for tensor in given if tensor is not None)]


def _seen(field: Field, x: Tensor) -> tuple[list[_Output], dict[_Output, Tensor]]:
    """The outputs of custom Functions, and all tensors of the graph as they were when seen."""
    seen: dict[_Output, Tensor] = {}

    def look(tensor: Tensor) -> None:
        output = (tensor.grad_fn, tensor.output_nr)
        if tensor.grad_fn is not None and output not in seen:
            with torch.enable_grad():  # off inside a custom Function
                seen[output] = tensor.clone()  # it may be written to later

    with Watch(look):
        value = field(x)
    look(value)
    return [output for output in seen if custom_function(output[0]) is not None], seen
