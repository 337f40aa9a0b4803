r"""The two engines, which compute a network's value, derivatives and Jacobian products.

Formula:
    D = ∂f/∂x w is the derivative of the value f along a direction w = σ v, and G is the gradient
    of w·D with respect to x.

    The taylor engine calls the network on a `Jet` of x, which carries D. A backward pass from w·D
    computes G or, at the same cost, the sum of G over directions that share one f.

    Reverse mode starts from g = (∂f/∂x)ᵀ c, which is linear in c. Hence ∂(w·g)/∂c = ∂f/∂x w = D,
    and at c = w, the same backward pass also computes ∂(w·g)/∂x = G.

    The Jacobian products are vjp_c = (∂f/∂x)ᵀ c and jvp_c = ∂f/∂x c with c = cotangent(f). Since
    vjp_c is linear in c, the gradient of vjp_c·v with respect to c is ∂f/∂x v.

    In reverse mode with products, all directions share f. Otherwise, a separate G for each
    direction requires a separate copy of x, which has its own dropout mask.

Lost graphs:
    A network may cut the graph, either through .detach() or through a custom autograd.Function
    whose backward returns gradients without a graph. As second backward passes would then be
    wrong, the engine raises an error that names the remedy. Two kinds of cut go undetected: a
    .detach() on only one of several paths from x to the output, and a Function that drops only
    part of its graph.

    Unless x itself requires grad, the graph of a derivative ends at the engine's own copy of x. If
    it has no other leaf, for example because all parameters are frozen, there is nothing to train,
    and the results have no graph.

Cost:
    In evaluations of the network, where a backward pass counts as two, a training step with
    Jacobian products and K directions costs:

    - at order 2, 6 + 3·K in reverse mode and 6 + 6·K in the taylor engine;
    - at order 3, 7 + 9·K in reverse mode and 20·K in the taylor engine.

Source:
    Pearlmutter, "Fast exact multiplication by the Hessian" (1994). The double reverse pass is
    the "double backward trick" of J. Townsend (2017).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from hosm_losses import _torch_internals as internals
from hosm_losses._checks import DerivativeError, sum_elements
from hosm_losses.derivatives.kinks import watch_once
from hosm_losses.taylor import CHECKPOINT_ADVICE, ScriptedError, check_unchanged, propagate

Cotangent = Callable[[Tensor], Tensor]
PassBack = Callable[..., tuple[Tensor, ...]]  # see `vjp`
LOST_ONCE = (
    "network: expected a graph from the output to x; got none. Remove .detach(), .data and "
    "torch.no_grad() from its forward, and pass create_graph=True wherever it takes a gradient."
)
LOST_TWICE = (
    "network: expected a derivative with a graph; got a derivative without a graph. The backward "
    "of a custom autograd.Function is once_differentiable or detaches: write it with "
    "differentiable operators."
)
COMPILED = (
    "network: expected a network that is not compiled on its own; got a compiled part, which "
    "cannot be differentiated twice. Compile the loss module as a whole, with engine='auto'."
)
FOREIGN_CHECKPOINTS = (
    "Attention in guided-diffusion and latent-diffusion calls its own checkpoint even if "
    "use_checkpoint is False: set `checkpoint` in guided_diffusion.nn and guided_diffusion.unet, "
    "or in ldm.modules.attention, ldm.modules.diffusionmodules.util and "
    "ldm.modules.diffusionmodules.openaimodel, to lambda f, i, p, flag: "
    "hosm_losses.checkpoint(f, *i) if flag else f(*i)."
)
DROPPED = (
    "network: expected an autograd.Function whose backward keeps the graph; got {}, whose "
    "backward is once_differentiable or detaches, so that second derivatives through it would be "
    "silently lost. Write its backward with differentiable operators. If it is a checkpoint, "
    f"replace it with hosm_losses.checkpoint. {FOREIGN_CHECKPOINTS}"
)
CHANGED = (
    "network: expected the tensors that its forward reads to stay unchanged until the backward "
    "pass; got an in-place change, for example of a buffer that is read and then updated. "
    "Assign a new tensor to it, or read its .clone(). If the change is made by a custom "
    "autograd.Function, such as a fast scan or kernel, turn it off."
)
REENTRANT = (
    f"{CHECKPOINT_ADVICE} In a likelihood, torch's checkpoint works with use_reentrant=False."
)
SCRIPTED_FUNCTION = (
    "network: expected plain Python functions; got a torch.jit function, inside which PyTorch "
    "2.6, 2.13 and 2.15 silently get higher derivatives of norms wrong. Use the function that it "
    "was compiled from (PYTORCH_JIT=0 does so for all functions) or, if it contains no norm, "
    "engine='reverse'."
)
REMEDIES = {
    internals.REENTRANT_CHECKPOINT: REENTRANT,
    internals.DOUBLE_BACKWARD_OF_COMPILED: COMPILED,
    internals.CHANGED_SINCE: CHANGED,
    internals.LOST_ATTRIBUTE: LOST_TWICE,
}


class DroppedGraphError(DerivativeError):
    """Raised by either engine if the backward of a custom autograd.Function drops the graph."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn a PyTorch error with a known remedy into a DerivativeError that names it."""
    try:
        yield
    except (CheckpointError, RuntimeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise DerivativeError(CHECKPOINT_ADVICE) from error
        for words, advice in REMEDIES.items():
            if words in str(error):
                raise DerivativeError(advice) from error
        raise


def refuse_scripted(engine: str, error: Exception) -> None:
    """Raise ScriptedError if a torch.jit function caused an error in the taylor engine."""
    if engine == "taylor" and internals.IN_SCRIPT in str(error):
        raise ScriptedError(SCRIPTED_FUNCTION) from error


def refuse_dropped(value: Tensor, wanted: bool = True, point: Tensor | None = None) -> bool:
    """Make the backward pass from `value` to `point` raise an error if a Function drops the graph.

    Returns whether it meets a custom Function, whose gradients the check cannot inspect under
    vmap. If `wanted` is False, nothing is checked.
    """
    watched = False
    if not wanted or torch.compiler.is_compiling():
        return watched
    for node in internals.graph_nodes([value], point):
        function = internals.custom_function(node)
        if function is not None:
            watched = True
            node.register_hook(partial(_check_graph, function.__name__))
        if function is internals.MODULE_HOOK:
            node.register_hook(check_unchanged)
    return watched


def _check_graph(name: str, returned: Sequence[Any], incoming: Sequence[Any]) -> None:
    outgoing = [grad for grad in returned if isinstance(grad, Tensor)]
    wanted = any(isinstance(grad, Tensor) and grad.requires_grad for grad in incoming)
    if not (torch.is_grad_enabled() and wanted and outgoing):
        return
    if not any(map(internals.has_graph, outgoing)):
        raise DroppedGraphError(DROPPED.format(name))


def may_train(value: Tensor, x: Tensor, point: Tensor) -> bool:
    """Return True if `point` is x or if the graph of `value` has a leaf other than `point`."""
    if point is x:
        return True
    leaf_node = type(internals.gradient_node(point))  # accumulates the gradient of a leaf
    return any(type(node) is leaf_node for node in internals.graph_nodes([value], point))


def leaf(x: Tensor, wanted: bool = True) -> Tensor:
    """Return where to differentiate: x if it is traced or its gradient is wanted, or a copy."""
    own = internals.is_traced() or (wanted and x.requires_grad)
    return x if own else x.detach().requires_grad_()


def vjp(
    function: Callable[..., tuple[Tensor, Any]], *points: Tensor, lost: str | None = None
) -> tuple[Tensor, Any, PassBack]:
    """Call `function`; return its two results (value, more) and the value's backward pass.

    The backward pass maps a cotangent to one gradient per point, with a graph unless `graph` is
    False. A gradient is zero for a point that the value does not depend on; for the last point, a
    DerivativeError with the text `lost` is raised if that is given.
    """
    if internals.is_traced():
        result: Any = torch.func.vjp(function, *points, has_aux=True)
        value, traced, more = result
        return value, more, lambda cotangent, **_: traced(cotangent)
    return eager_vjp(function, *points, lost=lost)


def eager_vjp(
    function: Callable[..., tuple[Tensor, Any]], *points: Tensor, lost: str | None = None
) -> tuple[Tensor, Any, PassBack]:
    """Do the same as `vjp` by torch.autograd."""
    with torch.enable_grad(), explained():
        value, more = function(*points)

    def back(cotangent: Tensor, graph: bool = True, batched: bool = False) -> tuple[Tensor, ...]:
        if lost is not None and not value.requires_grad:
            raise DerivativeError(lost)
        options: Any = {"create_graph": graph, "is_grads_batched": batched}
        with explained():
            gradients = torch.autograd.grad(
                value, points, cotangent, retain_graph=True, allow_unused=True, **options
            )
        if lost is not None and gradients[-1] is None:
            raise DerivativeError(lost)
        if len(points) == 1 and gradients[0] is not None:
            return gradients
        return tuple(
            torch.zeros_like(point) if gradient is None else gradient
            for point, gradient in zip(points, gradients, strict=True)
        )

    return value, more, back


def pull_each(back: PassBack, cotangents: Tensor, in_turn: bool = False) -> Tensor:
    """Return the gradients (K, B, *) for K cotangents of a backward pass to a single point.

    `back` is called once, under vmap, or K times if `in_turn` is True or vmap fails, for example
    in the backward of a custom autograd.Function.
    """
    in_turn = in_turn or len(cotangents) == 1 or internals.is_traced()
    # A checkpoint around the loss recomputes the loss here, and vmap would forbid random draws.
    if not in_turn and internals.checkpoint_hook(internals.ANY_CHECKPOINT) is None:
        try:
            return back(cotangents, batched=True)[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an error that does not come from vmap is raised again below
            pass
    return torch.stack([back(cotangent)[0] for cotangent in cotangents])


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a scalar. They are zero for inputs that do not affect the scalar."""
    if not (inputs and value.requires_grad):
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)


class Network(Protocol):
    """A function of x (B, *) that treats samples independently; all other inputs are fixed."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the value at x (B, *)."""
        ...

    @property
    def owner(self) -> object:
        """The network for which the choice of an engine is remembered."""
        ...

    @property
    def native(self) -> "Network":
        """The same function with PyTorch's operators, for values and first derivatives only."""
        ...

    def repeat(self, count: int) -> "Network":
        """Return this function for `count` copies of the batch, that is, for x (count · B, *)."""
        ...


class Derivatives(NamedTuple):
    """The value of a network and its derivatives along directions.

    Attributes:
        value: f, of shape (1, B, *) if all directions share one value, and (K, B, *) otherwise.
        directional: D = ∂f/∂x w, of shape (K, B, *).
        third: G = ∇_x (wᵀ ∂f/∂x w), of shape (K, B, *), or its sum over the directions, of shape
            (1, B, *). None at order 2.
    """

    value: Tensor
    directional: Tensor
    third: Tensor | None = None


class Products(NamedTuple):
    """Derivatives and Jacobian products at x (B, *).

    The products have the same shape as `derived.value`.

    Attributes:
        derived: the derivatives computed by an engine.
        cotangent: c.
        vjp_c: (∂f/∂x)ᵀ c.
        jvp_c: ∂f/∂x c, without a graph; None if not requested.
    """

    derived: Derivatives
    cotangent: Tensor
    vjp_c: Tensor
    jvp_c: Tensor | None


def copies(network: Network, x: Tensor, w: Tensor) -> tuple[Network, Tensor, Tensor]:
    """Return the network, x and the directions for a larger batch that contains K copies of x."""
    count = len(w)
    rows = x.repeat(count, *(1,) * (x.ndim - 1))
    return (network.repeat(count) if count > 1 else network), rows, w.flatten(0, 1)


def taylor(
    network: Network, x: Tensor, w: Tensor, order: int, summed: bool = False
) -> Derivatives:
    """Return a network's value and derivatives, computed by calling the network once.

    Raises TaylorError for operators that the engine cannot differentiate.
    """
    wanted, shape = torch.is_grad_enabled(), w.shape
    copied = order == 3 and not summed  # each direction has its own copy of x
    if copied:
        network, x, w = copies(network, x, w)
        w = w.unsqueeze(0)
    f = watch_once(network, order, wanted)

    def form(point: Tensor) -> tuple[Tensor, list[Tensor]]:
        value, directional = propagate(f, point, w).split((1, len(w)))
        return (w * directional).sum(), [value, directional]

    if order == 2:
        parts = list(propagate(f, x, w).split((1, len(w))))
    else:  # G, by a backward pass from w·D
        point = leaf(x, wanted)
        number, parts, back = vjp(form, point)
        wanted = wanted and may_train(number, x, point)
        parts += [back(torch.ones_like(number), graph=wanted)[0].unsqueeze(0)]
    if copied:
        parts = [part.reshape(shape) for part in parts]
    return Derivatives(*parts) if wanted else Derivatives(*map(Tensor.detach, parts))


def checked(
    network: Network, order: int, wanted: bool
) -> Callable[[Tensor], tuple[Tensor, tuple[()]]]:
    """Return a network as a function for `vjp`, with the checks for jumps and dropped graphs."""
    f = watch_once(network, order, wanted)

    def evaluated(point: Tensor) -> tuple[Tensor, tuple[()]]:
        value = f(point)
        refuse_dropped(value)  # here, where it has its graph under torch.func too
        return value, ()

    return evaluated


def reverse(network: Network, x: Tensor, w: Tensor, order: int) -> Derivatives:
    """Return a network's value and derivatives, computed by backward passes.

    Raises DerivativeError if autograd cannot differentiate the network twice.
    """
    if order == 2:  # any cotangent will do
        return reverse_products(network, x, w, order, torch.zeros_like, False).derived
    wanted, shape = torch.is_grad_enabled(), w.shape
    network, x, w = copies(network, x, w)
    f = checked(network, order, wanted)

    def pull(point: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        value, _, back = vjp(f, point, lost=LOST_ONCE)
        vjp_c = back(c)[0]
        refuse_dropped(vjp_c, wanted)
        return vjp_c, value

    point = leaf(x, wanted)
    _, value, again = vjp(pull, point, leaf(w, wanted), lost=LOST_TWICE)
    third, directional = again(w, graph=wanted)
    parts = [part.reshape(shape) for part in (value, directional, third)]
    trained = wanted and (w.requires_grad or may_train(value, x, point))
    return Derivatives(*parts) if trained else Derivatives(*map(Tensor.detach, parts))


def reverse_products(
    network: Network, x: Tensor, w: Tensor, order: int, cotangent: Cotangent, push: bool
) -> Products:
    """Return derivatives and Jacobian products, computed in reverse mode.

    Raises DerivativeError if autograd cannot differentiate the network twice.
    """
    wanted = torch.is_grad_enabled()
    point = leaf(x, wanted)
    value, _, back = vjp(checked(network, order, wanted), point, lost=LOST_ONCE)
    wanted = wanted and (w.requires_grad or may_train(value, x, point))
    c = cotangent(value.detach().unsqueeze(0)).detach()

    def pull(*points: Tensor) -> tuple[Tensor, tuple[()]]:  # the cotangent comes last
        vjp_c = back(points[-1])[0]
        refuse_dropped(vjp_c, wanted)
        return vjp_c, ()

    vjp_c, _, again = vjp(pull, leaf(c[0].clone(), False), lost=LOST_TWICE)
    jvp_c = again(c[0], graph=wanted)[0].detach().unsqueeze(0) if push else None
    if order == 2:
        parts = [value.unsqueeze(0), pull_each(partial(again, graph=wanted), w)]
    else:
        # One direction at a time, because a batch would evaluate f once for each direction.
        pairs = []
        for direction in w:
            start = leaf(direction, wanted)
            _, _, twice = vjp(pull, point, start, lost=LOST_TWICE)
            pairs.append(twice(direction, graph=wanted))
        third, directional = map(torch.stack, zip(*pairs, strict=True))
        parts = [value.unsqueeze(0), directional, third]
    *parts, vjp_c = (part if wanted else part.detach() for part in (*parts, vjp_c.unsqueeze(0)))
    return Products(Derivatives(*parts), c, vjp_c, jvp_c)


def products_beside(
    derive: Callable[[Network, Tensor, Tensor], Derivatives],
    network: Network,
    x: Tensor,
    w: Tensor,
    cotangent: Cotangent,
    *,
    push: bool,
    copied: bool,
) -> Products:
    """Return the derivatives that `derive` computes, and Jacobian products by backward passes.

    If `copied` is True, each direction has its own copy of x and its own value.
    """
    wanted, shape = torch.is_grad_enabled(), w.shape if copied else (1, *x.shape)
    if copied:
        network, x, w = copies(network, x, w)
        w = w.unsqueeze(0)

    def derived(point: Tensor) -> tuple[Tensor, list[Tensor]]:
        value, *parts = derive(network, point, w)
        refuse_dropped(value)
        return value[0], [value[:1], *[part for part in parts if part is not None]]

    point = leaf(x, wanted)
    value, parts, back = vjp(derived, point)
    back = partial(back, graph=wanted or push)
    wanted = wanted and may_train(value, x, point)
    c = cotangent(value.reshape(shape)).detach()
    # vjp_c is linear in c, so differentiating it reveals a Function that drops the graph.
    start = leaf(c.reshape(value.shape), False)
    vjp_c, _, again = vjp(lambda c: (back(c)[0], ()), start)
    jvp_c = again(start, graph=False)[0].detach().reshape(shape) if push else None
    *parts, vjp_c = (part if wanted else part.detach() for part in (*parts, vjp_c))
    if copied:
        parts = [part.reshape(shape) for part in parts]
    return Products(Derivatives(*parts), c, vjp_c.reshape(shape), jvp_c)


def pull_backs(network: Network, x: Tensor, directions: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield (∂f/∂x)ᵀ w for each chunk w (k, B, *) of directions, after a single forward pass.

    The results have no graph. Raises DerivativeError if no graph leads from the output to x.
    """
    point = leaf(x, wanted=False)
    _, _, back = vjp(lambda point: (network(point), ()), point, lost=LOST_ONCE)
    for w in directions:
        yield pull_each(partial(back, graph=False), w)


def quadratic_forms(
    network: Network, x: Tensor, directions: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a network's value (B, *) and the quadratic forms wᵀ ∂f/∂x w (K, B).

    Raises DerivativeError if no graph leads from the output to x, or if a custom
    autograd.Function drops the graph.
    """
    wanted = torch.is_grad_enabled()
    f, point = watch_once(network, 2, wanted), leaf(x, wanted)
    # With a graph, not traced by torch.compile, which would lose the check for dropped graphs.
    evaluate = eager_vjp if wanted and not internals.in_functorch() else vjp
    value, _, back = evaluate(lambda point: (f(point), ()), point, lost=LOST_ONCE)
    wanted = wanted and may_train(value, x, point)
    # The check stops at `point`: all earlier evaluations along an ODE path lie behind it.
    in_turn = not internals.in_functorch() and refuse_dropped(value, wanted, point)

    def pulled(w: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and len(w) > 1:
            return torch.func.vmap(lambda cotangent: back(cotangent)[0])(w)
        # Without a graph, two backward passes take less time and memory than one under vmap.
        return pull_each(partial(back, graph=wanted), w, in_turn or (len(w) == 2 and not wanted))

    forms = torch.cat([sum_elements(pulled(w) * w) for w in directions])
    return (value, forms) if wanted else (value.detach(), forms.detach())
