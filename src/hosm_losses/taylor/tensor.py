r"""A tensor with its derivatives along directions, and what a function makes of one.

What:
    A Jet stands for x and carries a stack (C, B, *): the value; `firsts` first derivatives, one
    for each direction; then, if `pairs` says so, second derivatives. PyTorch hands every function
    that is called on a Jet to `Jet.__torch_function__`, which looks up a rule. A rule computes all
    the components at once: a linear layer is one call on the whole stack.

    Second derivatives that are zero everywhere, as those of the input are, are not stored.

Without a rule:
    The function is differentiated by `torch.func.jvp`, by itself and with the user's own
    arguments, with the safe primitives in place: right, but not as fast. What cannot be right
    raises TaylorError: complex numbers, but for those of rotary embeddings, and anything under
    torch.no_grad, where a custom autograd.Function computes. What PyTorch does not differentiate
    raises ConstantError. Changes in place are those of `aliases` and `in_place`.

A rule calls other rules, and PyTorch on stacks; it does not call PyTorch on Jets, which
torch.compile would take for plain tensors there.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from hosm_losses.taylor import aliases
from hosm_losses.taylor._torch import (
    forward_mode_on,
    in_custom_function,
    pytree,
    shell,
    without_subclasses,
)
from hosm_losses.taylor.errors import NoRule, TaylorError
from hosm_losses.taylor.hooks import GIVE_THE_SOURCE, ScriptedError
from hosm_losses.taylor.primitive_mode import safe_primitives
from hosm_losses.taylor.registry import CONSTANT, OF_COMPLEX, RULES, Rule, name_of
from hosm_losses.taylor.stacks import Pairs, extend
from hosm_losses.taylor.unknown import (
    WRONG,
    along,
    refuse_constant,
    wrong_in_forward_mode,
)

# The methods that Tensor has in Python. torch.compile looks into them in place of asking
# `__torch_function__`, so Jet has its own; with their rules, which it does not find in a
# dictionary.
METHODS = "__iter__ __pow__ __rdiv__ __rsub__ __rtruediv__ norm split unflatten"
IN_PYTHON: list[tuple[Callable[..., Any], Rule | None]] = []
SCRIPTED = "network: expected modules that Python calls; got one of torch.jit. " + GIVE_THE_SOURCE
CHANGES = "changes in place what depends on x."
CUSTOM = "called by a custom autograd.Function, as a full backward hook is, on what depends on x."
NO_GRAD = "called under torch.no_grad on what depends on x."
COMPLEX = "makes complex numbers of what depends on x."
ROTARY = "is given complex numbers that depend on x, which are only multiplied by constants."


class Jet(Tensor):
    """A tensor that carries derivatives of its value."""

    stack: Tensor  # value, first and second derivatives, of shape (C, B, *)
    firsts: int  # the number of first derivatives
    pairs: Pairs  # which second derivatives there are
    memory: "list[Any] | None"  # references to all that may share memory, itself among them
    changed = False  # whether in place inside one of torch's checkpoints

    @staticmethod
    def make(
        stack: Tensor, firsts: int, pairs: Pairs = "none", *, of_complex: bool = False
    ) -> "Jet":
        """Return the Jet of a stack, which may be one of complex numbers where that is said."""
        if stack.is_complex() and (not of_complex or torch.compiler.is_compiling()):
            raise TaylorError(f"an operator {COMPLEX}")
        if torch.compiler.is_compiling():
            marked = torch.cat([stack, torch.full_like(stack[:1], math.nan)])
            jet = marked.movedim(0, -1).as_subclass(_Traced)
        else:
            jet = shell(_Complex if of_complex else _Opaque, stack)
            for propagation in aliases.THREAD.propagations[-1:]:
                propagation.jets.append(weakref.ref(jet))
        jet.stack, jet.firsts, jet.pairs = stack, firsts, pairs
        jet.memory = None
        return jet

    def like(self, stack: Tensor) -> "Jet":
        """Return the Jet of another stack along the same directions."""
        return Jet.make(stack, self.firsts, self.pairs)

    def with_dtype(self, dtype: torch.dtype) -> "Jet":
        """Return the Jet in a floating type, itself if it is in that."""
        return self if self.stack.dtype == dtype else self.like(self.stack.to(dtype))

    def of(self, stack: Tensor) -> Tensor:
        """Return the Jet of a stack, or the plain value of one of integers or masks."""
        differentiable = stack.is_floating_point() or stack.is_complex()
        return self.like(stack) if differentiable else stack[0]

    def constant(self, value: Tensor) -> "Jet":
        """Return the Jet of a value without derivatives."""
        stack = value.to(self.stack.dtype).unsqueeze(0)
        return self.like(extend(stack, 1 + self.firsts))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return call(func, args, kwargs or {})


class _Opaque(Jet):
    """A Jet without data, so that code which passes by `__torch_function__` finds none."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise TaylorError(f"{func}: called past __torch_function__, as by torch.func or C++ code.")


class _Complex(_Opaque):
    """A Jet of complex numbers, as rotary embeddings make of pairs: see `OF_COMPLEX`.

    Formulas by hand, of gradients above all, are those of real numbers.
    """

    def like(self, stack: Tensor) -> Jet:
        return Jet.make(stack, self.firsts, self.pairs, of_complex=stack.is_complex())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        jets = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Jet)]
        if func not in CONSTANT and (func not in OF_COMPLEX or len(jets) > 1):
            raise TaylorError(f"{name_of(func)}: {ROTARY}")
        return call(func, args, kwargs or {})


class _Traced(Jet):
    """A Jet under torch.compile, whose data are its stack with the components last, and NaN.

    `q, k, v = qkv` passes by `__torch_function__` there, and takes rows of the data. So a row has
    all components, if no attributes: see `unpack`. So does torch.func.vmap inside a network,
    which would compute with the components as if they were elements: that becomes NaN.
    """


# What rules and networks ask all the time, in a tenth of the time of __torch_function__.
_ASKED: dict[str, Callable[[Jet], Any]] = {
    "shape": lambda jet: jet.stack.shape[1:],
    "ndim": lambda jet: jet.stack.ndim - 1,
    "dtype": lambda jet: jet.stack.dtype,
    "device": lambda jet: jet.stack.device,
}
for _entry, _answer in _ASKED.items():
    setattr(_Opaque, _entry, property(_answer))
    setattr(_Traced, _entry, property(lambda jet, of=_answer: of(unpack(jet))))


def unpack(x: Any) -> Any:
    """An argument, which may be a row that torch.compile unpacked, or several of them."""
    if type(x) in (list, tuple):
        return type(x)(map(unpack, x))
    if not isinstance(x, Jet) or hasattr(x, "stack"):
        return x
    propagation = aliases.THREAD.propagations[-1]
    with without_subclasses():
        stack = x.movedim(-1, 0)[:-1]
    if tuple(stack.shape[1:]) in propagation.changed:
        raise TaylorError(aliases.UNPACKED)
    row = Jet.make(stack, propagation.firsts, propagation.pairs)
    aliases.share_value(row, stack)  # and is not changed in place
    return row


def _rule_of(func: Callable[..., Any]) -> Rule | None:
    """The rule of a function under torch.compile, which finds no method in a dictionary."""
    for method, rule in IN_PYTHON:
        if func is method:
            return rule
    return RULES.get(func)


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a function of PyTorch on arguments with Jets among them."""
    compiling = torch.compiler.is_compiling()
    if compiling:
        args = tuple(map(unpack, args))
        kwargs = {name: unpack(value) for name, value in kwargs.items()}
    if func in CONSTANT:
        shares = CONSTANT[func]
        # Not by .data, which detaches from the innermost alone of nested levels of torch.func.
        answer = on_values(torch.detach if shares else func, args, kwargs)
        if isinstance(answer, Tensor) and in_custom_function():
            raise TaylorError(f"{name_of(func)}: {CUSTOM}")
        if shares:
            return aliases.detached(args[0] if args else kwargs["input"], answer)
        return answer
    if kwargs.get("out") is not None:
        raise TaylorError(f"{name_of(func)}: out= {CHANGES}")
    if kwargs.get("inplace"):
        target = args[0] if args else kwargs["input"]
        return write_jet(target, call(func, args, {**kwargs, "inplace": False}))
    rule = _rule_of(func) if compiling else RULES.get(func)
    if rule is None and name_of(func) == "__get__":
        answer = on_values(func, args, kwargs)
        # A property that is a tensor, such as .real, is a function like any other.
        return differentiate(func, args, kwargs) if isinstance(answer, Tensor) else answer
    if rule is None and name_of(func) == "__set__":
        raise TaylorError(f"a property {CHANGES}")
    if not torch.is_grad_enabled():
        raise TaylorError(f"{name_of(func)}: {CUSTOM if in_custom_function() else NO_GRAD}")
    taken = None if rule is None else rule.takes(args, kwargs)
    if rule is not None and taken is not None and (rule.several or _is_first(*taken)):
        try:
            return rule.function(*taken[0], **taken[1])
        except NoRule:
            pass
    return differentiate(func, args, kwargs)


def differentiate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Differentiate a function without a rule by torch.func.jvp, in one evaluation of it."""
    if isinstance(func, torch.ScriptMethod):
        raise ScriptedError(SCRIPTED)
    flat, form = pytree.tree_flatten((args, kwargs))
    places = [place for place, entry in enumerate(flat) if isinstance(entry, Jet)]
    jets: list[Jet] = [flat[place] for place in places]
    if wrong_in_forward_mode(func, args, kwargs):
        raise TaylorError(f"{name_of(func)}: {WRONG}")
    seen: list[Any] = []

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(flat)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        given, named = pytree.tree_unflatten(filled, form)
        with safe_primitives():
            seen[:] = pytree.tree_flatten(func(*given, **named))
        if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in seen[0]):
            raise TaylorError(f"{name_of(func)}: {COMPLEX}")
        # One result at least, where the function returns no tensor.
        found = tuple(leaf for leaf in seen[0] if isinstance(leaf, Tensor))
        floats = [leaf for leaf in found if leaf.is_floating_point()]
        if floats and all(unpack_dual(leaf).tangent is None for leaf in floats):
            refuse_constant(func, floats[0])
        return found or (values[0].new_zeros(()),)

    # Copies: torch.func writes to what it is given, which elements in one place do not allow.
    values = tuple(jet.stack[0].clone() for jet in jets)
    derivatives = tuple(
        jet.stack[1:].contiguous() if 0 in jet.stack.stride() else jet.stack[1:] for jet in jets
    )
    stacks = iter(along(function, values, derivatives, jets[0].firsts, jets[0].pairs))
    leaves, tree = seen
    found = [jets[0].of(next(stacks)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for each in found if name_of(func) in aliases.PERHAPS_VIEWS else ():
        aliases.share(jets[0], each)
    return pytree.tree_unflatten(found, tree)


def write_jet(x: Tensor, result: Any) -> Tensor:
    """Give a Jet or a plain tensor, in place and in its type, what a Jet carries; return it."""
    if result.shape != x.shape:
        raise TaylorError(
            f"a change in place of what has shape {tuple(x.shape)} into {tuple(result.shape)}."
        )
    if not isinstance(x, Jet):
        # A Jet of its own, for it changes places with x.
        aliases.promote(x, result.like(result.stack.to(x.dtype)))
        return x
    if not isinstance(result, Jet):
        result = x.constant(result)
    return aliases.write(x, result.stack if result.dtype == x.dtype else result.stack.to(x.dtype))


def _is_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the first argument is a Jet and no other is."""
    first, *others = *args, *kwargs.values()
    for other in others:
        if isinstance(other, Jet):
            return False
    return isinstance(first, Jet)


def propagate(
    function: Callable[[Tensor], object], x: Tensor, directions: Tensor, pairs: Pairs = "none"
) -> Tensor:
    """The stack (C, B, *) of a function at x (B, *): f, ∂f w for the K directions, and pairs.

    `pairs` is "none"; "squares" for ∂²f[w, w] of every direction; "sum" for the sum of those,
    carried as one. TaylorError says what cannot be carried.

    Example:
        >>> x = torch.tensor([[0.5]])
        >>> propagate(torch.square, x, torch.ones(1, 1, 1), "squares").flatten()
        tensor([0.2500, 1.0000, 2.0000])
    """
    count = len(directions)
    # Joined along the batch, which keeps a channels-last layout.
    stack = torch.cat([x, *directions]).unflatten(0, (1 + count, len(x)))
    before, finished = len(aliases.THREAD.promoted), False
    propagation = aliases.Propagation(count, pairs, [], [], [])
    aliases.THREAD.propagations.append(propagation)
    try:
        # Gradients are off in the forward of a custom Function, which is how one is found.
        with torch.enable_grad(), forward_mode_on():
            result: Any = unpack(function(Jet.make(stack, count, pairs)))
        stack, kind, finished = getattr(result, "stack", stack), type(result), True
        del result
    finally:
        aliases.THREAD.propagations.pop()
        aliases.end(propagation)
        aliases.demote(before, finished)
    if not issubclass(kind, Jet):
        raise TaylorError(f"its output does not carry derivatives in x; got {kind.__name__}.")
    if stack.is_complex():
        raise TaylorError(f"the function {COMPLEX}")
    seconds = {"none": 0, "sum": 1}.get(pairs, count)
    # Second derivatives that are zero everywhere, as of a linear network, are not in the stack.
    return extend(stack, 1 + count + seconds)


def on_values(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function on the values of Jets: what it returns has no derivative."""
    args, kwargs = pytree.tree_map_only(Jet, lambda jet: jet.stack[0], (args, kwargs))
    return func(*args, **kwargs)


def stacks_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Equally long stacks of Jets and plain tensors, which have derivatives of zero."""
    stacks = [each.stack if isinstance(each, Jet) else each.unsqueeze(0) for each in tensors]
    count = max([stack.shape[0] for stack in stacks])
    return [extend(stack, count) for stack in stacks]


def jet_among(candidates: Iterable[Any]) -> Jet:
    """The first Jet of several values, of which one is."""
    return next(each for each in candidates if isinstance(each, Jet))


def result_type(a: Any, b: Any) -> torch.dtype:
    """The type that PyTorch gives the values of a and b, Jets or not, together."""
    values = [x.stack[0] if isinstance(x, Jet) else x for x in (a, b)]
    # Of tensors without elements: torch.compile does not trace torch.result_type.
    empty = [x.new_empty((0,) * min(x.ndim, 1)) if isinstance(x, Tensor) else x for x in values]
    return torch.add(*empty).dtype


def define_methods() -> None:
    """Give Jet the methods that are written in Python, when every rule is registered."""
    for name in METHODS.split():
        function = getattr(Tensor, name)
        IN_PYTHON.append((function, RULES.get(function)))
        setattr(Jet, name, _method(function))


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Jet, *args: Any, **named: Any) -> Any:
        # Elsewhere by way of the modes that are on.
        ask = torch.compiler.is_compiling()
        return call(function, (self, *args), named) if ask else function(self, *args, **named)

    return method
