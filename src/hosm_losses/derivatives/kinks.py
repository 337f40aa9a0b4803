r"""Warnings about discontinuous derivatives, and facts learned from earlier calls to a network.

Purpose:
    In a ReLU network, ∂f/∂x is piecewise constant as a function of the bias before a ReLU. The
    gradient of a second-order term with respect to that bias is therefore zero, although the mean
    of the term over the data depends on the bias, which determines on which side of a kink each
    sample lies. No derivative of the network shows this dependence.

    Therefore, when a network is first called with gradients enabled, the operators between x and
    the output are checked for discontinuous derivatives. Clamps are ignored, because most of them
    only guard against overflow.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hosm_losses import _torch_internals as internals
from hosm_losses._checks import warn
from hosm_losses.taylor import Jet

_JUMPS = """
    relu relu6 leaky_relu rrelu prelu hardtanh hardswish hardsigmoid softshrink hardshrink
    threshold selu abs absolute l1_loss maximum minimum fmax fmin max min amax amin aminmax cummax
    cummin sort msort topk kthvalue median quantile special_i0e
"""
JUMPS = frozenset(_JUMPS.split())
# Operators whose first derivative is continuous and whose second derivative jumps.
JUMPS_TWICE = frozenset({"celu", "softsign", "smooth_l1_loss", "huber_loss", "special_i1e"})
WARNING = (
    "network: {} depends on x through {}. The gradient of a likelihood, or of a loss beyond order "
    "one, then misses the effect of moving the jump, for example by a bias before it, because no "
    "derivative shows that. Use a smooth operator instead, such as SiLU or softplus."
)


class Past(NamedTuple):
    """What earlier calls of one kind have shown about an engine.

    Attributes:
        served: the surroundings, that is, transforms and modes, in which a call has succeeded.
        failure: why the last failed call has failed.
        refused: whether the engine is no longer tried, because the next call would fail too.
    """

    served: frozenset[tuple[Any, ...]] = frozenset()
    failure: str = ""
    refused: bool = False


@dataclass
class NetworkMemory:
    """Facts about a network, learned from earlier calls.

    Attributes:
        engines: the past of each (engine, kind of call).
        warned: whether the user has been warned that reverse mode takes over.
        orders: the orders (2, 3) at which the network is no longer checked for discontinuous
            derivatives.
    """

    engines: dict[tuple[str, tuple[Any, ...]], Past] = field(default_factory=dict)
    warned: bool = False
    orders: set[int] = field(default_factory=set)


_MEMORIES: "weakref.WeakKeyDictionary[Any, NetworkMemory]" = weakref.WeakKeyDictionary()


def refusal(owner: object, order: int) -> str | None:
    """Return why the taylor engine refuses calls of this order, or None if no refusal is known."""
    for (engine, kind), past in memory_of(owner).engines.items():
        if engine == "taylor" and kind[0] == order and past.refused:
            return past.failure
    return None


def memory_of(owner: object) -> NetworkMemory:
    """Return the memory of `owner`; a new one if it cannot be hashed or weakly referenced."""
    try:
        return _MEMORIES.setdefault(owner, NetworkMemory())
    except TypeError:
        return NetworkMemory()


def watch_once(field: Any, order: int, wanted: bool) -> Callable[[Tensor], Tensor]:
    """Return `field`, wrapped in a check for discontinuous derivatives if that is still due."""
    if torch.compiler.is_compiling() or not wanted or order in memory_of(field.owner).orders:
        return field

    def first(point: Tensor) -> Tensor:
        value, jumping = find_jumps(field, point, order)
        memory_of(field.owner).orders.update((2, 3) if jumping or order == 3 else (2,))
        if jumping:
            warn(WARNING.format(type(field.owner).__name__, jumping))
        return value

    return first


def find_jumps(
    field: Callable[[Tensor], Tensor], point: Tensor, order: int
) -> tuple[Tensor, str | None]:
    """Return a field's value, and a phrase that names operators with discontinuous derivatives.

    The phrase is None if there are none, of first or, at order three, of second derivatives.
    """
    with _Watch(Jet if isinstance(point, Jet) else Tensor) as watch:
        value = field(point)
    operators = [*watch.find(_between(point, value))]
    for derivative, ordinal in ((1, ""), (2, "second "))[: order - 1]:
        names = sorted({name for name, jumps in operators if jumps == derivative})
        if names:
            return value, f"{' and '.join(names)}, whose {ordinal}derivative jumps"
    return value, None


def _jumps(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Return the order (1 or 2) of an operator's first discontinuous derivative, or 0 if none."""
    if name == "elu":
        return 2 if named.get("alpha", args[1] if len(args) > 1 else 1.0) == 1 else 1
    if name == "smooth_l1_loss" and named.get("beta") == 0:
        return 1
    if name in JUMPS_TWICE:
        return 2
    return int(name in JUMPS or "max_pool" in name)


class _Noted(NamedTuple):
    """The result of an operator with a discontinuous derivative."""

    name: str
    jumps: int
    result: Callable[[], Tensor | None]  # a weak reference: a strong one would count as a use
    node: Any  # the node of the result in the graph
    powers: list[float]  # the powers to which the result was raised; 1 for any other use


class _Watch(TorchFunctionMode):
    """Record the results (Jets or plain tensors) of operators with discontinuous derivatives."""

    def __init__(self, kind: type[Tensor]) -> None:
        super().__init__()
        self.kind = kind
        self.noted: list[_Noted] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named, name = kwargs or {}, getattr(func, "__name__", "").strip("_")
        first = args[0] if args else named.get("input")
        power = 2 if name == "square" else args[-1] if name == "pow" and args else 1
        for noted in self.noted if name != "get" else ():  # `get` reads a property
            if any(noted.result() is argument for argument in args):
                noted.powers.append(power if isinstance(power, int | float) else 1)
        x = _stack(first)
        jumps = _jumps(name, args, named) if isinstance(x, Tensor) and not x.is_complex() else 0
        result = func(*args, **named)
        for leaf in internals.pytree.tree_leaves(result) if jumps else ():
            if isinstance(leaf, self.kind):
                self.noted.append(_Noted(name, jumps, weakref.ref(leaf), _stack(leaf).grad_fn, []))
        return result

    def find(self, nodes: set[Any]) -> Iterator[tuple[str, float]]:
        """Yield (name, lowest order that jumps, or 0) of the operators whose nodes are given."""
        for name, jumps, _, node, powers in self.noted:
            if node in nodes:
                if name in ("relu", "abs") and powers:
                    # The nth derivative of relu(x)^n has a jump, and so has that of |x|^n for
                    # odd n. For even n, |x|^n is smooth.
                    jumping = [max(n, 1) for n in powers if name == "relu" or n % 2]
                    jumps = min(jumping, default=0)
                yield name, jumps


def _between(point: Tensor, value: Tensor) -> set[Any]:
    """Return the graph nodes between a point and a value or, of a Jet, all nodes.

    `_Watch` records None as the node of a result without a graph.
    """
    above: dict[Any, list[Any]] = defaultdict(list)
    for node in internals.graph_nodes([_stack(value)]):
        for below, _ in node.next_functions:
            above[below].append(node)
    if isinstance(point, Jet):
        return {None, _stack(value).grad_fn, *above}
    between, nodes = set[Any](), [internals.gradient_node(point)]
    while nodes:
        node = nodes.pop()
        if node not in between:
            between.add(node)
            nodes.extend(above[node])
    return between


def _stack(x: Any) -> Any:
    return x.stack if isinstance(x, Jet) else x
