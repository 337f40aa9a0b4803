r"""Value, directional derivative and quadratic form of a field: the choice of the engine.

What:
    Of a field f: (B, *) → (B, *) that treats every sample alone, at x and along directions w = σ
    v: the value f, D = ∂f/∂x w, and G = ∇_x (wᵀ ∂f/∂x w), each still differentiable in the
    parameters; or in place of G the curvature C = ∂²f[w, u] for given u. The engines, which agree
    to rounding, are in `hosm_losses.engines`.

Cost, in network evaluations with the parameter gradient (a first-order step is 3):
    order 2: taylor 6, reverse 7, forward 8. order 3: taylor and reverse 12, forward 16; with C for
    u = w taylor 9, for another u 12. K directions share the value at order two and with C; for G
    the taylor and the reverse engine fold them into the batch.

Choice:
    "auto" is the taylor engine. A network that it cannot carry derivatives through is given to
    reverse mode (which cannot give C, and which torch.compile cannot trace), and one with an
    operator of which PyTorch says that it cannot be differentiated twice to forward mode; from
    then on without trying again, and the log says so once. What only a backward pass would show is
    the business of `check_derivatives`.
"""

__all__ = [
    "ENGINES",
    "Derivatives",
    "Field",
    "derive",
    "gradients",
    "quadratic_forms",
    "time_derivative",
]

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hosm_losses import engines
from hosm_losses._checks import DerivativeError
from hosm_losses.engines import Derivatives, Field, pull_back
from hosm_losses.taylor import TaylorError

ENGINES = ("auto", "taylor", "reverse", "forward")
# PyTorch's own words for an operator without a second derivative in reverse mode.
NOT_TWICE = ("derivative for aten::", "once_differentiable")
# What code raises that meets a Jet and expected an ordinary tensor.
PYTHONS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
# The words of devices that fail.
MACHINES = ("CUDA", "CUBLAS", "cuDNN", "CUDNN", "HIP error", "out of memory")
# The engines that a network has shown not to work with, with their reasons.
_REFUSED: "weakref.WeakKeyDictionary[Any, dict[str, str]]" = weakref.WeakKeyDictionary()
logger = logging.getLogger(__name__)


def derive(
    field: Field,
    x: Tensor,
    direction: Tensor,
    *,
    order: int,
    derivative: str = "auto",
    others: Tensor | None = None,
) -> Derivatives:
    """Evaluate a field and its derivatives along directions.

    Under `torch.no_grad` the values are the same and carry no graph.

    Args:
        field: a function of x that treats every sample alone.
        x: the point (B, *).
        direction: w = σ v, of shape (K, B, *).
        order: 2 for the value and D, 3 for G or C as well.
        derivative: "auto", "taylor", "reverse" or "forward".
        others: u, of shape (K, B, *), for C in place of G; not by the reverse engine.

    Returns:
        The derivatives; the last is None at order 2.

    Raises:
        DerivativeError: in reverse mode, if autograd cannot follow the output to x, or torch's own
            checkpoint is in the network; from the taylor engine, if it cannot carry derivatives
            through the network; with "auto", if no engine can differentiate it.
    """
    if derivative == "auto":
        return _auto(field, x, direction, order, others)
    try:
        return _run(derivative, field, x, direction, order, others)
    except TaylorError as error:
        raise DerivativeError(
            f"network: expected operators that the engine 'taylor' knows; got {error} Leave "
            "derivative at 'auto', which finds another engine."
        ) from error


def _run(
    engine: str, field: Field, x: Tensor, direction: Tensor, order: int, others: Tensor | None
) -> Derivatives:
    if engine == "reverse":
        return engines.reverse(field, x, direction, order)
    return getattr(engines, engine)(field, x, direction, order, others)


def _auto(
    field: Field, x: Tensor, direction: Tensor, order: int, others: Tensor | None
) -> Derivatives:
    if torch.compiler.is_compiling():
        with contextlib.suppress(TaylorError):
            return engines.taylor(field, x, direction, order, others)
        return engines.forward(field, x, direction, order, others)
    refused = _refused(field.owner)
    reasons: dict[str, str] = {}
    for engine in ENGINES[1:]:
        if engine in refused or (engine == "reverse" and others is not None):
            continue
        try:
            derived = _run(engine, field, x, direction, order, others)
        except Exception as error:
            if not _of_the_engine(engine, error):
                raise
            reasons[engine] = (str(error) or repr(error)).splitlines()[0]
            continue
        for name, reason in reasons.items():
            logger.info(
                "derivative='auto' does without the engine %r for %s: %s",
                *(name, type(field.owner).__name__, reason),
            )
        refused.update(reasons)
        return derived
    told = "; ".join(f"{engine}: {reason}" for engine, reason in (refused | reasons).items())
    raise DerivativeError(
        "network: expected operators that can be differentiated twice; got one that cannot, by "
        f"any engine ({told}). check_derivatives(model, x0) names the module and what to do."
    )


def _of_the_engine(engine: str, error: Exception) -> bool:
    """Whether another engine may do better; what is wrong with the network is raised by all."""
    if engine == "reverse":
        return any(words in str(error) for words in NOT_TWICE)
    if engine == "taylor":
        # Not what a checkpoint around the loss raises to end its recomputation.
        return isinstance(error, PYTHONS) and not _of_the_machine(error)
    return isinstance(error, RuntimeError) and not isinstance(error, DerivativeError)


def _of_the_machine(error: Exception) -> bool:
    """Whether a device has failed, which says nothing about the network."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in MACHINES)


def _refused(owner: object) -> dict[str, str]:
    try:
        return _REFUSED.setdefault(owner, {})
    except TypeError:  # a callable that cannot be referred to weakly, or not hashed
        return {}


def quadratic_forms(
    field: Field, x: Tensor, directions: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """Evaluate a field and wᵀ ∂f/∂x w: one forward pass, and one pass back for each w.

    Args:
        field: a function of x that treats every sample alone.
        x: the point (B, *).
        directions: chunks (k, B, *) of directions; each chunk is pulled back as one batch.

    Returns:
        The value (B, *), and the forms (K, B), K the number of all directions.

    Raises:
        DerivativeError: if the output does not depend on x in a way that autograd can follow.
    """
    wanted = torch.is_grad_enabled()
    forms = []
    with torch.enable_grad():
        point = x if wanted and x.requires_grad else x.detach().requires_grad_()
        value = field(point)
        for w in directions:
            pulled = pull_back(value, point, w, create_graph=wanted)
            forms.append((pulled * w).reshape(*w.shape[:2], -1).sum(-1))
    joined = torch.cat(forms)
    return (value, joined) if wanted else (value.detach(), joined.detach())


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a number in tensors, zero where it does not depend on one."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)


def time_derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Derivative of an elementwise function of time."""
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]
