"""The modules that a function refers to, which a module around it neither moves nor copies."""

import dis
import warnings
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from hosm_losses._checks import users_level

GIVE_THE_MODULE = "Give the module: ScoreModel(module, schedule, call=lambda module, x, t: ...)."
WRAPPED = ("_orig_mod", "module", "base_model", "model")
MOST = 1000  # entries of a container that is looked into


class Referred(NamedTuple):
    """A module with parameters, by the name that a function has for it."""

    name: str
    module: nn.Module
    shared: bool  # by a deep copy, which has functions as they are

    @property
    def is_frozen(self) -> bool:
        """Whether none of its parameters is trained."""
        return not any(each.requires_grad for each in self.module.parameters())


def say_unreached(network: object, mode: bool) -> None:
    """Warn of modules that the training mode of a network does not reach."""
    for each in modules_of(network):
        # What is frozen stays as it is in training.
        if each.module.training != mode and not (mode and each.is_frozen):
            called = "train()" if mode else "eval()"
            told = f"network: {called} does not reach {each.name}, to which a function refers."
            warnings.warn(f"{told} {GIVE_THE_MODULE}", stacklevel=users_level())


def refuse_shared(**parts: object) -> None:
    """Raise TypeError where a copy would share weights: of the network, or trained ones."""
    for part, value in parts.items():
        for each in modules_of(value):
            if each.shared and (part == "network" or not each.is_frozen):
                raise TypeError(
                    f"{part}: expected an nn.Module in a model that is copied; got a function, "
                    f"whose copy would share the weights of {each.name}. {GIVE_THE_MODULE}"
                )


def modules_of(function: object) -> list[Referred]:
    """The modules with parameters that a callable refers to, without those of a module itself.

    Through closures, globals, defaults, other functions of the same file, partial functions,
    methods, containers, and attributes of objects by the names in the code.
    """
    if isinstance(function, nn.Module):
        return []
    return [
        each
        for each in _walk(function, "it", (), False, set())
        if any(True for _ in each.module.parameters())
    ]


def roots_of(network: object) -> list[nn.Module]:
    """A network that is a module, or the modules with parameters to which it refers."""
    if isinstance(network, nn.Module):
        return [network]
    return [each.module for each in modules_of(network)]


def class_names(network: object) -> list[str]:
    """The names of the classes of a network, and of those in a wrapper or a function around it."""
    names, modules = list[str](), roots_of(network)
    for module in modules:  # which grows
        names += [kind.__name__ for kind in type(module).__mro__]
        # As of torch.compile, DistributedDataParallel and PEFT.
        inside = (module._modules.get(name) for name in WRAPPED)
        modules += [each for each in inside if each is not None]
    return names


def _walk(
    value: Any, name: str, names: tuple[str, ...], shared: bool, seen: set[int]
) -> Iterator[Referred]:
    """What a value refers to; `names` are those in the code that uses it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    found: list[tuple[str, Any]] = []
    if isinstance(value, nn.Module):
        yield Referred(name, value, shared)
    elif isinstance(value, FunctionType):
        found, names, shared = list(_used(value)), _names(value), True
    elif isinstance(value, MethodType):
        found, names = [(name, value.__self__)], _names(value.__func__)
    elif isinstance(value, partial):
        found = [(name, each) for each in (value.func, *value.args)] + list(value.keywords.items())
    elif type(value) in (list, tuple, dict):  # not what loads its entries, as a dataset
        entries = value.values() if isinstance(value, dict) else value
        found = [(name, each) for each in entries] if len(value) <= MOST else []
    else:
        own = getattr(value, "__dict__", {})
        # What is called, and not what a part is taken from, as a pipeline's network.
        if callable(value) and not any(each in own for each in names):
            names = names + _names(type(value).__call__)
        found = [(each, own[each]) for each in dict.fromkeys(names) if each in own]
    for each, part in found:
        yield from _walk(part, each, names, shared, seen)


def _codes(function: Any) -> list[CodeType]:
    """The code of a function and of the functions in it."""
    codes = [code for code in (getattr(function, "__code__", None),) if code is not None]
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return codes


def _names(function: Any) -> tuple[str, ...]:
    return tuple(name for code in _codes(function) for name in code.co_names)


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The values that a function has from outside of its call, by name."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # one that is empty yet
            continue
    for each in (one for inner in _codes(function) for one in dis.get_instructions(inner)):
        value = function.__globals__.get(each.argval) if each.opname == "LOAD_GLOBAL" else None
        # Not into what other files define.
        if isinstance(value, FunctionType) and value.__module__ != function.__module__:
            continue
        if value is not None and not isinstance(value, type):
            yield each.argval, value
    given = function.__defaults__ or ()
    yield from zip(code.co_varnames[code.co_argcount - len(given) :], given, strict=False)
    yield from (function.__kwdefaults__ or {}).items()
