r"""Choose the engine that differentiates a network, and remember which attempts failed.

Purpose:
    "auto" tries the taylor engine first, except for Jacobian products in eager mode, for which it
    tries reverse mode first. If the taylor engine cannot differentiate the network in eager mode,
    reverse mode takes over from the same buffers and random states, and the user is warned once.

    An engine's refusal is remembered for all calls of the same kind. Any other error may be due to
    a bad batch, so the engine is abandoned only if the next call of the same kind fails too. Once
    a call has succeeded with an engine, errors in later calls of the same kind reach the user.
    `check_derivatives` finds errors that only a backward pass would raise.

    If an error is raised here while torch.compile is tracing, the graph breaks and the call is
    repeated in eager mode. With fullgraph=True, the error reaches the user.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from hosm_losses import _torch_internals as internals
from hosm_losses._checks import DerivativeError, warn
from hosm_losses.derivatives import engines
from hosm_losses.derivatives.engines import Cotangent, Derivatives, Network, Products
from hosm_losses.derivatives.kinks import Past, memory_of
from hosm_losses.taylor import FINAL, ForeignCheckpointError, TaylorError

Engine = Literal["auto", "taylor", "reverse"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
UNKNOWN = (
    "network: expected operators that the engine 'taylor' knows; got {}. Use engine='reverse' "
    "without torch.compile, or compile without fullgraph=True. Alternatively, replace .detach_() "
    "and torch.no_grad() with .detach(), and other unknown operators with known operators."
)
STATISTICS = (
    "network: expected no running statistics in training, such as batch norm's, in a compiled "
    "loss of order three; got {}. Call .eval() on it, or use group norm."
)
ASK_THE_CHECK = "check_derivatives(model, x0) names the module at fault and the remedy."
# Errors raised by code that receives a Jet where it expects an ordinary tensor.
JET_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


class NetworkState:
    """Copies of a network's buffers, and of the random states of the CPU and of x's device."""

    def __init__(self, network: object, x: Tensor) -> None:
        owner = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
        modules = owner.modules() if isinstance(owner, nn.Module) else ()
        with torch.no_grad():
            self.buffers = [
                (module, name, buffer, buffer.clone(), internals.versions([buffer]))
                for module in modules
                for name, buffer in module.named_buffers(recurse=False)
            ]
        self.device_type = x.device.type
        # While a CUDA graph is captured, the generators' states cannot be read.
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        self.generators = None if captured else (torch.get_rng_state(), get_device_states(x))

    def restore(self, *, generators: bool = True) -> None:
        """Restore the buffers and, unless `generators` is False, the random generators."""
        with torch.no_grad():
            for module, name, buffer, value, version in self.buffers:
                setattr(module, name, buffer)
                # Batch norm updates a buffer without raising its version, and a graph may have
                # saved the buffer. Restoring it must then not raise the version either.
                (buffer.data if internals.versions([buffer]) == version else buffer).copy_(value)
        if generators and self.generators is not None:
            state, (devices, states) = self.generators
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=self.device_type)


def derive(
    network: Network,
    x: Tensor,
    w: Tensor,
    *,
    order: int,
    engine: str = "auto",
    summed: bool = False,
) -> Derivatives:
    """Return a network's value at x (B, *) and its derivatives along w (K, B, *).

    These are D and, at order 3, G; only its sum over the directions may be returned if `summed` is
    True. Under `torch.no_grad`, the results have no graph. Raises DerivativeError if the engine
    cannot differentiate the network or, with "auto", if neither engine can.
    """
    # Reverse mode is not traced: its checks for dropped graphs would be lost.
    if torch.compiler.is_compiling() and engine != "reverse":
        _refuse_statistics(network, order)
        # If the graph breaks in this block, the whole call is repeated in eager mode, because
        # torch.compile cannot trace the Jets and double backward passes of eager mode.
        with contextlib.suppress():  # noqa: B022
            try:  # no generator-based context manager, which PyTorch 2.6 does not trace
                return engines.taylor(network, x, w, order, summed)
            except TaylorError as error:
                raise unknown(error) from error
    # torch.compile has given up on this frame, but would compile the next frame unless disabled.
    known = "torch._dynamo" in sys.modules
    eagerly: Any = torch.compiler.disable(_derive_eagerly) if known else _derive_eagerly
    return eagerly(engine, network, x, w, order, summed)


def _derive_eagerly(
    engine: str, network: Network, x: Tensor, w: Tensor, order: int, summed: bool
) -> Derivatives:
    attempts = {
        "taylor": partial(engines.taylor, network, x, w, order, summed),
        "reverse": partial(engines.reverse, network, x, w, order),
    }
    if engine != "auto":
        try:
            return attempts[engine]()
        except TaylorError as error:
            raise unknown(error) from error
        except RuntimeError as error:
            _explain_engine(engine, error)
            raise
    return _first_to_serve(network, x, (order, summed, len(w) > 1), attempts, _neither)


def _neither(failures: dict[str, str]) -> NoReturn:
    why = "; ".join(f"{engine}: {why}" for engine, why in failures.items())
    raise DerivativeError(
        "network: expected operators that can be differentiated twice; got an operator that "
        f"neither engine can differentiate ({why}). {ASK_THE_CHECK}"
    )


def derive_with_products(
    network: Network,
    x: Tensor,
    w: Tensor,
    cotangent: Cotangent,
    *,
    order: int,
    engine: str = "auto",
    push: bool = False,
) -> Products:
    """Return the derivatives that `derive` returns, and Jacobian products with c = cotangent(f).

    The products are (∂f/∂x)ᵀ c and, if `push` is True, (∂f/∂x) c. In eager mode, "auto" tries
    reverse mode first, which computes products at a lower cost.
    """
    if torch.compiler.is_compiling() and engine != "reverse":
        with contextlib.suppress():  # noqa: B022 - as in `derive`
            return _products(network, x, w, cotangent, order, engine, push)
    known = "torch._dynamo" in sys.modules
    eagerly: Any = torch.compiler.disable(_products) if known else _products
    return eagerly(network, x, w, cotangent, order, engine, push)


def _products(
    network: Network,
    x: Tensor,
    w: Tensor,
    cotangent: Cotangent,
    order: int,
    engine: str,
    push: bool,
) -> Products:
    def beside(_: object = None) -> Products:
        derived, copied = partial(derive, order=order, engine=engine), order == 3
        return engines.products_beside(derived, network, x, w, cotangent, push=push, copied=copied)

    if engine == "taylor" or internals.is_traced():
        return beside()
    reverse = partial(engines.reverse_products, network, x, w, order, cotangent, push)
    if engine == "reverse":
        return reverse()
    kind = "products", order, push, len(w) > 1
    return _first_to_serve(network, x, kind, {"reverse": reverse}, beside)


def unknown(error: TaylorError) -> DerivativeError:
    """Return the DerivativeError for an operator that the taylor engine does not support."""
    return DerivativeError(UNKNOWN.format(str(error).rstrip(".")))


def _refuse_statistics(network: Network, order: int) -> None:
    """Raise an error before PyTorch's own, after which a loss cannot fall back to eager mode."""
    for part in getattr(network.owner, "modules", list)() if order == 3 else ():
        if part.training and getattr(part, "track_running_stats", False):
            raise DerivativeError(STATISTICS.format(type(part).__name__))


def _explain_engine(engine: str, error: RuntimeError) -> None:
    """Raise a DerivativeError if PyTorch's error shows that this engine cannot be used."""
    engines.refuse_scripted(engine, error)
    why = str(error)
    energy = engine == "taylor" and internals.NO_GRAPH in why
    if energy or any(words in why for words in internals.NOT_TWICE):
        after = ", which differentiates a network that takes a gradient itself" if energy else ""
        raise DerivativeError(
            f"network: expected operators that the engine {engine!r} can differentiate; got: "
            f"{why.splitlines()[0].rstrip('.')}. Leave engine at 'auto', which tries the other "
            f"engine{after}."
        ) from error


def _first_to_serve(
    network: Network,
    x: Tensor,
    kind: tuple[Any, ...],
    attempts: Mapping[str, Callable[[], Any]],
    otherwise: Callable[[dict[str, str]], Any],
) -> Any:
    """Return the result of the first engine that succeeds from the same state of the network.

    If none does, return that of `otherwise`, which receives the reason of each engine's failure.
    """
    owner, here = network.owner, internals.surroundings()
    kind = (*kind, x.dtype, x.device.type, getattr(owner, "training", None))
    memory, learned = memory_of(owner), dict[tuple[str, tuple[Any, ...]], Past]()
    failures: dict[str, str] = {}
    for engine, run in attempts.items():
        past = memory.engines.get((engine, kind), Past())
        if past.refused:
            failures[engine] = past.failure
            continue
        # No copy of the buffers, which may be large, if this engine has served before.
        before = None if here in past.served else NetworkState(owner, x)
        try:
            result = run()
        except Exception as error:
            if before is None and isinstance(error, TaylorError):
                raise unknown(error) from error
            engines.refuse_scripted(engine, error)
            if before is None or not _another_may_do(engine, error):
                raise
            before.restore()
            why = failures[engine] = (str(error) or repr(error)).splitlines()[0].rstrip(".")
            # Outer transforms or modes may be the cause and, of a RecursionError, the caller.
            if not any(here) and not isinstance(error, RecursionError):
                sure = isinstance(error, DerivativeError | TaylorError) or engine == "reverse"
                sure = sure or past.failure != ""
                learned[engine, kind] = past._replace(failure=why, refused=sure)
        else:
            learned[engine, kind] = past._replace(served=past.served | {here})
            break
    else:
        result = otherwise(failures)
    memory.engines.update(learned)
    if "taylor" in failures and not memory.warned:
        memory.warned = True
        warn(
            f"engine='auto': the engine 'taylor' could not differentiate {type(owner).__name__} "
            f"({failures['taylor']}), so reverse mode, which is slower, took its place."
        )
    return result


def _another_may_do(engine: str, error: Exception) -> bool:
    """Return whether the other engine may succeed after this error in `engine`.

    An error in the network's own code would occur with either engine.
    """
    text, kinds = str(error), engines.DroppedGraphError | ForeignCheckpointError
    if engine == "reverse":
        return isinstance(error, kinds) or any(words in text for words in internals.NOT_TWICE)
    if isinstance(error, FINAL):
        return False
    # A device error says nothing about the network. The exception that ends the recomputation by
    # a checkpoint around the loss is not one of the JET_ERRORS.
    failed = any(words in text for words in internals.DEVICE_ERROR_TEXT)
    return isinstance(error, JET_ERRORS) and not (
        failed or isinstance(error, torch.OutOfMemoryError)
    )


def never_warn(owner: object) -> None:
    """Suppress warnings about a network that is only examined, not trained."""
    memory = memory_of(owner)
    memory.warned = True
    memory.orders.update((2, 3))
