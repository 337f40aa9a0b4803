r"""Value, directional derivative and quadratic form of a field: the choice of the engine.

What:
    Of a field f: (B, *) → (B, *) that treats every sample alone, at x and along directions w = σ
    v: the value f, D = ∂f/∂x w, and G = ∇_x (wᵀ ∂f/∂x w), each still differentiable in the
    parameters; or in place of G the curvature C = ∂²f[w, u] for given u. The engines, which agree
    to rounding, are in `hosm_losses.derivatives.engines`.

Cost, in network evaluations with the parameter gradient (a first-order step is 3):
    `EVALUATIONS`. K directions share the value at order two and with C; for G the taylor and the
    reverse engine fold them into the batch.

Choice:
    "auto" is the taylor engine. A network that it cannot carry derivatives through is given to
    reverse mode (which torch.compile cannot trace), and one with an operator of which PyTorch says
    that it cannot be differentiated twice to forward mode. Only the taylor engine gives C at a
    price below that of G; with "auto" another engine gives G in its place. An attempt that failed
    leaves no trace: buffers and generators are put back. What the network cannot do is
    remembered, and said once in a warning with its price. What only a backward pass would show is
    the business of `check_derivatives`.
"""

__all__ = [
    "ASK_THE_CHECK",
    "ENGINES",
    "Curved",
    "Derivatives",
    "Engine",
    "Field",
    "derive",
    "gradients",
    "quadratic_forms",
    "say_no_price",
]

import contextlib
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hosm_losses._checks import DerivativeError
from hosm_losses._torch_internals import DEVICE_ERROR_TEXT, NOT_TWICE, surrounded
from hosm_losses.derivatives import engines
from hosm_losses.derivatives.backward import DroppedGraphError
from hosm_losses.derivatives.engines import Curved as Curved
from hosm_losses.derivatives.engines import Derivatives, Field
from hosm_losses.derivatives.engines import quadratic_forms as quadratic_forms
from hosm_losses.derivatives.snapshot import Snapshot
from hosm_losses.derivatives.taylor import TaylorError

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


def derive(
    field: Field,
    x: Tensor,
    direction: Tensor,
    *,
    order: int,
    derivative: str = "auto",
    second_direction: Tensor | None = None,
) -> Derivatives:
    """Evaluate a field and its derivatives along directions.

    Under `torch.no_grad` the values are the same and carry no graph.

    Args:
        field: a function of x that treats every sample alone.
        x: the point (B, *).
        direction: w = σ v, of shape (K, B, *).
        order: 2 for the value and D, 3 for G or C as well.
        derivative: "auto", "taylor", "reverse" or "forward".
        second_direction: u, of shape (K, B, *), for C in place of G; not by the reverse engine.
            With "auto" G may come nevertheless, where it costs less; what comes as C is `Curved`.

    Returns:
        The derivatives; the third is None at order 2.

    Raises:
        DerivativeError: in reverse mode, if autograd cannot follow the output to x, or torch's own
            checkpoint is in the network; from the taylor engine, if it cannot carry derivatives
            through the network; with "auto", if no engine can differentiate it; from every engine,
            if a custom autograd.Function drops the graph.

    Warns:
        UserWarning: with "auto", once for a network that the taylor engine cannot differentiate.
    """
    if derivative == "auto":
        return _auto(field, x, direction, order, second_direction)
    try:
        return _run(derivative, field, x, direction, order, second_direction)
    except TaylorError as error:
        raise DerivativeError(
            f"network: expected operators that the engine 'taylor' knows; got {error} Leave "
            "derivative at 'auto', which finds another engine."
        ) from error


def _run(
    engine: str,
    field: Field,
    x: Tensor,
    direction: Tensor,
    order: int,
    second_direction: Tensor | None,
) -> Derivatives:
    if engine == "reverse":
        return engines.reverse(field, x, direction, order)
    return getattr(engines, engine)(field, x, direction, order, second_direction)


def _auto(
    field: Field, x: Tensor, direction: Tensor, order: int, second_direction: Tensor | None
) -> Derivatives:
    if torch.compiler.is_compiling():
        with contextlib.suppress(TaylorError):
            return engines.taylor(field, x, direction, order, second_direction)
        return engines.forward(field, x, direction, order, second_direction)
    choice = _choice(field.owner)
    reasons: dict[str, str] = {}
    wanted = _kind(direction, order, second_direction)
    for engine in ENGINES[1:]:
        if engine in choice.refused:
            continue
        # C costs less than G by the taylor engine alone.
        given = second_direction if engine == "taylor" else None
        before = Snapshot(field.owner, x)
        try:
            derived = _run(engine, field, x, direction, order, given)
        except Exception as error:
            if not _of_the_engine(engine, error):
                raise
            before.restore()
            reasons[engine] = (str(error) or repr(error)).splitlines()[0]
            continue
        if not surrounded():
            choice.refused.update(reasons)
        if engine != "taylor":
            why = (choice.refused | reasons)["taylor"]
            _say_price(choice, field.owner, why, engine, wanted, _kind(direction, order, given))
        return derived
    told = "; ".join(f"{engine}: {why}" for engine, why in (choice.refused | reasons).items())
    raise DerivativeError(
        "network: expected operators that can be differentiated twice; got one that cannot, by "
        f"any engine ({told}). {ASK_THE_CHECK}"
    )


def _kind(direction: Tensor, order: int, second_direction: Tensor | None) -> str:
    if order == 2:
        return "order two"
    if second_direction is None:
        return "third='exact'"
    return "third='laplacian'" if second_direction is direction else "third='sliced'"


def _say_price(
    choice: _Choice, owner: object, why: str, engine: str, wanted: str, got: str
) -> None:
    if wanted in choice.said:
        return
    choice.said.add(wanted)
    price, best = EVALUATIONS[got][engine], EVALUATIONS[wanted]["taylor"]
    told = (
        f"derivative='auto': the engine 'taylor' cannot differentiate {type(owner).__name__} "
        f"({why}) The engine {engine!r} takes its place: for {wanted} a training step takes "
        f"{price} evaluations of the network instead of {best}, and more time for each."
    )
    if got != wanted:
        told += (
            f" {wanted} in forward mode costs more than 'exact', {EVALUATIONS[wanted]['forward']} "
            f"evaluations, so 'exact' is taken; derivative='forward' keeps {wanted}."
        )
    warnings.warn(told, stacklevel=2)


def say_no_price(owner: object) -> None:
    """Do without the warning about this network: it is a copy, and no training step is taken."""
    _choice(owner).said.update(EVALUATIONS)


def _of_the_engine(engine: str, error: Exception) -> bool:
    """Whether another engine may do better; what is wrong with the network is raised by all."""
    if engine == "reverse":
        known = any(words in str(error) for words in NOT_TWICE)
        return known or isinstance(error, DroppedGraphError)
    if engine == "taylor":
        # Not what a checkpoint around the loss raises to end its recomputation.
        return isinstance(error, JET_ERRORS) and not _of_the_machine(error)
    return isinstance(error, RuntimeError) and not isinstance(error, DerivativeError)


def _of_the_machine(error: Exception) -> bool:
    """Whether a device has failed, which says nothing about the network."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in DEVICE_ERROR_TEXT)


def _choice(owner: object) -> _Choice:
    try:
        return _CHOICES.setdefault(owner, _Choice())
    except TypeError:  # a callable that cannot be referred to weakly, or not hashed
        return _Choice()


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a number in tensors, zero where it does not depend on one."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
