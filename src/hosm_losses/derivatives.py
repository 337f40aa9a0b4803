r"""Value, directional derivative and quadratic form of a field: all the differentiation.

What:
    Of a field f: (B, *) → (B, *) that treats every sample alone, at x and along directions w = σ
    v: the value f, D = ∂f/∂x w, and G = ∇_x (wᵀ ∂f/∂x w), each still differentiable in the
    parameters.

Formula, by two engines that agree to rounding:
    forward   D is a Jacobian-vector product; G is the gradient of w·D, reverse over forward mode.
    reverse   g = (∂f/∂x)ᵀ c for a leaf c is linear in c, so ∂(w·g)/∂c = ∂f/∂x w = D, the Jacobian
              itself and not its transpose; at c = w the same pass gives ∂(w·g)/∂x = G.

Cost, in network evaluations with the parameter gradient (a first-order step is 3):
    order 2: reverse 7, forward 8. order 3: reverse 12, forward 16. K directions share the value
    at order two in both engines, at order three in the forward engine; the reverse engine there
    folds them into the batch.

Choice:
    "auto" is reverse mode in eager execution (cheaper, and it works with activation
    checkpointing) and forward mode under torch.compile, which cannot differentiate twice in
    reverse. Where the first call meets an operator of which PyTorch says that it cannot be
    differentiated twice, "auto" is forward mode for that network from then on, and says so once
    in the log. What only a backward pass would show is the business of `check_derivatives`.

Source:
    Pearlmutter, "Fast exact multiplication by the Hessian" (1994); the double reverse pass is
    the "double backward trick" of J. Townsend (2017).
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor

from hosm_losses._checks import DerivativeError
from hosm_losses.primitive_mode import CHECKPOINT_ADVICE, FORWARD_ADVICE, ForwardMode

ENGINES = ("auto", "forward", "reverse")
# PyTorch's own words for an operator without a second derivative in reverse mode.
NOT_TWICE = ("derivative for aten::", "once_differentiable")
LOST_ONCE = (
    "network: expected an output that autograd can differentiate in x; got one whose graph does "
    "not lead to x. Remove .detach(), .data or torch.no_grad() from its forward."
)
LOST_TWICE = (
    "network: expected a derivative that autograd can differentiate again; got one without "
    "a graph. A custom autograd.Function in it has a backward that is once_differentiable or "
    "detaches: write it with differentiable operators, or use derivative='forward' if it has a "
    "jvp."
)
COMPILED = (
    "network: expected one that is not compiled by itself; got a compiled part, which cannot be "
    "differentiated twice. Compile the loss module as a whole in its place, with "
    "derivative='auto' or 'forward': torch.compile(ThirdOrderDSM(ScoreModel(network, schedule)))."
)
# Its words for a reentrant checkpoint, a checkpoint in torch.func and a compiled part; the remedy.
EXPLAINED = {
    "compatible with .grad()": CHECKPOINT_ADVICE,
    "saved tensor hooks": FORWARD_ADVICE,
    "does not currently support double backward": COMPILED,
}
_FORWARD: "weakref.WeakSet[Any]" = weakref.WeakSet()
logger = logging.getLogger(__name__)


class Field(Protocol):
    """A function of x (B, *) with its conditions bound, that can be asked for more rows."""

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate at x (B, *)."""
        ...

    @property
    def owner(self) -> object:
        """The network, for which a choice of the engine is remembered."""
        ...

    def repeat(self, count: int) -> "Field":
        """Return the field of `count` copies of the batch, for x of shape (count · B, *)."""
        ...


class Derivatives(NamedTuple):
    """What `derive` returns.

    Attributes:
        value: f, of shape (1, B, *) where the directions share it, (K, B, *) where each has its
            own.
        directional: D = ∂f/∂x w, of shape (K, B, *).
        gradient: G = ∇_x (wᵀ ∂f/∂x w), of shape (K, B, *); None at order 2.
    """

    value: Tensor
    directional: Tensor
    gradient: Tensor | None = None


def derive(
    field: Field, x: Tensor, direction: Tensor, *, order: int, derivative: str = "auto"
) -> Derivatives:
    """Evaluate a field and its derivatives along directions.

    Under `torch.no_grad` the values are the same and carry no graph.

    Args:
        field: a function of x that treats every sample alone.
        x: the point (B, *).
        direction: w = σ v, of shape (K, B, *).
        order: 2 for the value and D, 3 for G as well.
        derivative: "auto", "forward" or "reverse".

    Returns:
        The derivatives; G is None at order 2.

    Raises:
        DerivativeError: in reverse mode, if autograd cannot follow the output to x, or torch's own
            checkpoint is in the network; with "auto", if no engine can differentiate it.
    """
    if derivative == "auto":
        return _auto(field, x, direction, order)
    engine = _forward if derivative == "forward" else _reverse
    return engine(field, x, direction, order)


def _auto(field: Field, x: Tensor, direction: Tensor, order: int) -> Derivatives:
    if torch.compiler.is_compiling() or _needs_forward(field.owner):
        return _forward(field, x, direction, order)
    try:
        return _reverse(field, x, direction, order)
    except (RuntimeError, DerivativeError) as error:
        if not any(words in str(error) for words in NOT_TWICE):
            raise
        reason = str(error).splitlines()[0]
    try:
        derived = _forward(field, x, direction, order)
    except RuntimeError as error:
        raise DerivativeError(
            "network: expected operators that can be differentiated twice; got one that cannot, "
            f"in reverse mode ({reason}) or in forward mode ({str(error).splitlines()[0]}). "
            "check_derivatives(model, x0) names the module and what to do."
        ) from error
    with contextlib.suppress(TypeError):
        _FORWARD.add(field.owner)
    logger.info(
        "derivative='auto' uses forward mode for %s: %s", type(field.owner).__name__, reason
    )
    return derived


def _needs_forward(owner: object) -> bool:
    try:
        return owner in _FORWARD
    except TypeError:  # a callable that cannot be referred to weakly, or not hashed
        return False


def _forward(field: Field, x: Tensor, direction: Tensor, order: int) -> Derivatives:
    def second_at(point: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        value, directional, *_ = torch.func.jvp(field, (point,), (w,))
        return value, directional

    def second(w: Tensor) -> tuple[Tensor, ...]:
        return second_at(x, w)

    def third(w: Tensor) -> tuple[Tensor, ...]:
        def form(point: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            value, directional = second_at(point, w)
            return (w * directional).sum(), (value, directional)

        gradient, (value, directional) = torch.func.grad(form, has_aux=True)(x)
        return value, directional, gradient

    one = second if order == 2 else third
    with _explained(), ForwardMode():
        if len(direction) == 1:
            value, *rest = [part.unsqueeze(0) for part in one(direction[0])]
        else:
            out_dims: Any = (None, *(0,) * (order - 1))
            # One dropout mask for the value and for every probe.
            value, *rest = torch.func.vmap(one, out_dims=out_dims, randomness="same")(direction)
            value = value.unsqueeze(0)
    return Derivatives(value, *rest)


def _reverse(field: Field, x: Tensor, direction: Tensor, order: int) -> Derivatives:
    wanted = torch.is_grad_enabled()
    count = len(direction)
    with torch.enable_grad(), _explained():
        point = x if wanted and x.requires_grad else x.detach().requires_grad_()
        if order == 2:
            value = field(point)
            # The pulled cotangent is linear in the cotangent, so any cotangent will do.
            cotangent = torch.zeros_like(value).requires_grad_()
            pulled = _pull_back(value, point, cotangent.unsqueeze(0))[0]
            directional = _pull_back(
                pulled, cotangent, direction, create_graph=wanted, lost=LOST_TWICE
            )
            parts = [value.unsqueeze(0), directional]
        else:
            rows = point.expand(count, *point.shape).flatten(0, 1)
            w = direction.flatten(0, 1)
            value = (field.repeat(count) if count > 1 else field)(rows)
            cotangent = w.detach().requires_grad_()
            pulled = _pull_back(value, rows, cotangent.unsqueeze(0))[0]
            gradient, directional = torch.autograd.grad(
                pulled, (rows, cotangent), w, create_graph=wanted, allow_unused=True
            )
            if directional is None:
                raise DerivativeError(LOST_TWICE)
            if gradient is None:  # as of a linear field
                gradient = torch.zeros_like(rows)
            parts = [part.unflatten(0, (count, -1)) for part in (value, directional, gradient)]
    return Derivatives(*(part if wanted else part.detach() for part in parts))


@contextmanager
def _explained() -> Iterator[None]:
    """Give the remedy with what is raised by parts that cannot be differentiated again."""
    try:
        yield
    except torch.utils.checkpoint.CheckpointError as error:
        raise DerivativeError(CHECKPOINT_ADVICE) from error
    except RuntimeError as error:
        for words, advice in EXPLAINED.items():
            if words in str(error):
                raise DerivativeError(advice) from error
        raise
    except AttributeError as error:
        # A custom Function that drops what it saved after its first backward.
        if "Backward' object has no attribute" in str(error):
            raise DerivativeError(f"{LOST_TWICE} ({error})") from error
        raise


def _pull_back(
    value: Tensor,
    x: Tensor,
    cotangents: Tensor,
    *,
    create_graph: bool = True,
    lost: str = LOST_ONCE,
) -> Tensor:
    """(∂f/∂x)ᵀ c for each of K cotangents (K, B, *), at once, and without vmap where K is 1."""
    batched = len(cotangents) > 1
    pulled = None
    if value.requires_grad:
        (pulled,) = torch.autograd.grad(
            value,
            x,
            cotangents if batched else cotangents[0],
            create_graph=create_graph,
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
        )
    if pulled is None:
        raise DerivativeError(lost)
    return pulled if batched else pulled.unsqueeze(0)


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
            pulled = _pull_back(value, point, w, create_graph=wanted)
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
