"""Shared helpers: argument checks, error messages, per-sample sums and a progress bar.

Before it does any work, every public function checks option names, shapes, dtypes and devices. A
wrong type or dtype raises TypeError, any other invalid argument ValueError. The values in a tensor
are checked only on the CPU and outside `torch.compile` and `torch.func` transforms, because
reading them from an accelerator would force a synchronisation.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from numbers import Integral, Number, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hosm_losses._torch_internals import (
    is_traced,
    leave_inference_mode,
    outside_inference_mode,
)
from hosm_losses.taylor import DerivativeError as DerivativeError
from hosm_losses.taylor import at_least_float32 as at_least_float32

SELECT = (
    "Select the prediction with ScoreModel(..., output=...): output=lambda out: out[0], "
    "operator.attrgetter('sample') or, if it predicts a variance too, the first channels, "
    "lambda out: out[:, :C]. Pass a single sample as x[None]."
)
BAR_FORMAT = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"


def error_message(
    name: str, expected: str, value: object, remedy: str = "", *, got: str | None = None
) -> str:
    """Return an error message; if `got` is None, it describes `value`."""
    got = describe_value(value) if got is None else got
    return f"{name}: expected {expected}; got {got}. {remedy}".rstrip()


def not_a_tensor(name: str, expected: str, value: object) -> TypeError:
    """Return the TypeError for a value that is not a tensor."""
    is_array = isinstance(value, np.ndarray)
    remedy = f"Convert it with torch.from_numpy({name})." if is_array else ""
    return TypeError(error_message(name, expected, value, remedy))


def describe_value(value: object) -> str:
    """Describe a tensor by its dtype, shape and device, and most other objects by their type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype}, shape {value.shape}"
    if value is None or isinstance(value, str | Number | type):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def shown(value: object) -> str:
    """Return a tensor's shape, a function's name or, for most other values, the repr."""
    if isinstance(value, Tensor) and value.ndim:
        return f"<{tuple(value.shape)}>"
    if type(value) is tuple:
        return f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    if isinstance(value, partial):
        return f"partial({shown(value.func)}, ...)"
    if type(value).__repr__ is object.__repr__:  # would print an address
        return f"<{type(value).__name__}>"
    return getattr(value, "__qualname__", None) or repr(value)


def warn(message: str) -> None:
    """Issue a warning that points to the first caller outside this package and torch."""
    level, frame, libraries = 1, sys._getframe(), ("hosm_losses.", "torch.")
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(libraries):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def can_read_values(tensor: Tensor) -> bool:
    """Return whether the host can read the values of `tensor` at no cost."""
    return tensor.device.type == "cpu" and not is_traced() and owns_values(tensor)


def owns_values(tensor: Tensor) -> bool:
    """Return whether a tensor is neither fake nor inside a torch.func transform."""
    try:
        return tensor.untyped_storage().device.type == tensor.device.type
    except (NotImplementedError, RuntimeError):
        return False


def copy_like(copies: dict[Any, Tensor], like: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Return the constant from `make` as `like`; `copies` keeps one for each device and dtype."""
    key = like.device, like.dtype
    if key in copies:
        return copies[key]
    with outside_inference_mode():
        copy = make().to(like.dtype).to(like.device)
    if torch.compiler.is_compiling() or owns_values(copy):
        copies[key] = copy
    return copy


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise TypeError unless `value` is a string, and ValueError unless it is in `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(error_message(name, f"one of {', '.join(map(repr, choices))}", value))


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(error_message(name, "True or False", value))


def check_whole(name: str, value: object, minimum: int) -> int:
    """Return `value`, a Python or NumPy integer of at least `minimum`, as an int."""
    expected = f"a whole number of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(error_message(name, expected, value))
    if value < minimum:
        raise ValueError(error_message(name, expected, value))
    return int(value)


def check_number(
    name: str, value: object, what: str, *, above: float = -math.inf, at_most: float = math.inf
) -> float:
    """Return `value`, a finite real number in (above, at_most], which `what` describes."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(error_message(name, what, value))
    number = float(value)
    # Comparisons are used because torch.compile can trace them.
    if not (-math.inf < number < math.inf and above < number <= at_most):
        raise ValueError(error_message(name, what, value))
    return number


def check_shape(name: str, value: object, expected: str = "a shape such as (2,)") -> torch.Size:
    """Return `value` as a shape; raise TypeError unless it is a sequence of whole numbers."""
    if not isinstance(value, Sequence):
        raise not_a_tensor(name, expected, value)
    return torch.Size(value)


def check_model_kwargs(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the network's keyword arguments as a dict; None becomes an empty dict."""
    return dict(model_kwargs or {})


def check_sample_batch(name: str, value: object, *, images: bool = True) -> Tensor:
    """Return `value`, a non-empty, finite floating-point batch (B, *).

    If `images` is True, the error for an integer tensor explains how to scale integer images.
    """
    expected = "floating-point tensor (B, *)"
    if not isinstance(value, Tensor):
        raise not_a_tensor(name, f"a {expected}", value)
    if not value.is_floating_point():
        remedy = f"Convert it with {name}.float()."
        if value.is_complex():
            remedy = "Pass real numbers, for example from torch.view_as_real."
        elif images and value.dtype != torch.bool:
            remedy = (
                "First scale integer images to the range the network was trained on, for example "
                f"{name}.float() / 127.5 - 1; ode_nll does it with dequantization=Uniform()."
            )
        raise TypeError(error_message(name, f"a {expected}", value, remedy))
    if value.ndim == 0 or value.numel() == 0:
        expected = "a batch (B, *) with at least one sample and one element"
        remedy = "Skip empty batches, or set drop_last in the loader."
        raise ValueError(error_message(name, expected, value, remedy))
    check_finite(name, value)
    return leave_inference_mode(value)


def check_like(
    name: str,
    value: object,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    of: str,
) -> Tensor:
    """Return `value`, a tensor of this shape, dtype and device; `of` names what it must match.

    A tensor created in inference mode is cloned.
    """
    if not isinstance(value, Tensor):
        raise not_a_tensor(name, f"a tensor of shape {shape}", value)
    if tuple(value.shape) != shape:
        expected = f"shape {shape}, to match {of}"
        raise ValueError(error_message(name, expected, value, "Nothing is broadcast."))
    if value.dtype != dtype:
        remedy = f"Convert it with {name}.to({dtype})."
        raise TypeError(error_message(name, f"{dtype}, to match {of}", value, remedy))
    if value.device != device:
        remedy = f"Move it with {name}.to({str(device)!r})."
        raise ValueError(error_message(name, f"device {device}, to match {of}", value, remedy))
    return leave_inference_mode(value)


def check_prediction(predicted: object, x: Tensor, remedy: str = SELECT) -> None:
    """Raise an error unless `predicted` is a floating-point tensor with x's shape and device."""
    kind = TypeError
    if isinstance(predicted, Tensor) and predicted.is_floating_point():
        if predicted.shape == x.shape and predicted.device == x.device:
            return
        kind = ValueError
    expected = f"floating-point outputs like x, of shape {tuple(x.shape)} on {x.device}"
    raise kind(error_message("network", expected, predicted, remedy))


def all_finite(value: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    # A sum takes one pass, and is finite only if all its terms are.
    return math.isfinite(value.detach().sum().item()) or bool(torch.isfinite(value).all())


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError if a CPU tensor contains NaN or an infinity."""
    if can_read_values(value) and not all_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        got = f"{bad} NaN or infinite values among {value.numel()}"
        raise ValueError(error_message(name, "finite values", value, got=got))


def check_range(name: str, value: Tensor, low: float, high: float) -> None:
    """Raise ValueError if a CPU tensor has values outside [low, high]; NaN counts as outside."""
    if can_read_values(value) and not bool(((value >= low) & (value <= high)).all()):
        expected = f"values in [{low:.9g}, {high:.9g}], the range of the schedule"
        least, largest = value.min().item(), value.max().item()
        got = f"{least:.9g}" if least == largest else f"values in [{least:.9g}, {largest:.9g}]"
        remedy = (
            "If the network uses another time, convert it with ScoreModel(..., time=...), and "
            "pass t in the schedule's units. If a solver steps past the end, give it "
            "schedule.clip(t)."
        )
        raise ValueError(error_message(name, expected, value, remedy, got=got))


def expand_right(per_sample: Tensor, like: Tensor) -> Tensor:
    """Reshape a tensor (B,) to (B, 1, …), so that it broadcasts against `like` (B, *)."""
    return per_sample.reshape(per_sample.shape + (1,) * (like.ndim - per_sample.ndim))


def noised(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return α x₀ + σ ε of x₀ and ε (B, *), where α and σ are (B,) or broadcast to x₀."""
    return expand_right(alpha, x0) * x0 + expand_right(sigma, x0) * eps


def widest_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype for sums, states and targets: float64, or float32 if `tensor` is on MPS."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def sum_elements(tensor: Tensor, leading: int = 2) -> Tensor:
    """Sum the elements of each sample, in at least float32, over all but `leading` dimensions."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.reshape(*tensor.shape[:leading], -1).sum(-1, dtype=wide)


def generator_kwargs(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the keyword arguments that pass `generator`.

    torch.compile rejects generator=None if tensor sizes may vary between calls.
    """
    return {} if generator is None else {"generator": generator}


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Return a context manager that restores the random states of the CPU and `device` on exit."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


@contextmanager
def progress_bar(visible: bool, total: float, unit: str) -> Iterator[Callable[[float], object]]:
    """Yield a function that advances a progress bar; a visible one requires tqdm."""
    if not visible:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=unit, bar_format=BAR_FORMAT) as bar:
        yield bar.update
