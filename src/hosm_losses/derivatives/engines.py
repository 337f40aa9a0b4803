r"""The two engines, which compute a network's value, derivatives and Jacobian products.

Formula:
    All derivatives are taken along directions w = σ v.

    The taylor engine calls the network on a `Jet` of x to compute D. A backward pass then gives G,
    the gradient of w·D.

    Reverse mode starts from g = (∂f/∂x)ᵀ c, which is linear in c. Hence ∂(w·g)/∂c = ∂f/∂x w = D,
    which contains the Jacobian itself and not its transpose. At c = w, the same backward pass also
    gives ∂(w·g)/∂x = G.

    If only the sum over the directions is needed, the taylor engine computes the sum of G in a
    single backward pass, and all directions share one value.

    There are two products with a fixed c = cotangent(f), where f is the value. A backward pass
    from f computes the product vjp_c = (∂f/∂x)ᵀ c together with its graph. The product
    jvp_c = ∂f/∂x c is the gradient of vjp_c·v with respect to c at v = c, because vjp_c is linear
    in c.

    The network is called once. Reverse mode computes vjp_c in any case, because D is the gradient
    of vjp_c·w with respect to c. In reverse mode, all directions share f. In the taylor engine,
    each direction for which G is computed separately has its own copy of x, and hence its own
    dropout mask.

Cost:
    A training step of order one costs 3 network evaluations. A step of order 2 with products and K
    directions costs 6 + 3 K evaluations in reverse mode, and 6 + 6 K evaluations in the taylor
    engine. A step of order 3 costs 7 + 9 K evaluations in reverse mode. In the taylor engine, a
    step of order 3 costs 20 K evaluations, because each direction has its own f.

Source:
    Pearlmutter, "Fast exact multiplication by the Hessian" (1994); the double reverse pass is
    the "double backward trick" of J. Townsend (2017).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hosm_losses import _torch_internals as internals
from hosm_losses._checks import sum_elements
from hosm_losses.derivatives.backward import (
    EXPLAINED,
    LOST_ONCE,
    LOST_TWICE,
    explain,
    leaf,
    may_train,
    pass_back,
    pull_each,
    refuse_dropped,
    vjp,
)
from hosm_losses.derivatives.kinks import watch_once
from hosm_losses.taylor import propagate

Cotangent = Callable[[Tensor], Tensor]


class Network(Protocol):
    """A function of x (B, *) that treats samples independently; all other inputs are fixed."""

    def __call__(self, x: Tensor) -> Tensor:
        """The value at x (B, *)."""
        ...

    @property
    def owner(self) -> object:
        """The network for which the choice of an engine is remembered."""
        ...

    @property
    def native(self) -> "Network":
        """The function with PyTorch's operators; supports only values and first derivatives."""
        ...

    def repeat(self, count: int) -> "Network":
        """The function for `count` copies of the batch, with x of shape (count · B, *)."""
        ...


class Derivatives(NamedTuple):
    """The value of a network and its derivatives along directions.

    Attributes:
        value: f, of shape (1, B, *) if all directions share the value, and of shape (K, B, *) if
            each direction has its own value.
        directional: D = ∂f/∂x w, of shape (K, B, *).
        third: G = ∇_x (wᵀ ∂f/∂x w), of shape (K, B, *). If only the sum over the directions is
            requested, `third` may be that sum, of shape (1, B, *). None at order 2.
    """

    value: Tensor
    directional: Tensor
    third: Tensor | None = None


class Products(NamedTuple):
    """Derivatives at x (B, *), and Jacobian products of the same shape as the network's value.

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
    """Return the network's value and its derivatives from a single call to the network.

    Raises TaylorError for operators that the engine does not know.
    """
    wanted, shape = torch.is_grad_enabled(), w.shape
    copied = order == 3 and not summed  # each direction has its own copy of x
    if copied:
        network, x, w = copies(network, x, w)
        w = w.unsqueeze(0)
    f, count = watch_once(network, order, wanted), len(w)
    if order == 2:
        parts = list(propagate(f, x, w).split((1, count)))
    else:  # G, by a backward pass from w·D
        if internals.is_traced():

            def form(point: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                value, directional = propagate(f, point, w).split((1, count))
                return (w * directional).sum(), (value, directional)

            number, (value, directional), back = vjp(form, x)
        else:  # inline, because `vjp` would put two more frames around the network
            with torch.enable_grad():
                point = leaf(x, wanted)
                try:
                    value, directional = propagate(f, point, w).split((1, count))
                except EXPLAINED as error:
                    explain(error)
                    raise
                number = (w * directional).sum()
            wanted = wanted and may_train(number, x, point)
            back = pass_back(number, (point,), wanted)
        third = back(torch.ones_like(number))[0]
        parts = [value, directional, third.unsqueeze(0)]
    if copied:
        parts = [part.reshape(shape) for part in parts]
    return Derivatives(*parts) if wanted else Derivatives(*map(Tensor.detach, parts))


def reverse(network: Network, x: Tensor, w: Tensor, order: int) -> Derivatives:
    """Return the network's value and its derivatives from backward passes.

    Raises DerivativeError if autograd cannot differentiate the network twice.
    """
    if order == 2 and not internals.in_functorch():  # any cotangent will do
        return reverse_products(network, x, w, order, torch.zeros_like, False).derived
    wanted, shape = torch.is_grad_enabled(), w.shape
    if order == 3:
        network, x, w = copies(network, x, w)
    f = watch_once(network, order, wanted)

    def evaluated(point: Tensor) -> tuple[Tensor, tuple[()]]:
        value = f(point)
        refuse_dropped(value)
        return value, ()

    def pull(point: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        value, _, back = vjp(evaluated, point, lost=LOST_ONCE)
        vjp_c = back(c)[0]
        refuse_dropped(vjp_c, wanted)
        return vjp_c, value

    point, start = leaf(x, wanted), leaf(w if order == 3 else torch.zeros_like(x), wanted)
    _, value, again = vjp(pull, point, start, graph=wanted, lost=LOST_TWICE)
    if order == 2:
        parts = [value.unsqueeze(0), torch.stack([again(direction)[1] for direction in w])]
    else:
        third, directional = again(w)
        parts = [part.reshape(shape) for part in (value, directional, third)]
    trained = wanted and (w.requires_grad or may_train(value, x, point))
    return Derivatives(*parts) if trained else Derivatives(*map(Tensor.detach, parts))


def reverse_products(
    network: Network, x: Tensor, w: Tensor, order: int, cotangent: Cotangent, push: bool
) -> Products:
    """Return derivatives and products, both computed in reverse mode.

    Raises DerivativeError if autograd cannot differentiate the network twice.
    """
    wanted = torch.is_grad_enabled()
    point = leaf(x, wanted)
    value, _, back = vjp(
        lambda point: (watch_once(network, order, wanted)(point), ()), point, lost=LOST_ONCE
    )
    refuse_dropped(value)
    wanted = wanted and (w.requires_grad or may_train(value, x, point))
    c = cotangent(value.detach().unsqueeze(0)).detach()

    def pull(*points: Tensor) -> tuple[Tensor, tuple[()]]:  # the cotangent comes last
        vjp_c = back(points[-1])[0]
        refuse_dropped(vjp_c, wanted)
        return vjp_c, ()

    vjp_c, _, again = vjp(pull, leaf(c[0].clone(), False), graph=wanted, lost=LOST_TWICE)
    jvp_c = again(c[0])[0].detach().unsqueeze(0) if push else None
    if order == 2:
        parts = [value.unsqueeze(0), pull_each(again, w)]
    else:
        # One direction at a time: each has its own G, and a batch would evaluate f for each one.
        pairs = []
        for direction in w:
            start = leaf(direction, wanted)
            _, _, twice = vjp(pull, point, start, graph=wanted, lost=LOST_TWICE)
            pairs.append(twice(direction))
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
    """Return an engine's derivatives, and the products computed by backward passes from the value.

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
    value, parts, back = vjp(derived, point, graph=wanted or push)
    wanted = wanted and may_train(value, x, point)
    c = cotangent(value.reshape(shape)).detach()
    # vjp_c is linear in c, so differentiating it reveals a Function that drops the graph.
    start = leaf(c.reshape(value.shape), False)
    vjp_c, _, again = vjp(lambda c: (back(c)[0], ()), start, graph=False)
    jvp_c = again(start)[0].detach().reshape(shape) if push else None
    *parts, vjp_c = (part if wanted else part.detach() for part in (*parts, vjp_c))
    if copied:
        parts = [part.reshape(shape) for part in parts]
    return Products(Derivatives(*parts), c, vjp_c.reshape(shape), jvp_c)


def pull_backs(network: Network, x: Tensor, directions: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield (∂f/∂x)ᵀ w for each chunk w (k, B, *) of directions, after a single forward pass.

    The results have no graph. Raises DerivativeError if no graph leads from the output to x.
    """
    point = leaf(x, wanted=False)
    _, _, back = vjp(lambda point: (network(point), ()), point, graph=False, lost=LOST_ONCE)
    for w in directions:
        yield pull_each(back, w)


def quadratic_forms(
    network: Network, x: Tensor, directions: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a network's value (B, *) and the quadratic forms wᵀ ∂f/∂x w (K, B).

    This takes one forward pass, and one backward pass for each chunk (k, B, *) of directions.
    Raises DerivativeError if no graph leads from the output to x, or if a custom autograd.Function
    drops the graph.
    """
    wanted = torch.is_grad_enabled()
    f, in_turn = watch_once(network, 2, wanted), False
    if internals.in_functorch():
        value, _, back = vjp(lambda point: (f(point), ()), x)
    else:
        with torch.enable_grad():
            point = leaf(x, wanted)
            try:
                value = f(point)
            except EXPLAINED as error:
                explain(error)
                raise
        wanted = wanted and may_train(value, x, point)
        # The check stops at `point`: all earlier evaluations along an ODE path lie behind it.
        in_turn = refuse_dropped(value, wanted, point)
        back = pass_back(value, (point,), wanted, LOST_ONCE)
    forms = torch.cat([sum_elements(pull_each(back, w, in_turn) * w) for w in directions])
    return (value, forms) if wanted else (value.detach(), forms.detach())
