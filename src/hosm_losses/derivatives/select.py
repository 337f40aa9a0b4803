r"""The choice of the engine that differentiates a field, and what "auto" remembers of a network.

What:
    "auto" is the taylor engine. A network that it cannot carry derivatives through is given to
    reverse mode, which torch.compile cannot trace. A failed attempt leaves no trace in buffers and
    generators, and a warning is given once. What an engine refuses is remembered for such calls at
    once, any other error when it comes again in the next of them: it may be one of a bad batch.
    Once the engine has served such a call there is no other attempt, and an error is the user's.
    `check_derivatives` finds what a pass back would.

    An error that is raised here while torch.compile traces ends the graph, and the call is made
    again in eager mode. With fullgraph=True it is the user's.
"""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from hosm_losses._checks import DerivativeError, warn
from hosm_losses._torch_errors import DEVICE_ERROR_TEXT, NO_FORWARD, NO_GRAPH, NOT_TWICE
from hosm_losses._torch_internals import surroundings, traced, versions
from hosm_losses.derivatives import engines
from hosm_losses.derivatives.backward import DroppedGraphError, refuse_scripted
from hosm_losses.derivatives.engines import Cotangent, Derivatives, Field, Products
from hosm_losses.derivatives.kinks import memory_of
from hosm_losses.taylor import FINAL, ForeignCheckpointError, TaylorError

Engine = Literal["auto", "taylor", "reverse"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
UNKNOWN = (
    "network: expected operators that the engine 'taylor' knows; got {}. Take engine='reverse' "
    "and third='exact', uncompiled; under torch.compile leave out fullgraph=True. Or write "
    ".detach() in place of .detach_() and of torch.no_grad(), and the rest with other operators."
)
STATISTICS = (
    "network: expected no running statistics in training, as of batch norm, in a compiled loss of "
    "exact order three; got {}. Call .eval() on it, or take third='laplacian'."
)
ASK_THE_CHECK = "check_derivatives(model, x0) names the module and what to do."
# What code raises that meets a Jet and expected an ordinary tensor.
JET_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


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
                (module, name, buffer, buffer.clone(), versions([buffer]))
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
            for module, name, buffer, value, version in self.buffers:
                setattr(module, name, buffer)
                # A graph may have kept one that counts no change, as batch norm does of its own.
                (buffer.data if versions([buffer]) == version else buffer).copy_(value)
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
    engine: str = "auto",
    laplacian: bool = False,
    summed: bool = False,
) -> Derivatives:
    """The value of a field at x (B, *) and its derivatives along w = `direction` (K, B, *).

    Order 2 gives D; order 3 gives G as well, or in its place C = ∂²f[w, w] if `laplacian` is asked
    for, by the taylor engine alone. If `summed` the sum of either over the directions is enough;
    an engine may give that. Under `torch.no_grad` there is no graph. A DerivativeError where the
    engine, or with "auto" either engine, cannot differentiate the network.
    """
    given = (field, x, direction, order, laplacian, summed)
    if engine == "auto":
        return trace_all_or_nothing(_auto, *given)
    try:
        if engine == "reverse":
            return engines.reverse(*given)
        return trace_all_or_nothing(_taylor, *given)
    except RuntimeError as error:
        refuse_scripted(engine, error)
        why = str(error)
        energy = engine == "taylor" and NO_GRAPH in why
        if not energy and not any(words in why for words in (NO_FORWARD, *NOT_TWICE)):
            raise
        after = ", which differentiates a network that takes a gradient itself" if energy else ""
        raise DerivativeError(
            f"network: expected operators that the engine {engine!r} can differentiate; got: "
            f"{why.splitlines()[0].rstrip('.')}. Leave engine at 'auto', which tries the other "
            f"engine{after}."
        ) from error


def derive_with_products(
    field: Field,
    x: Tensor,
    direction: Tensor,
    cotangent: Cotangent,
    *,
    order: int,
    engine: str = "auto",
    laplacian: bool = False,
    push: bool = False,
) -> Products:
    """The same as `derive` with (∂f/∂x)ᵀ c, and if `push` ∂f/∂x c; c = cotangent(f) (C, B, *).

    "auto" is reverse mode, which costs least here, where it can be; then as in `derive`.
    """
    given, tries = (field, x, direction, order, cotangent, push), None
    if engine in ("auto", "reverse") and not laplacian and not traced():
        if engine == "reverse":
            return engines.reverse_products(*given)
        tries = _Attempts(field, x, "products", order, push, len(direction) > 1)
        reverse = partial(trace_all_or_nothing, engines.reverse_products)
        found = tries.run("reverse", reverse, *given)
        if found is not None:
            return found

    def derived(field: Field, x: Tensor, direction: Tensor) -> Derivatives:
        return derive(field, x, direction, order=order, engine=engine, laplacian=laplacian)

    given = (field, x, direction, cotangent, push, order == 3 and not laplacian)
    found = trace_all_or_nothing(engines.products_beside, derived, *given)
    if tries is not None:
        tries.remember()
    return found


def trace_all_or_nothing(function: Callable[..., Any], *given: Any) -> Any:
    """Call a function that torch.compile traces as a whole, or no part of."""
    if torch.compiler.is_compiling():
        # Where the graph breaks in such a block, all of this call is made again in eager mode.
        # torch.compile cannot look into what the engines call there, Jets and double passes back.
        with contextlib.suppress():  # noqa: B022
            return function(*given)
    if "torch._dynamo" in sys.modules:
        function = torch.compiler.disable(function)
    return function(*given)


def _taylor(field: Field, *given: Any) -> Derivatives:
    """The taylor engine; an error of the library where it cannot carry derivatives."""
    exact = torch.compiler.is_compiling() and given[2] == 3 and not given[3]
    # PyTorch lets no buffer change there, and breaks off without a way back to eager mode.
    for part in getattr(field.owner, "modules", list)() if exact else ():
        if part.training and getattr(part, "track_running_stats", False):
            raise DerivativeError(STATISTICS.format(type(part).__name__))
    try:
        return engines.taylor(field, *given)
    except TaylorError as error:
        raise DerivativeError(UNKNOWN.format(str(error).rstrip("."))) from error


class _Attempts:
    """Engines that are tried in turn for one call, each with the network as it was."""

    def __init__(self, field: Field, x: Tensor, *kind: object) -> None:
        self.owner, self.x, self.memory = field.owner, x, memory_of(field.owner)
        self.kind = (*kind, x.dtype, x.device.type, getattr(self.owner, "training", None))
        self.around = surroundings()
        self.reasons: dict[str, str] = {}
        self.notes: dict[Any, dict[Any, str]] = {}

    def run(self, engine: str, function: Callable[..., Any], *given: Any) -> Any:
        """What an engine returns; None where it cannot take the call, and another may."""
        call = engine, self.kind
        if call in self.memory.refused:
            self.reasons[engine] = self.memory.refused[call]
            return None
        if (*call, self.around) in self.memory.served:  # buffers may be large: none is copied
            return function(*given)
        before = Snapshot(self.owner, self.x)
        try:
            derived = function(*given)
        except Exception as error:
            refuse_scripted(engine, error)
            if not _another_may_do(engine, error):
                raise
            before.restore()
            cause = error.__cause__ if isinstance(error.__cause__, TaylorError) else error
            self.reasons[engine] = (str(cause) or repr(cause)).splitlines()[0].rstrip(".")
            # How deep calls go depends on who calls, and not on the network alone.
            if not any(self.around) and not isinstance(error, RecursionError):
                sure = isinstance(error, DerivativeError) or engine == "reverse"
                sure = sure or call in self.memory.failed
                self.notes[call] = self.memory.refused if sure else self.memory.failed
            return None
        self.memory.served.add((*call, self.around))
        return derived

    def remember(self) -> None:
        """Keep why engines failed, unless that may lie in what surrounds the call."""
        for call, notes in self.notes.items():
            notes[call] = self.reasons[call[0]]


def _auto(field: Field, x: Tensor, direction: Tensor, *options: Any) -> Derivatives:
    given, laplacian = (field, x, direction, *options), options[1]
    if torch.compiler.is_compiling():  # which cannot trace reverse mode
        return _taylor(*given)
    tries = _Attempts(field, x, *options, len(direction) > 1)
    derived = tries.run("taylor", _taylor, *given)
    if derived is not None:
        return derived
    before = Snapshot(field.owner, x) if laplacian else None
    derived = tries.run("reverse", engines.reverse, *given)
    if derived is None:
        told = "; ".join(f"{engine}: {why}" for engine, why in tries.reasons.items())
        raise DerivativeError(
            "network: expected operators that can be differentiated twice; got one that cannot, "
            f"by any engine ({told}). {ASK_THE_CHECK}"
        )
    tries.remember()
    if before is not None:
        before.restore()
        raise DerivativeError(UNKNOWN.format(tries.reasons["taylor"]))
    _warn_once(tries)
    return derived


def _another_may_do(engine: str, error: Exception) -> bool:
    """Whether the other engine may do better; what is wrong with the network is raised by both."""
    text, kinds = str(error), DroppedGraphError | ForeignCheckpointError
    if engine == "reverse":
        return isinstance(error, kinds) or any(words in text for words in NOT_TWICE)
    if isinstance(error, FINAL):
        return False
    # A device that failed says nothing about the network. What a checkpoint around the loss
    # raises to end its recomputation is none of these errors.
    failed = any(words in text for words in DEVICE_ERROR_TEXT)
    return isinstance(error, JET_ERRORS) and not (
        failed or isinstance(error, torch.OutOfMemoryError)
    )


def _warn_once(tries: _Attempts) -> None:
    """Say that reverse mode takes over, once for a network."""
    if not tries.memory.said:
        tries.memory.said = True
        warn(
            f"engine='auto': the engine 'taylor' could not differentiate "
            f"{type(tries.owner).__name__} ({tries.reasons['taylor']}), so reverse "
            "mode, which is slower, took its place."
        )


def never_warn(owner: object) -> None:
    """Give no warning about this network: it is a copy, and no training step is taken."""
    memory = memory_of(owner)
    memory.said = True
    memory.orders.update((2, 3))
