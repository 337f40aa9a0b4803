r"""Decide which tensors in a network's keyword arguments are per-sample.

Purpose:
    Losses may select some samples of a batch or repeat every sample. They must then select or
    repeat the conditions of the samples in the same way. A tensor counts as per-sample if the
    length of its first dimension is the batch size. The tensor may be inside a dict or another
    mapping, a list, a tuple, a named tuple, a dataclass or a namespace. A shared table that
    happens to be as long as the batch must be marked as `Shared(table)`. The decision is made only
    once, when `bind` binds the arguments to a batch and marks every shared tensor.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from hosm_losses._checks import describe_value, error_message, shown, warn
from hosm_losses._torch_internals import is_traced


class Shared:
    """Marks a value in `model_kwargs` that all samples share; the network receives it unmarked.

    The mark is only needed for a tensor whose first dimension may equal the batch size, such as a
    table of positions. `check_derivatives` names the tensors that need the mark.

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
        tensors = ", ".join(map(shown, tensors_in(self.value)))
        return f"Shared({tensors or repr(self.value)})"


# A function of a path, such as model_kwargs['cond'][0], and of the tensor or Shared at that path.
Visit = Callable[[str, Any], Any]


def _walk(value: Any, visit: Visit, path: str = "model_kwargs") -> Any:
    """Replace every tensor and every `Shared` with the result of `visit`.

    A container without any tensor or `Shared` is returned unchanged.
    """
    # For torch.compile, no types are joined by |, and exact container types come first.
    if isinstance(value, Tensor) or isinstance(value, Shared):  # noqa: SIM101
        return visit(path, value)
    if type(value) is dict:
        return {key: _walk(entry, visit, f"{path}[{key!r}]") for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_walk(entry, visit, f"{path}[{i}]") for i, entry in enumerate(value)])
    entries: dict[Any, Any]
    if isinstance(value, Mapping):
        entries, step = dict(value), "[{!r}]"
    elif isinstance(value, list | tuple):
        entries, step = dict(enumerate(value)), "[{!r}]"
    elif isinstance(value, SimpleNamespace):
        entries, step = dict(vars(value)), ".{}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        entries, step = {name: getattr(value, name) for name in names}, ".{}"
    else:
        return value
    new = {key: _walk(entry, visit, path + step.format(key)) for key, entry in entries.items()}
    return value if all(new[key] is entries[key] for key in entries) else _rebuild(value, new)


def _rebuild(value: Any, entries: dict[Any, Any]) -> Any:
    if isinstance(value, tuple):
        return getattr(value, "_make", type(value))(entries.values())
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)(entries)  # pyright: ignore[reportCallIssue]
    new = copy.copy(value)
    for key, entry in entries.items():
        if isinstance(value, MutableMapping | list):
            new[key] = entry
        else:  # a dataclass, possibly frozen, or a namespace
            object.__setattr__(new, key, entry)
    return new


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor, including shared ones."""

    def visit(path: str, entry: Any) -> Any:
        shared = isinstance(entry, Shared)
        return Shared(_walk(entry.value, visit, path)) if shared else function(entry)

    return _walk(value, visit)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value, however deeply nested, including shared ones."""
    tensors: list[Tensor] = []
    map_tensors(value, lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def bind(kwargs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Return the arguments, after marking as `Shared` all tensors that are not per-sample."""

    def visit(_path: str, entry: Any) -> Any:
        own = isinstance(entry, Tensor) and entry.ndim > 0 and len(entry) == batch
        return entry if own or isinstance(entry, Shared) else Shared(entry)

    for name, value in () if is_traced() or batch == 1 else kwargs.items():
        labels = isinstance(value, np.ndarray) and value.ndim > 0
        labels = labels or (isinstance(value, list) and not tensors_in(value))
        if labels and len(value) == batch:
            expected = "a tensor for per-sample values, so that they are split with the samples"
            got = f"{describe_value(value)} as long as the batch"
            remedy = "Pass a tensor, or Shared(...) if all samples share it."
            warn(error_message(f"model_kwargs[{name!r}]", expected, value, remedy, got=got))
    return _walk(dict(kwargs), visit)


def per_sample(kwargs: Mapping[str, Any], function: Callable[[str, Tensor], Any]) -> Any:
    """Apply function(path, tensor) to each per-sample tensor in the bound arguments."""
    return _walk(
        kwargs, lambda path, entry: entry if isinstance(entry, Shared) else function(path, entry)
    )


def unmark(kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments without `Shared` marks, for the network."""

    def visit(path: str, entry: Any) -> Any:
        return _walk(entry.value, visit, path) if isinstance(entry, Shared) else entry

    return _walk(kwargs, visit)


def rows_note(kwargs: Mapping[str, Any], rows: int, batch: int) -> str:
    """Return a note on a failed call: the number of rows and the shapes of the arguments."""
    split: list[str] = []
    unchanged: list[str] = []

    def visit(path: str, entry: Any) -> Any:
        for tensor in tensors_in(entry):
            shapes = unchanged if isinstance(entry, Shared) else split
            shapes.append(f"{path} {tuple(tensor.shape)}")
        return entry

    _walk(kwargs, visit)
    note = (
        f"The network was called with {rows} rows for a batch of {batch}: probes repeat samples, "
        "and fraction and batch_size select some samples."
    )
    if split or unchanged:
        note += (
            f" Passed per sample: {', '.join(split) or 'none'}; passed unchanged: "
            f"{', '.join(unchanged) or 'none'}. Pass per-sample tensors as (B, ...)."
        )
    return note
