r"""The choice of the engine that differentiates a field, and what "auto" remembers of a network.

What:
    "auto" is the taylor engine. A network that it cannot carry derivatives through is given to
    reverse mode, which torch.compile cannot trace. A failed attempt leaves no trace in buffers and
    generators. It is remembered, and said once. `check_derivatives` finds what a pass back would.
"""

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from hosm_losses._checks import DerivativeError, users_level
from hosm_losses._torch_errors import DEVICE_ERROR_TEXT, NO_FORWARD, NOT_TWICE
from hosm_losses._torch_internals import surrounded, traced, versions
from hosm_losses.derivatives import engines, products
from hosm_losses.derivatives.backward import DroppedGraphError, refuse_scripted
from hosm_losses.derivatives.engines import Derivatives, Field
from hosm_losses.derivatives.kinks import orders_seen
from hosm_losses.derivatives.products import Cotangent, Products
from hosm_losses.derivatives.under_compile import compiled, refuse_statistics
from hosm_losses.taylor import FINAL, ForeignCheckpointError, TaylorError

Engine = Literal["auto", "taylor", "reverse"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
ASK_THE_CHECK = "check_derivatives(model, x0) names the module and what to do."
# What code raises that meets a Jet and expected an ordinary tensor.
JET_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass
class _Choice:
    """What is remembered of a network: the engines that do not work, why, and what was said.

    `said` has whether third="laplacian" was asked for, of each warning that was given.
    """

    refused: dict[str, str] = field(default_factory=dict)
    said: set[bool] = field(default_factory=set)


_CHOICES: "weakref.WeakKeyDictionary[Any, _Choice]" = weakref.WeakKeyDictionary()


def _choice(owner: object) -> _Choice:
    try:
        return _CHOICES.setdefault(owner, _Choice())
    except TypeError:  # a callable that cannot be referred to weakly, or not hashed
        return _Choice()


class _Kept(NamedTuple):
    """A buffer, and what it was."""

    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor
    version: list[int]

    @property
    def is_changed(self) -> bool:
        """Whether it was changed in place; one made in inference mode does not tell."""
        return versions([self.buffer]) != self.version


class Snapshot:
    """The buffers of a network and the state of torch's generators, to be restored.

    Of a network that is no Module, nor a method of one, no buffers are seen. `x` is its input, for
    the devices.
    """

    def __init__(self, network: object, x: Tensor) -> None:
        owner = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
        modules = owner.modules() if isinstance(owner, nn.Module) else ()
        with torch.no_grad():
            self.buffers = [
                _Kept(module, name, buffer, buffer.clone(), versions([buffer]))
                for module in modules
                for name, buffer in module.named_buffers(recurse=False)
            ]
        self.device_type = x.device.type
        # Inside a CUDA graph the state cannot be asked for.
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        self.generators = None if captured else (torch.get_rng_state(), get_device_states(x))

    def restore(self, *, generators: bool = True) -> None:
        """Put the buffers back, and the generators unless they are to stay where they are."""
        with torch.no_grad():
            for each in self.buffers:
                setattr(each.module, each.name, each.buffer)
                # A graph may have kept one that counts no change, as batch norm does of its own.
                (each.buffer if each.is_changed else each.buffer.data).copy_(each.value)
        if generators and self.generators is not None:
            state, (devices, states) = self.generators
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=self.device_type)


def derive(
    field: Field,
    x: Tensor,
    direction: Tensor,
    *,
    order: int,
    derivative: str = "auto",
    laplacian: bool = False,
    summed: bool = False,
) -> Derivatives:
    """The value of a field at x (B, *) and its derivatives along w = `direction` (K, B, *).

    Order 2 gives D; order 3 gives G as well, or in its place C = ∂²f[w, w] if `laplacian` is asked
    for: by the taylor engine alone, so that with "auto" it may be G. If `summed` the sum of either
    over the directions is enough; an engine may give that. Under `torch.no_grad` there is no
    graph. A DerivativeError where the engine, or with "auto" either engine, cannot differentiate
    the network.
    """
    given = (field, x, direction, order, laplacian, summed)
    if derivative == "auto":
        return whole(_auto, *given)
    try:
        if derivative == "reverse":
            return engines.reverse(*given)
        if torch.compiler.is_compiling():
            refuse_statistics(field.owner, order, laplacian)
        return whole(engines.taylor, *given)
    except TaylorError as error:
        raise DerivativeError(
            f"network: expected operators that the engine 'taylor' knows; got {error} Leave "
            "derivative at 'auto', which finds another engine."
        ) from error
    except RuntimeError as error:
        refuse_scripted(derivative, error)
        why = str(error)
        missing = any(words in why for words in (NO_FORWARD, *NOT_TWICE))
        if isinstance(error, DerivativeError) or not missing:
            raise
        raise DerivativeError(
            f"network: expected operators that the engine {derivative!r} can differentiate; got: "
            f"{why.splitlines()[0]} Leave derivative at 'auto', which tries the other engine."
        ) from error


def derive_with_products(
    field: Field,
    x: Tensor,
    direction: Tensor,
    cotangent: Cotangent,
    *,
    order: int,
    derivative: str = "auto",
    laplacian: bool = False,
    push: bool = False,
) -> Products:
    """The same as `derive` with (∂f/∂x)ᵀ c, and if `push` ∂f/∂x c; c = cotangent(f) (C, B, *).

    "auto" is reverse mode, which costs least here, where it can be; then as in `derive`.
    """
    given = (field, x, direction, order, cotangent, push)
    if derivative in ("auto", "reverse") and not laplacian and not traced():
        if derivative == "reverse":
            return products.reverse_products(*given)
        if "reverse" not in _choice(field.owner).refused:
            before = Snapshot(field.owner, x)
            try:
                return whole(products.reverse_products, *given)
            except Exception as error:
                if not _another_may_do("reverse", error):
                    raise
                before.restore()
                _choice(field.owner).refused["reverse"] = str(error)

    def derived(field: Field, x: Tensor, direction: Tensor) -> Derivatives:
        return derive(field, x, direction, order=order, derivative=derivative, laplacian=laplacian)

    return whole(products.products_beside, derived, *given)


def whole(function: Callable[..., Any], *given: Any) -> Any:
    """Call a function that torch.compile traces as a whole, or no part of."""
    if torch.compiler.is_compiling():
        # Where the graph breaks in such a block, all of this call is made again in eager mode.
        # torch.compile cannot look into what the engines call there, Jets and double passes back.
        with contextlib.suppress():  # noqa: B022
            return function(*given)
    if "torch._dynamo" in sys.modules:
        function = torch.compiler.disable(function)
    return function(*given)


def _auto(
    field: Field,
    x: Tensor,
    direction: Tensor,
    order: int,
    laplacian: bool,
    summed: bool,
) -> Derivatives:
    given = (field, x, direction, order, laplacian, summed)
    if torch.compiler.is_compiling():
        return compiled(*given)
    owner = field.owner
    choice = _choice(owner)
    reasons, deep = dict(choice.refused), False
    for engine in ENGINES[1:]:
        if engine in choice.refused:
            continue
        before = Snapshot(owner, x)
        try:
            derived = getattr(engines, engine)(*given)
        except Exception as error:
            refuse_scripted(engine, error)
            if not _another_may_do(engine, error):
                raise
            before.restore()
            reasons[engine] = (str(error) or repr(error)).splitlines()[0]
            deep |= isinstance(error, RecursionError)
            continue
        if engine != "taylor":
            # How deep calls go depends on who calls, and not on the network alone.
            if not deep and not surrounded():
                choice.refused.update(reasons)
            _warn_once(owner, reasons["taylor"], laplacian)
        return derived
    told = "; ".join(f"{engine}: {why}" for engine, why in reasons.items())
    raise DerivativeError(
        "network: expected operators that can be differentiated twice; got one that cannot, by "
        f"any engine ({told}). {ASK_THE_CHECK}"
    )


def _another_may_do(engine: str, error: Exception) -> bool:
    """Whether the other engine may do better; what is wrong with the network is raised by both."""
    text, kinds = str(error), DroppedGraphError | ForeignCheckpointError
    if engine == "reverse":
        return isinstance(error, kinds) or any(words in text for words in NOT_TWICE)
    if isinstance(error, FINAL):
        return False
    # A device that failed says nothing about the network. What a checkpoint around the loss
    # raises to end its recomputation is none of these errors.
    failed = isinstance(error, torch.OutOfMemoryError)
    failed = failed or any(words in text for words in DEVICE_ERROR_TEXT)
    return isinstance(error, JET_ERRORS) and not failed


def _warn_once(owner: object, why: str, laplacian: bool) -> None:
    """Say that reverse mode takes over, once for a network; where it takes G for C once more."""
    said = _choice(owner).said
    if laplacian not in said:
        said.add(laplacian)
        exact = ", and third='exact' that of 'laplacian'" if laplacian else ""
        warnings.warn(
            f"derivative='auto': the engine 'taylor' cannot differentiate {type(owner).__name__} "
            f"({why.rstrip('.')}), so reverse mode, which is slower, takes its place{exact}.",
            stacklevel=users_level(),
        )


def never_warn(owner: object) -> None:
    """Give no warning about this network: it is a copy, and no training step is taken."""
    _choice(owner).said.update((False, True))
    orders_seen(owner).update((2, 3))
