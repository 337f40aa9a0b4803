r"""The keyword arguments of a network: which of their tensors belong to the samples.

What:
    Losses evaluate some rows of a batch, or every row several times; what belongs to a sample has
    to go with it. A tensor whose first dimension is the batch size is taken to be per sample,
    wherever it is in dicts, lists, tuples, named tuples, dataclasses, namespaces and other
    mappings. A table that happens to be as long as the batch is marked: `Shared(table)`. The
    decision is made once, when the arguments are bound to a batch: `bound` marks all that is
    shared.
"""

import copy
import dataclasses
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from numbers import Number
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hosm_losses._checks import describe, users_level
from hosm_losses._torch_internals import traced, versions


class Shared:
    """Marks a value in `model_kwargs` that all samples share; the network is given the value.

    Needed only for a tensor whose first dimension may equal the batch size, such as a table of
    positions. `check_derivatives` names those that need it.

    Args:
        value: a tensor, or a container of tensors, that all samples share.

    Example:
        >>> import torch
        >>> from hosm_losses import ScoreModel, VPSchedule, second_order_dsm
        >>> model = ScoreModel(lambda x, t, table: x * table.mean(), VPSchedule())
        >>> table = torch.randn(4, 7)
        >>> second_order_dsm(
        ...     model, torch.randn(4, 2), probes=2, model_kwargs={"table": Shared(table)}
        ... ).shape
        torch.Size([])
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        """Shared(what it holds)."""
        return f"Shared({self.value!r})"


# Of a path such as model_kwargs['cond'][0], and of the tensor or the Shared found there.
Visit = Callable[[str, Any], Any]


def _walk(value: Any, visit: Visit, path: str) -> Any:
    """Replace every tensor and every Shared; a container without any is returned as it is."""
    # Without unions of types, and exact types of containers first, for torch.compile.
    if isinstance(value, Tensor) or isinstance(value, Shared):  # noqa: SIM101
        return visit(path, value)
    if type(value) is dict:
        return {key: _walk(each, visit, f"{path}[{key!r}]") for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(
            [_walk(each, visit, f"{path}[{place}]") for place, each in enumerate(value)]
        )
    entries = _entries(value)
    if entries is None:
        return value
    before, step = entries
    found = {key: _walk(each, visit, path + step.format(key)) for key, each in before.items()}
    return _rebuilt(value, found, before, path)


def _entries(value: Any) -> tuple[dict[Any, Any], str] | None:
    """What a container holds, and how a path goes on to it; None for what is none here."""
    if isinstance(value, Mapping):
        return dict(value), "[{!r}]"
    if isinstance(value, list | tuple):
        return dict(enumerate(value)), "[{!r}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value) if hasattr(value, each.name)]
        return {name: getattr(value, name) for name in names}, ".{}"
    return (dict(vars(value)), ".{}") if isinstance(value, SimpleNamespace) else None


def _rebuilt(value: Any, found: dict[Any, Any], before: dict[Any, Any], path: str) -> Any:
    """A container like `value` that holds what was found."""
    if all(found[key] is before[key] for key in before):
        return value
    try:
        if isinstance(value, tuple):
            return getattr(value, "_make", type(value))(found.values())
        if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
            return type(value)(found)  # pyright: ignore[reportCallIssue]
        new = copy.copy(value)
        for key, each in found.items():
            if isinstance(value, MutableMapping | list):
                new[key] = each
            else:  # a dataclass, frozen perhaps, or a namespace
                object.__setattr__(new, key, each)
        return new
    except Exception as error:
        raise TypeError(
            f"{path}: expected a container that can be copied with other tensors in it; got "
            f"{describe(value)}, which says: {error}. Pass a dict, and build the object in call."
        ) from error


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor, shared ones included."""

    def visit(path: str, found: Any) -> Any:
        if isinstance(found, Shared):
            return Shared(_walk(found.value, visit, path))
        return function(found)

    return _walk(value, visit, "model_kwargs")


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, however deep in containers, shared ones included."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return found


def bound(kwargs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The arguments with a mark at all that does not belong to the samples of this batch."""

    def visit(_path: str, found: Any) -> Any:
        own = isinstance(found, Tensor) and found.ndim > 0 and len(found) == batch
        return found if own or isinstance(found, Shared) else Shared(found)

    if batch > 1 and not traced():  # one sample is not split
        _say_what_is_not_split(kwargs, batch)
    return _walk(dict(kwargs), visit, "model_kwargs")


def _say_what_is_not_split(kwargs: Mapping[str, Any], batch: int) -> None:
    """Warn of what seems to belong to the samples, and is no tensor in a container here."""
    for name, value in kwargs.items():
        for path, found, holds in _unsplit(value, batch, f"model_kwargs[{name!r}]"):
            warnings.warn(
                f"{path}: expected tensors in dicts, lists, dataclasses and their like; got "
                f"{describe(found)}, which holds {holds} as long as the batch and is not split. "
                "Give tensors, or put Shared(...) around this alone.",
                stacklevel=users_level(),
            )


def _unsplit(value: Any, batch: int, path: str) -> Iterator[tuple[str, Any, str]]:
    """Where something seems to belong to the samples and is not split, that, and what it holds."""
    if isinstance(value, (Tensor, Shared, nn.Module, type)):
        return
    entries = _entries(value)
    if isinstance(value, np.ndarray):
        if value.shape[:1] == (batch,):
            yield path, value, "an array"
    elif isinstance(value, list | tuple) and len(value) == batch and _are_labels(value):
        yield path, value, "labels"
    elif entries is not None:
        for key, each in entries[0].items():
            yield from _unsplit(each, batch, path + entries[1].format(key))
    else:
        collected = value if isinstance(value, deque | set | frozenset) else ()
        held = (*getattr(value, "__dict__", {}).values(), *collected)
        if any(isinstance(each, Tensor) and each.shape[:1] == (batch,) for each in held):
            yield path, value, "a tensor"


def _are_labels(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether these are words, or in a list numbers; in a tuple those are often a size."""
    kinds = str if isinstance(values, tuple) else (str, Number)
    return all(isinstance(each, kinds) for each in values)


def per_sample(kwargs: Mapping[str, Any], function: Callable[[str, Tensor], Any]) -> Any:
    """Apply function(path, tensor) to what belongs to the samples in bound arguments."""

    def visit(path: str, found: Any) -> Any:
        if isinstance(found, Shared):
            return found
        if found.is_nested or found.layout != torch.strided:
            kind = "a nested one" if found.is_nested else f"one of layout {found.layout}"
            raise TypeError(
                f"{path}: expected a dense tensor, as its first dimension is the batch; got "
                f"{kind}. Mark what all samples share: hosm_losses.Shared(tensor) in its place."
            )
        return function(path, found)

    return _walk(kwargs, visit, "model_kwargs")


def copied(kwargs: Mapping[str, Any]) -> Any:
    """Bound arguments with copies of what belongs to the samples, to which a network may write.

    They are as they were where a container cannot be copied.
    """
    try:
        return per_sample(kwargs, lambda _, tensor: tensor.clone())
    except TypeError:
        return kwargs


def unwrapped(kwargs: Mapping[str, Any]) -> Any:
    """The arguments as the network wants them, without marks."""

    def visit(path: str, found: Any) -> Any:
        return _walk(found.value, visit, path) if isinstance(found, Shared) else found

    return _walk(kwargs, visit, "model_kwargs")


def rows_note(kwargs: Mapping[str, Any], rows: int, batch: int) -> str:
    """Say, beside an error of a network, with how many rows it was called, and what has them."""
    followed: list[str] = []
    unchanged: list[str] = []

    def visit(path: str, found: Any) -> Any:
        shared = isinstance(found, Shared)
        for tensor in tensors_in(found):
            (unchanged if shared else followed).append(f"{path} {tuple(tensor.shape)}")
        return found

    _walk(kwargs, visit, "model_kwargs")
    note = (
        f"The network was called with {rows} rows for a batch of {batch}: probes repeat samples, "
        "fraction and batch_size select some."
    )
    if not (followed or unchanged):
        return note
    return (
        f"{note} The rows were followed by {', '.join(followed) or 'none'}; passed unchanged: "
        f"{', '.join(unchanged) or 'none'}. Give what belongs to samples as (B, ...)."
    )


class SharedTensors:
    """The tensors that all samples share in bound arguments, as they are now.

    Under torch.compile, where no change is counted, none are looked at.
    """

    def __init__(self, kwargs: Mapping[str, Any]) -> None:
        self.kwargs = kwargs
        self.found = [] if torch.compiler.is_compiling() else self._look(kwargs)

    def _look(self, kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor, list[int]]]:
        found: list[tuple[str, Tensor, list[int]]] = []

        def collect(path: str, each: Any) -> Any:
            if isinstance(each, Shared):
                _walk(each.value, collect, path)
            else:
                found.append((path, each, versions([each])))
            return each

        def visit(path: str, each: Any) -> Any:
            return collect(path, each) if isinstance(each, Shared) else each

        _walk(kwargs, visit, "model_kwargs")
        return found

    def check(self) -> None:
        """Raise ValueError where one was changed since, or another stands in its place."""
        now = self._look(self.kwargs) if self.found else []
        for (path, tensor, version), (_, other, later) in zip(self.found, now, strict=False):
            if other is not tensor or later != version:
                raise ValueError(
                    f"{path}: expected a network that leaves what all samples share as it is; got "
                    "one that changes it. Put .clone() before the change in the network."
                )
