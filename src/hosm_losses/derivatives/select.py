r"""The choice of the engine that differentiates a field, and what "auto" remembers of a network.

What:
    "auto" is the taylor engine. A network that it cannot carry derivatives through is given to
    reverse mode (which torch.compile cannot trace), and one that PyTorch cannot differentiate
    twice to forward mode. A failed attempt leaves no trace in buffers and generators. It is
    remembered, and said once with its price. `check_derivatives` finds what a pass back would.

Cost, in network evaluations with the parameter gradient (a first-order step is 3):
    `EVALUATIONS`. K directions share the value at order two and with C; for G all engines but
    "forward" fold them into the batch.
"""

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hosm_losses._checks import DerivativeError, users_level
from hosm_losses._torch_internals import (
    DEVICE_ERROR_TEXT,
    NOT_TWICE,
    surrounded,
    traced,
)
from hosm_losses.derivatives import engines, products
from hosm_losses.derivatives.backward import DroppedGraphError
from hosm_losses.derivatives.engines import Derivatives, Field
from hosm_losses.derivatives.hooks import FINAL
from hosm_losses.derivatives.primitive_mode import ForeignCheckpointError
from hosm_losses.derivatives.products import Cotangent, Products
from hosm_losses.derivatives.snapshot import Snapshot
from hosm_losses.derivatives.taylor import CutError, TaylorError
from hosm_losses.derivatives.under_compile import CUT, compiled, refuse_statistics

Engine = Literal["auto", "taylor", "reverse", "forward"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
ASK_THE_CHECK = "check_derivatives(model, x0) names the module and what to do."
# What code raises that meets a Jet and expected an ordinary tensor.
JET_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
# Network evaluations of a training step.
EVALUATIONS = {
    "order two": {"taylor": 6, "reverse": 7, "forward": 8},
    "third='exact'": {"taylor": 12, "reverse": 12, "forward": 16},
    "third='laplacian'": {"taylor": 9, "forward": 22},
    "third='sliced'": {"taylor": 12, "forward": 22},
}


@dataclass
class _Choice:
    """What is remembered of a network: the engines that do not work, why, and what was said."""

    refused: dict[str, str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)


_CHOICES: "weakref.WeakKeyDictionary[Any, _Choice]" = weakref.WeakKeyDictionary()


def _choice(owner: object) -> _Choice:
    try:
        return _CHOICES.setdefault(owner, _Choice())
    except TypeError:  # a callable that cannot be referred to weakly, or not hashed
        return _Choice()


def derive(
    field: Field,
    x: Tensor,
    direction: Tensor,
    *,
    order: int,
    derivative: str = "auto",
    second_direction: Tensor | None = None,
    summed: bool = False,
) -> Derivatives:
    """The value of a field at x (B, *) and its derivatives along w = `direction` (K, B, *).

    Order 2 gives D; order 3 gives G as well, or C for u = `second_direction`, as `Curved`: not by
    the reverse engine, and with "auto" only where C costs less than G. If `summed` the sum over
    the directions is enough, of G, or of C with the direction itself; an engine may give either.
    Under `torch.no_grad` there is no graph. A DerivativeError where the engine, or with "auto"
    any engine, cannot differentiate the network.
    """
    compiling = torch.compiler.is_compiling()
    if derivative == "auto":
        return whole(_auto, field, x, direction, order, second_direction, summed)
    dearer = derivative == "forward" and second_direction is not None
    if dearer and not compiling:
        kind = _kind(direction, order, second_direction)
        _warn_once(_choice(field.owner), f"forward, {kind}", _price_of_forward, kind)
    # A transform around may have put its own tensors in the place of buffers.
    before = Snapshot(field.owner, x) if derivative == "forward" and not traced() else None
    given = (field, x, direction, order, second_direction, summed)
    try:
        if derivative == "reverse":
            return engines.reverse(*given)
        if compiling:
            refuse_statistics(field.owner, order, second_direction)
        found = whole(getattr(engines, derivative), *given)
        if before is not None:
            before.refuse_escaped()
        return found
    except TaylorError as error:
        if compiling and isinstance(error, CutError):
            raise DerivativeError(CUT.format(error.args[0])) from error
        raise DerivativeError(
            f"network: expected operators that the engine 'taylor' knows; got {error} Leave "
            "derivative at 'auto', which finds another engine."
        ) from error


def derive_with_products(
    field: Field,
    x: Tensor,
    direction: Tensor,
    cotangent: Cotangent,
    *,
    order: int,
    derivative: str = "auto",
    second: bool = False,
    push: bool = False,
) -> Products:
    """The same as `derive` with (∂f/∂x)ᵀ c, and if `push` ∂f/∂x c; c = cotangent(f) (C, B, *).

    "auto" is reverse mode, which costs least here, where it can be; then as in `derive`. With
    `second` the third is ∂²f[w, w], if an engine can.
    """
    given = (field, x, direction, order, cotangent, push)
    if derivative in ("auto", "reverse") and not second and not traced():
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
        u = direction if second else None
        return derive(field, x, direction, order=order, derivative=derivative, second_direction=u)

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
    second_direction: Tensor | None,
    summed: bool,
) -> Derivatives:
    if torch.compiler.is_compiling():
        return compiled(field, x, direction, order, second_direction, summed)
    owner = field.owner
    choice = _choice(owner)
    reasons, deep = dict(choice.refused), False
    for engine in ENGINES[1:]:
        if engine in choice.refused:
            continue
        # C costs less than G by the taylor engine alone.
        given = second_direction if engine == "taylor" else None
        before = Snapshot(owner, x)
        try:
            derived = getattr(engines, engine)(field, x, direction, order, given, summed)
        except Exception as error:
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
            kind = _kind(direction, order, second_direction)
            _warn_once(choice, kind, _price_of_another, owner, reasons["taylor"], engine, kind)
        return derived
    told = "; ".join(f"{engine}: {why}" for engine, why in reasons.items())
    raise DerivativeError(
        "network: expected operators that can be differentiated twice; got one that cannot, by "
        f"any engine ({told}). {ASK_THE_CHECK}"
    )


def _another_may_do(engine: str, error: Exception) -> bool:
    """Whether another engine may do better; what is wrong with the network is raised by all."""
    text, kinds = str(error), DroppedGraphError | ForeignCheckpointError
    if engine == "reverse":
        return isinstance(error, kinds) or any(words in text for words in NOT_TWICE)
    if isinstance(error, FINAL):
        return False
    if engine == "taylor":
        # A device that failed says nothing about the network. What a checkpoint around the loss
        # raises to end its recomputation is none of these errors.
        failed = isinstance(error, torch.OutOfMemoryError)
        failed = failed or any(words in text for words in DEVICE_ERROR_TEXT)
        return isinstance(error, JET_ERRORS) and not failed
    return isinstance(error, RuntimeError)


def _kind(direction: Tensor, order: int, second_direction: Tensor | None) -> str:
    """The row of `EVALUATIONS` that was asked for."""
    if order == 2:
        return "order two"
    if second_direction is None:
        return "third='exact'"
    return "third='laplacian'" if second_direction is direction else "third='sliced'"


def _price_of_another(owner: object, why: str, engine: str, kind: str) -> str:
    """What is said where an engine other than "taylor" gives D and G."""
    costs = EVALUATIONS[kind]
    price = EVALUATIONS[kind if "reverse" in costs else "third='exact'"][engine]
    before = f" instead of {costs['taylor']}" if price != costs["taylor"] else ""
    told = (
        f"derivative='auto': the engine 'taylor' cannot differentiate {type(owner).__name__} "
        f"({why}) The engine {engine!r} takes its place: for {kind} a training step takes "
        f"{price} evaluations of the network{before}, and more time for each."
    )
    if "reverse" not in costs:  # G takes the place of C
        told += (
            f" {kind} in forward mode costs more than 'exact', {costs['forward']} "
            f"evaluations, so 'exact' is taken; derivative='forward' keeps {kind}."
        )
    return told


def _price_of_forward(kind: str) -> str:
    """What is said where forward mode was asked for, and the exact third order costs less."""
    costs, exact = EVALUATIONS[kind], EVALUATIONS["third='exact'"]
    return (
        f"derivative='forward': for {kind} a training step takes {costs['forward']} evaluations "
        f"of the network, for third='exact' {exact['forward']}; the engine 'taylor' takes "
        f"{costs['taylor']}."
    )


def _warn_once(choice: _Choice, kind: str, text: Callable[..., str], *args: object) -> None:
    """Warn, once for a network and a kind of loss."""
    if kind not in choice.said:
        choice.said.add(kind)
        warnings.warn(text(*args), stacklevel=users_level())


def say_no_price(owner: object) -> None:
    """Give no warning about this network: it is a copy, and no training step is taken."""
    _choice(owner).said.update(EVALUATIONS, [f"forward, {kind}" for kind in EVALUATIONS])
