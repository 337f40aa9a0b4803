r"""The three engines: value, directional derivative and what is of third order, of a field.

Formula, along w = σ v:
    taylor    the network is given a `Jet` of x, see `hosm_losses.taylor`; G is the gradient of
              w·D, reverse over that.
    reverse   g = (∂f/∂x)ᵀ c for a leaf c is linear in c, so ∂(w·g)/∂c = ∂f/∂x w = D, the Jacobian
              itself and not its transpose; at c = w the same pass gives ∂(w·g)/∂x = G.
    forward   D is `torch.func.jvp`; G is the gradient of w·D, reverse over forward mode.

    In place of G there may be C = ∂²f[w, u] for another direction u, by the engines that go
    forward. It is nested forward mode, without a pass back.

Source:
    Pearlmutter, "Fast exact multiplication by the Hessian" (1994); the double reverse pass is
    the "double backward trick" of J. Townsend (2017).
"""

__all__ = ["Derivatives", "Field", "forward", "pull_back", "reverse", "taylor"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor

from hosm_losses._checks import DerivativeError
from hosm_losses.primitive_mode import CHECKPOINT_ADVICE, FORWARD_ADVICE, ForwardMode
from hosm_losses.taylor import carried

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


class Field(Protocol):
    """A function of x (B, *) with its conditions bound, that can be asked for more rows."""

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate at x (B, *)."""
        ...

    @property
    def owner(self) -> object:
        """The network, for which a choice of the engine is remembered."""
        ...

    @property
    def native(self) -> "Field":
        """The same with PyTorch's own operators, whose values and first derivatives are right."""
        ...

    def repeat(self, count: int) -> "Field":
        """Return the field of `count` copies of the batch, for x of shape (count · B, *)."""
        ...


class Derivatives(NamedTuple):
    """What an engine returns.

    Attributes:
        value: f, of shape (1, B, *) where the directions share it, (K, B, *) where each has its
            own.
        directional: D = ∂f/∂x w, of shape (K, B, *).
        third: of shape (K, B, *), G = ∇_x (wᵀ ∂f/∂x w), or C = ∂²f[w, u] where directions u were
            given; None at order 2.
    """

    value: Tensor
    directional: Tensor
    third: Tensor | None = None


def taylor(
    field: Field, x: Tensor, direction: Tensor, order: int, others: Tensor | None = None
) -> Derivatives:
    """The value and its derivatives in one batch.

    Raises:
        TaylorError: for a network whose derivatives cannot be carried through it.
    """
    wanted = torch.is_grad_enabled()
    count = len(direction)
    if order == 2:
        stack = carried(field, x, direction)
        parts = [stack[:1], stack[1:]]
    elif others is None:
        parts = _taylor_gradient(field, x, direction)
    else:
        same = others is direction
        directions = direction if same else torch.cat([direction, others])
        stack = carried(field, x, directions, "squares" if same else "halves")
        parts = [stack[:1], stack[1 : 1 + count], stack[-count:]]
    return Derivatives(*(part if wanted else part.detach() for part in parts))


def _taylor_gradient(field: Field, x: Tensor, direction: Tensor) -> list[Tensor]:
    field, rows, w = _folded(field, x, direction)

    def form(rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        value, directional = carried(field, rows, w.unsqueeze(0))
        return (w * directional).sum(), (value, directional)

    if torch.compiler.is_compiling():
        gradient, parts = torch.func.grad(form, has_aux=True)(rows)
    else:
        wanted = torch.is_grad_enabled()
        with torch.enable_grad(), _explained():
            rows = rows if wanted and rows.requires_grad else rows.detach().requires_grad_()
            number, parts = form(rows)
            # As of a linear network, whose form does not depend on x.
            (gradient,) = torch.autograd.grad(
                number, rows, create_graph=wanted, materialize_grads=True
            )
    return [part.unflatten(0, direction.shape[:2]) for part in (*parts, gradient)]


def _folded(field: Field, x: Tensor, direction: Tensor) -> tuple[Field, Tensor, Tensor]:
    """The field, x and the directions with the K directions as one larger batch."""
    count = len(direction)
    rows = x.expand(count, *x.shape).flatten(0, 1)
    return (field.repeat(count) if count > 1 else field), rows, direction.flatten(0, 1)


def forward(
    field: Field, x: Tensor, direction: Tensor, order: int, others: Tensor | None = None
) -> Derivatives:
    """Forward mode of torch.func, one direction at a time or all under vmap."""

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

    def curved(w: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        found: Any = torch.func.jvp(lambda point: second_at(point, w), (x,), (u,))
        (value, directional), (_, curvature) = found
        return value, directional, curvature

    one: Any = second if order == 2 else third if others is None else curved
    directions = (direction,) if others is None else (direction, others)
    with _explained(), ForwardMode():
        if len(direction) == 1:
            value, *rest = [part.unsqueeze(0) for part in one(*(each[0] for each in directions))]
        else:
            out_dims: Any = (None, *(0,) * (order - 1))
            # One dropout mask for the value and for every probe.
            value, *rest = torch.func.vmap(one, out_dims=out_dims, randomness="same")(*directions)
            value = value.unsqueeze(0)
    return Derivatives(value, *rest)


def reverse(field: Field, x: Tensor, direction: Tensor, order: int) -> Derivatives:
    """Two passes back through the network.

    Raises:
        DerivativeError: if autograd cannot follow the output to x, or not twice.
    """
    wanted = torch.is_grad_enabled()
    with torch.enable_grad(), _explained():
        point = x if wanted and x.requires_grad else x.detach().requires_grad_()
        if order == 2:
            value = field(point)
            # The pulled cotangent is linear in the cotangent, so any cotangent will do.
            cotangent = torch.zeros_like(value).requires_grad_()
            pulled = pull_back(value, point, cotangent.unsqueeze(0))[0]
            directional = pull_back(
                pulled, cotangent, direction, create_graph=wanted, lost=LOST_TWICE
            )
            parts = [value.unsqueeze(0), directional]
        else:
            field, rows, w = _folded(field, point, direction)
            value = field(rows)
            cotangent = w.detach().requires_grad_()
            pulled = pull_back(value, rows, cotangent.unsqueeze(0))[0]
            gradient, directional = torch.autograd.grad(
                pulled, (rows, cotangent), w, create_graph=wanted, allow_unused=True
            )
            if directional is None:
                raise DerivativeError(LOST_TWICE)
            if gradient is None:  # as of a linear field
                gradient = torch.zeros_like(rows)
            found = (value, directional, gradient)
            parts = [part.unflatten(0, direction.shape[:2]) for part in found]
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


def pull_back(
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
