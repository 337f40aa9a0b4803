r"""Parts of a network as fields of their own, to find the one at fault.

What:
    A module is taken alone, with the input that it got in the network. So is what is computed up
    to a custom autograd.Function: a Function is at fault if what it was given is right and what it
    returned is not.

Formula:
    Of whatever is returned, (Σ returned · r) u for fixed random r and u: a field whose D and G
    hold all first and second derivatives, whatever was returned.
"""

__all__ = [
    "Call",
    "Culprit",
    "ModuleField",
    "attempt",
    "culprit",
    "functions_at_fault",
    "parameters_of",
    "recorded",
    "tensors_in",
]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hosm_losses._torch_internals import custom_function
from hosm_losses.derivatives import ASK_THE_CHECK, Field, safe_primitives, say_no_price
from hosm_losses.diagnostics.differences import Check, reseed
from hosm_losses.model import map_tensors


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


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors in a value, however deep in containers."""
    found: list[Tensor] = []

    def visit(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.append(tensor)
        return tensor

    map_tensors(value, visit)
    return found


def recorded(network: object, evaluate: Callable[[], Tensor]) -> list[Call]:
    """The calls of the modules inside a network during one evaluation, in the order they ended."""
    if not isinstance(network, nn.Module):
        return []
    calls: list[Call] = []
    entered: list[dict[int | str, Any]] = []
    handles = []
    for name, module in network.named_modules():
        if not name:
            continue

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*enumerate(args), *kwargs.items()]
            entered.append({key: _copied(each) for key, each in given})

        def after(
            module: nn.Module,
            _args: tuple[Any, ...],
            _kwargs: dict[str, Any],
            returned: Any,
            name: str = name,
        ) -> None:
            calls.append(Call(name, module, entered.pop(), _copied(returned)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        evaluate()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copied(value: Any) -> Any:
    """With tensors of its own: a network may write to those that it passed on."""
    try:
        return map_tensors(value, lambda tensor: tensor.detach().clone())
    except TypeError:
        return value


def parameters_of(network: object) -> list[Tensor]:
    """The trained parameters; of a network that is no Module nobody knows them."""
    if not isinstance(network, nn.Module):
        return []
    return [p for p in network.parameters() if p.requires_grad and p.is_floating_point()]


def attempt(check: Check, field: Field, x: Tensor, parameters: Sequence[Tensor]) -> str | None:
    """Say what is wrong, or that a derivative cannot be taken."""
    say_no_price(field.owner)
    try:
        return check.find(field, x, parameters)
    except (_UnseenError, torch.OutOfMemoryError, Warning):
        raise
    # The values can be computed, so whatever is raised is raised by the derivatives.
    except Exception as error:
        said = (str(error) or repr(error)).splitlines()[0].replace(ASK_THE_CHECK, "").strip()
        return f"no derivative at all ({said})"


@dataclass(frozen=True)
class ModuleField:
    """One module alone: its argument at `place` is x, the others are as the network gave them."""

    call: Call
    place: int | str
    primitives: bool

    def __call__(self, x: Tensor) -> Tensor:
        """What it returns, contracted."""
        arguments = {**self.call.arguments, self.place: x}
        args = [each for key, each in arguments.items() if isinstance(key, int)]
        kwargs = {key: each for key, each in arguments.items() if isinstance(key, str)}
        with safe_primitives(self.primitives):
            returned = self.call.module(*args, **kwargs)
        return _contracted(tensors_in(returned), x)

    @property
    def owner(self) -> object:
        """The module."""
        return self.call.module

    @property
    def native(self) -> "ModuleField":
        """The same with PyTorch's own operators."""
        return replace(self, primitives=False)

    def repeat(self, count: int) -> "ModuleField":
        """No module is asked for more probes than one."""
        raise NotImplementedError(f"a module is checked with one probe; got {count}")


def _contracted(returned: Sequence[Tensor], x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(1)
    total = x.new_zeros(())
    for each in returned:
        r = torch.randn(each.shape, generator=generator, dtype=each.dtype, device=each.device)
        total = total + (each * r).sum().to(x.dtype)
    return total * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


class Culprit(NamedTuple):
    """A module at fault, as a field; its input, and the fault."""

    field: ModuleField
    x: Tensor
    fault: str


def culprit(
    check: Check, network: object, evaluate: Callable[[], Tensor], primitives: bool
) -> Culprit | None:
    """The innermost module that has a fault alone."""
    first: dict[str, Call] = {}
    for call in recorded(network, evaluate):
        first.setdefault(call.name, call)
    for call in sorted(first.values(), key=lambda call: -call.name.count(".")):
        for place, x in call.arguments.items():
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim:
                alone = ModuleField(call, place, primitives)
                fault = attempt(check, alone, x, parameters_of(call.module))
                if fault is not None:
                    return Culprit(alone, x, fault)
                break
    return None


class _UnseenError(LookupError):
    """What a Function returned was not seen, as in forward mode."""


class _Watch(TorchFunctionMode):
    """Keeps every tensor with a graph that a function of PyTorch is given or returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[Any, int], Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.look((args, kwargs))
        returned = func(*args, **(kwargs or {}))
        self.look(returned)
        return returned

    def look(self, value: Any) -> None:
        """Keep the tensors in a value as they are now: they may be written to later."""
        for tensor in tensors_in(value):
            key = (tensor.grad_fn, tensor.output_nr)
            if tensor.grad_fn is not None and key not in self.seen:
                with torch.enable_grad():  # off inside a custom Function
                    self.seen[key] = tensor.clone()

    def nodes(self) -> list[Any]:
        """Those of custom Functions, in the order in which they were seen."""
        return [node for node in dict(self.seen) if custom_function(node[0]) is not None]


def _watched(field: Field, x: Tensor) -> "_Watch":
    watch = _Watch()
    with watch:
        value = field(x)
    watch.look(value)
    return watch


@dataclass(frozen=True)
class _UpToFunction:
    """A field as far as a custom Function in it: what that was given, or what it returned."""

    field: Field
    index: int
    returned: bool

    def __call__(self, x: Tensor) -> Tensor:
        watch = _watched(self.field, x)
        nodes = watch.nodes()
        if self.index >= len(nodes):
            raise _UnseenError
        if self.returned:
            return _contracted([watch.seen[nodes[self.index]]], x)
        given = [
            watch.seen.get((node, number), getattr(node, "variable", None))
            for node, number in nodes[self.index][0].next_functions
        ]
        return _contracted([x, *(tensor for tensor in given if tensor is not None)], x)

    @property
    def owner(self) -> object:
        return self.field.owner

    @property
    def native(self) -> "_UpToFunction":
        return replace(self, field=self.field.native)

    def repeat(self, count: int) -> "_UpToFunction":
        return replace(self, field=self.field.repeat(count))


def functions_at_fault(
    check: Check, field: Field, x: Tensor, parameters: Sequence[Tensor]
) -> list[str]:
    """Names of the custom autograd.Functions in the graph of a field that are its fault.

    What was given to one of them is right, and what it returned is not. In forward mode that
    cannot be seen, and the Taylor engine takes none: there it is all of them.
    """
    reseed(x)
    nodes = _watched(field, x.detach().clone().requires_grad_()).nodes()
    names = [getattr(custom_function(node), "__name__", "") for node, _ in nodes]
    if check.derivative in ("forward", "taylor"):
        return list(dict.fromkeys(names))
    found: dict[str, None] = {}
    for index, name in enumerate(names):
        given, returned = (_UpToFunction(field, index, end) for end in (False, True))
        try:
            if attempt(check, given, x, parameters) is None and attempt(
                check, returned, x, parameters
            ):
                found[name] = None
        except _UnseenError:
            pass
    return list(found)
