"""One style of error, and the one way a per-sample number meets a batch.

Every public function checks its arguments before any work and raises a `ValueError` or
`TypeError` that says what was expected, what came, and what to do. Names, shapes, dtypes and
devices are always checked, for they cost nothing. Values are checked only where looking at them
is free: on CPU tensors outside `torch.compile` and the transforms of `torch.func`. On an
accelerator a look would make the host wait for the device.
"""

__all__ = [
    "DerivativeError",
    "check_choice",
    "check_dense",
    "check_finite",
    "check_flag",
    "check_generator",
    "check_like",
    "check_model_kwargs",
    "check_not_empty",
    "check_number",
    "check_range",
    "check_sample_batch",
    "check_whole",
    "describe",
    "expand_right",
    "may_look",
    "over_elements",
    "owns_values",
]

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Number, Real
from typing import Any

import torch
from torch import Tensor

from hosm_losses._torch_internals import traced

RESERVED = ("x", "t", "self")  # by position in every call of the network


class DerivativeError(ValueError):
    """A derivative that cannot be taken, or would be wrong, with the remedy in its message."""


def describe(value: object) -> str:
    """Say what came: dtype, shape and device of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if value is None or isinstance(value, str | Number):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def may_look(tensor: Tensor) -> bool:
    """Whether reading a value of `tensor` back to the host is free."""
    return tensor.device.type == "cpu" and not traced() and owns_values(tensor)


def owns_values(tensor: Tensor) -> bool:
    """Whether these are values in memory: not a fake tensor, nor one of a torch.func transform."""
    try:
        return tensor.untyped_storage().device.type == tensor.device.type
    except (NotImplementedError, RuntimeError):
        return False


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the names in `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}; got {describe(value)}.")


def check_whole(name: str, value: object, minimum: int) -> int:
    """Return `value` as an int if it is a whole number, of Python or NumPy; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(
            f"{name}: expected a whole number of at least {minimum}; got {describe(value)}."
        )
    return int(value)


def check_number(
    name: str, value: object, what: str, *, above: float = -math.inf, at_most: float = math.inf
) -> float:
    """Return `value` as a float if it is a finite number in (above, at_most]; a bool is none.

    Args:
        name: of the argument.
        value: a number of Python or NumPy.
        what: the words for what is expected, such as "a number in (0, 1]".
        above: below every number that is taken.
        at_most: the largest number that is taken.

    Returns:
        The number.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and above < number <= at_most:
            return number
    raise ValueError(f"{name}: expected {what}; got {describe(value)}.")


def check_generator(generator: object, device: torch.device) -> torch.Generator | None:
    """Return `generator` if it is None or a generator of the device that draws are made on."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None; got {describe(generator)}. Make one "
            f"with torch.Generator({str(device)!r}).manual_seed(0)."
        )
    own = generator.device
    # Nothing is drawn on meta, which has no generators.
    if device.type != "meta" and (own.type, own.index or 0) != (device.type, device.index or 0):
        raise ValueError(
            f"generator: expected one on {device}, the device of the data; got one on {own}. Make "
            f"it with torch.Generator({str(device)!r})."
        )
    return generator


def check_model_kwargs(model_kwargs: object) -> dict[str, Any]:
    """Return the network's keyword arguments as a dict, {} for None."""
    if model_kwargs is None:
        return {}
    if not isinstance(model_kwargs, Mapping):
        raise TypeError(
            "model_kwargs: expected a mapping of the network's keyword arguments, such as "
            f"{{'y': labels}}, or None; got {describe(model_kwargs)}."
        )
    for key in model_kwargs:
        if not isinstance(key, str):
            raise TypeError(
                f"model_kwargs: expected names of keyword arguments as keys; got {describe(key)}."
            )
        if key in RESERVED:
            raise ValueError(
                f"model_kwargs: expected none of {', '.join(map(repr, RESERVED))}, which the call "
                f"of the network sets itself; got {key!r}. Leave it out, or rename it with "
                "ScoreModel(..., call=...)."
            )
    return dict(model_kwargs)


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless this is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False; got {describe(value)}.")


def check_dense(name: str, value: Tensor) -> None:
    """Raise TypeError for a sparse tensor, or one of another layout."""
    if value.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor (B, *); got one of layout {value.layout}. Convert "
            f"it with {name}.to_dense()."
        )


def check_sample_batch(name: str, value: object) -> Tensor:
    """Return `value` if it is a non-empty, finite, dense floating-point batch (B, *)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a floating-point tensor (B, *); got {describe(value)}.")
    check_dense(name, value)
    if value.is_complex():
        raise TypeError(
            f"{name}: expected a real floating-point tensor (B, *); got {describe(value)}. Give "
            f"its parts as channels, for example torch.view_as_real({name}), to a network that "
            "takes them so."
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor (B, *); got {describe(value)}. Scale "
            "integer images to the range the network was trained on first, for example "
            f"{name}.float() / 127.5 - 1; ode_nll does it with dequantization='uniform'."
        )
    check_not_empty(name, value)
    check_finite(name, value)
    return value


def check_not_empty(name: str, value: Tensor) -> None:
    """Raise ValueError unless this is a batch (B, *) with something in it."""
    if value.ndim == 0 or value.numel() == 0:
        raise ValueError(
            f"{name}: expected a batch (B, *) with at least one sample and one element; got "
            f"{describe(value)}. Skip empty batches, or set drop_last in the loader."
        )


def check_like(
    name: str,
    value: object,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    of: str,
) -> Tensor:
    """Return `value` if it is a tensor of exactly this shape, dtype and device, those of `of`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}; got {describe(value)}.")
    check_dense(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {shape}, that of {of}; got {describe(value)}. Nothing is "
            "broadcast."
        )
    if value.dtype != dtype:
        raise TypeError(
            f"{name}: expected {dtype}, to go with {of}; got {describe(value)}. Convert it with "
            f"{name}.to({dtype})."
        )
    if value.device != device:
        raise ValueError(
            f"{name}: expected device {device}, that of {of}; got {describe(value)}. Move it with "
            f"{name}.to({str(device)!r})."
        )
    return value


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError if a CPU tensor holds a NaN or an infinity."""
    if may_look(value) and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(
            f"{name}: expected finite values; got {bad} NaN or infinite of {value.numel()}."
        )


def check_range(name: str, value: Tensor, low: float, high: float) -> None:
    """Raise ValueError if a CPU tensor leaves [low, high]; NaN counts as outside."""
    if may_look(value) and not bool(((value >= low) & (value <= high)).all()):
        raise ValueError(
            f"{name}: expected values in [{low:g}, {high:g}], the range of the schedule; got "
            f"values in [{float(value.min()):g}, {float(value.max()):g}]. If the network counts "
            "time otherwise, convert it with ScoreModel(..., time=...), and give t in the "
            "schedule's units."
        )


def expand_right(per_sample: Tensor, like: Tensor) -> Tensor:
    """View a per-sample (B,) as (B, 1, …) so that it multiplies `like` (B, *) sample by sample."""
    return per_sample.reshape(per_sample.shape + (1,) * (like.ndim - per_sample.ndim))


def over_elements(tensor: Tensor) -> Tensor:
    """Sum over the elements of a sample, (K, B, *) to (K, B), in float32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.reshape(*tensor.shape[:2], -1).sum(-1, dtype=wide)
