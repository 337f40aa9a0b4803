r"""The class `Jet`, a tensor with derivatives along directions, and functions that use it.

Purpose:
    A Jet stands in for x and carries a stack (C, B, *). The stack contains the value, `firsts`
    first derivatives (one for each direction) and, depending on `pairs`, second derivatives.
    PyTorch passes every function that is called on a Jet to `Jet.__torch_function__`, which looks
    up a rule. Most rules compute all components at once; for example, a linear layer is applied to
    the whole stack.

    Second derivatives that are zero everywhere, such as those of the input, are not stored.

    `jet` and `laplacian` are for users, and `propagate` is for the engines.

Without a rule:
    A function that has no rule is differentiated separately: `torch.func.jvp` evaluates it with
    the user's arguments, with the safe primitives in place of some of PyTorch's operators. This is
    correct but slower. Calls whose derivatives could be wrong raise TaylorError. Examples are
    complex arithmetic outside rotary embeddings, and calls under torch.no_grad or in the forward
    method of a custom autograd.Function. Operators without a forward-mode derivative in PyTorch
    also raise TaylorError. Operators that PyTorch does not differentiate raise ConstantError.
    In-place changes are handled in `memory` and `in_place`.

A rule may call other rules, and may call PyTorch functions on stacks. A rule must not call PyTorch
functions on Jets, because torch.compile would mistake the Jets for plain tensors.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from hosm_losses.taylor import memory
from hosm_losses.taylor._torch import (
    NO_FORWARD,
    forward_mode,
    forward_mode_on,
    in_custom_function,
    leave_inference_mode,
    outside_inference_mode,
    pytree,
    refuse_written,
    shell,
    watch_traced,
    without_subclasses,
)
from hosm_losses.taylor.primitives import (
    MISSING,
    WRONG,
    refuse_constant,
    safe_primitives,
    wrong_in_forward_mode,
)
from hosm_losses.taylor.registry import (
    CONSTANT,
    GIVE_THE_SOURCE,
    OF_COMPLEX,
    RULES,
    NoRule,
    Rule,
    ScriptedError,
    TaylorError,
    name_of,
)
from hosm_losses.taylor.stacks import Pairs, collect, components, extend

# The methods of Tensor that are written in Python. torch.compile traces into these methods instead
# of calling `__torch_function__`, so Jet has its own versions. Each is bound to its rule, which
# torch.compile would not find in a dictionary.
METHODS = "__iter__ __pow__ __rdiv__ __rsub__ __rtruediv__ norm split unflatten"
IN_PYTHON: list[tuple[Callable[..., Any], Rule | None]] = []
SCRIPTED = "network: expected plain Python modules; got a torch.jit module. " + GIVE_THE_SOURCE
CHANGES = "changes in place a tensor that depends on x."
CUSTOM = (
    "called by a custom autograd.Function, such as a full backward hook, on a tensor that depends "
    "on x."
)
NO_GRAD = "called under torch.no_grad on a tensor that depends on x."
COMPLEX = "makes a tensor that depends on x complex."
ROTARY = "receives complex numbers that depend on x, which may only be multiplied by constants."


class Jet(Tensor):
    """A tensor that carries derivatives of its value."""

    stack: Tensor  # the value, first and second derivatives, (C, B, *)
    firsts: int  # the number of first derivatives
    pairs: Pairs  # which second derivatives the stack contains
    memory: "list[Any] | None"  # references to this Jet and to tensors that may share its memory
    changed = False  # whether it was changed in place inside a checkpoint

    @staticmethod
    def make(
        stack: Tensor, firsts: int, pairs: Pairs = "none", *, of_complex: bool = False
    ) -> "Jet":
        """Make a Jet from a stack, which may be complex only if `of_complex` is True."""
        if stack.is_complex() and (not of_complex or torch.compiler.is_compiling()):
            raise TaylorError(f"an operator {COMPLEX}")
        if torch.compiler.is_compiling():
            marked = torch.cat([stack, torch.full_like(stack[:1], math.nan)])
            jet = marked.movedim(0, -1).as_subclass(_Traced)
            watch_traced(jet)
        else:
            jet = shell(_Complex if of_complex else _Opaque, stack)
            for propagation in memory.THREAD.propagations[-1:]:
                propagation.jets.append(weakref.ref(jet))
        jet.stack, jet.firsts, jet.pairs = stack, firsts, pairs
        jet.memory = None
        return jet

    def like(self, stack: Tensor) -> "Jet":
        """Make a Jet from another stack, for the same directions."""
        return Jet.make(stack, self.firsts, self.pairs)

    def with_dtype(self, dtype: torch.dtype) -> "Jet":
        """Return the Jet cast to a floating dtype, or the Jet itself if it has that dtype."""
        return self if self.stack.dtype == dtype else self.like(self.stack.to(dtype))

    def of(self, stack: Tensor) -> Tensor:
        """Make a Jet from a stack; for integers or booleans, return the plain value instead."""
        differentiable = stack.is_floating_point() or stack.is_complex()
        return self.like(stack) if differentiable else stack[0]

    def constant(self, value: Tensor) -> "Jet":
        """Make a Jet that has the given value and zero derivatives."""
        stack = value.to(self.stack.dtype).unsqueeze(0)
        return self.like(extend(stack, 1 + self.firsts))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return call(func, args, kwargs or {})


class _Opaque(Jet):
    """A Jet without data, so that code that bypasses `__torch_function__` has nothing to read."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise TaylorError(f"{func}: torch.func or C++ code bypasses __torch_function__.")


class _Complex(_Opaque):
    """A complex Jet, made from pairs of real numbers by rotary embeddings; see `OF_COMPLEX`.

    Hand-written formulas, especially those for gradients, hold only for real numbers.
    """

    def like(self, stack: Tensor) -> Jet:
        return Jet.make(stack, self.firsts, self.pairs, of_complex=stack.is_complex())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        jets = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, Jet)]
        if func not in CONSTANT and (func not in OF_COMPLEX or len(jets) > 1):
            raise TaylorError(f"{name_of(func)}: {ROTARY}")
        return call(func, args, kwargs or {})


class _Traced(Jet):
    """A Jet under torch.compile; its data's last axis contains the components and a final NaN.

    Under torch.compile, unpacking such as `q, k, v = qkv` bypasses `__torch_function__` and
    returns rows of the data. These rows contain all components but lack a Jet's attributes,
    so `unpack` turns the rows into Jets. Inside a network, torch.func.vmap also splits the data
    into rows, but treats the components as elements. The final NaN then makes the result NaN. In
    PyTorch 2.14 and 2.15, an assignment such as `x[i] = y` also bypasses `__torch_function__`. It
    changes the data but not the stack; see `refuse_written`.
    """


# Attributes that rules and networks read all the time. A property is ten times as fast as
# __torch_function__.
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
    """Make Jets from what torch.compile unpacked: a row of a Jet's data, or a list of rows."""
    if type(x) in (list, tuple):
        return type(x)(map(unpack, x))
    if not isinstance(x, Jet) or hasattr(x, "stack"):
        return x
    propagation = memory.THREAD.propagations[-1]
    with without_subclasses():
        stack = x.movedim(-1, 0)[:-1]
    if tuple(stack.shape[1:]) in propagation.changed:
        raise TaylorError(memory.UNPACKED)
    row = Jet.make(stack, propagation.firsts, propagation.pairs)
    memory.share_value(row, stack)  # so that the row is not changed in place
    return row


def _rule_of(func: Callable[..., Any]) -> Rule | None:
    """Find a function's rule under torch.compile, which cannot look methods up in a dictionary."""
    for method, rule in IN_PYTHON:
        if func is method:
            return rule
    return RULES.get(func)


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a PyTorch function whose arguments include Jets."""
    compiling = torch.compiler.is_compiling()
    if compiling:
        args = tuple(map(unpack, args))
        kwargs = {name: unpack(value) for name, value in kwargs.items()}
    if func in CONSTANT:
        shares = CONSTANT[func]
        # Not .data, which detaches only from the innermost of nested torch.func levels.
        answer = on_values(torch.detach if shares else func, args, kwargs)
        if isinstance(answer, Tensor) and in_custom_function():
            raise TaylorError(f"{name_of(func)}: {CUSTOM}")
        if shares:
            return memory.detached(args[0] if args else kwargs["input"], answer)
        return answer
    if kwargs.get("out") is not None:
        raise TaylorError(f"{name_of(func)}: out= {CHANGES}")
    if kwargs.get("inplace"):
        target = args[0] if args else kwargs["input"]
        return write_jet(target, call(func, args, {**kwargs, "inplace": False}))
    rule = _rule_of(func) if compiling else RULES.get(func)
    if rule is None and name_of(func) == "__get__":
        answer = on_values(func, args, kwargs)
        # A property that returns a tensor, such as .real, is differentiated like a function.
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
    """Differentiate a function that has no rule, in one evaluation under torch.func.jvp."""
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
        new_args, new_kwargs = pytree.tree_unflatten(filled, form)
        with safe_primitives():
            seen[:] = pytree.tree_flatten(func(*new_args, **new_kwargs))
        if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in seen[0]):
            raise TaylorError(f"{name_of(func)}: {COMPLEX}")
        # Return at least one tensor, even if the function returns none.
        results = tuple(leaf for leaf in seen[0] if isinstance(leaf, Tensor))
        floats = [leaf for leaf in results if leaf.is_floating_point()]
        if floats and all(unpack_dual(leaf).tangent is None for leaf in floats):
            refuse_constant(func, floats[0])
        return results or (values[0].new_zeros(()),)

    # Copied, because torch.func writes to its arguments, which fails if elements share memory.
    values = tuple(jet.stack[0].clone() for jet in jets)
    derivatives = tuple(
        jet.stack[1:].contiguous() if 0 in jet.stack.stride() else jet.stack[1:] for jet in jets
    )
    try:
        stacks = iter(along(function, values, derivatives, jets[0].firsts, jets[0].pairs))
    except NotImplementedError as error:
        if NO_FORWARD not in str(error):
            raise
        raise TaylorError(f"{name_of(func)}: {MISSING}") from error
    leaves, tree = seen
    outputs = [jets[0].of(next(stacks)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for output in outputs if name_of(func) in memory.MAY_RETURN_VIEW else ():
        memory.share(jets[0], output)
    return pytree.tree_unflatten(outputs, tree)


def along(
    function: Callable[..., Any],
    values: tuple[Tensor, ...],
    derivatives: tuple[Tensor, ...],
    firsts: int,
    pairs: Pairs,
) -> list[Tensor]:
    """Evaluate a function once under torch.func.jvp, and return the stacks of its results.

    For each value, `derivatives` contains a stack of `firsts` first derivatives, followed by the
    second derivatives. Second derivatives are omitted if they are zero everywhere or if `pairs` is
    "none".
    """
    inner: Any = partial(torch.func.jvp, function)

    def second(tangents: tuple[Tensor, ...], seconds: tuple[Tensor, ...]) -> Any:
        nested: Any = torch.func.jvp(inner, (values, tangents), (tangents, seconds))
        (value, first), (_, second) = nested
        return value, first, second

    if pairs == "none":
        value, *parts = _map_directions(partial(inner, values), derivatives)
    else:
        tangents = tuple(derivative[:firsts] for derivative in derivatives)
        # If `pairs` is "sum", the first direction carries the whole sum.
        seconds = tuple(extend(derivative[firsts:], firsts) for derivative in derivatives)
        value, *parts = _map_directions(second, tangents, seconds)
        parts[1] = pytree.tree_map(partial(collect, pairs=pairs), parts[1])
    stacks = zip(value, *parts, strict=True)
    return [torch.cat([value.unsqueeze(0), *parts]) for value, *parts in stacks]


def _map_directions(function: Callable[..., Any], *args: tuple[Tensor, ...]) -> Any:
    """The value of a function, and its derivatives along all directions.

    Several directions are evaluated together under vmap, with the same dropout mask.
    """
    with forward_mode():
        if torch.compiler.is_compiling():
            # For a view, PyTorch would ask for the offset, which is not known for all sizes.
            args = pytree.tree_map(torch.clone, args)
        if len(args[0][0]) > 1:
            outs: Any = (None, *(0,) * len(args))
            return torch.func.vmap(function, out_dims=outs, randomness="same")(*args)
        value, *parts = function(*pytree.tree_map(lambda stack: stack[0], args))
    return value, *pytree.tree_map(lambda part: part.unsqueeze(0), parts)


def write_jet(x: Tensor, result: Any) -> Tensor:
    """Cast a result to the dtype of x, write it into x (a Jet or plain tensor), and return x."""
    if result.shape != x.shape:
        raise TaylorError(
            f"an in-place change of a tensor of shape {tuple(x.shape)} into {tuple(result.shape)}."
        )
    if not isinstance(x, Jet):
        # A new Jet, because it is swapped with x.
        memory.to_jet(x, result.like(result.stack.to(x.dtype)))
        return x
    if not isinstance(result, Jet):
        result = x.constant(result)
    return memory.write(x, result.stack if result.dtype == x.dtype else result.stack.to(x.dtype))


def _is_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the first argument, and no other argument, is a Jet."""
    first, *others = *args, *kwargs.values()
    for other in others:
        if isinstance(other, Jet):
            return False
    return isinstance(first, Jet)


# One or several inputs, and their directions.
Inputs = Tensor | tuple[Any, ...]
Directions = Tensor | tuple[Tensor | None, ...]


def propagate(
    function: Callable[..., object], x: Inputs, directions: Directions, pairs: Pairs = "none"
) -> Tensor:
    """Return the stack (C, B, *) of f at x (B, *).

    The stack contains f, followed by ∂f w for each of K directions w and by any second
    derivatives.

    `pairs` selects the second derivatives: "none", "squares" (∂²f[w, w] for every direction w) or
    "sum" (the sum of these derivatives, stored as one component). Raises TaylorError if
    derivatives cannot be propagated through the function. For a tuple of inputs, pass a tuple of
    directions. An input whose directions are None stays a plain tensor.

    Example:
        >>> x = torch.tensor([[0.5]])
        >>> propagate(torch.square, x, torch.ones(1, 1, 1), "squares").flatten()
        tensor([0.2500, 1.0000, 2.0000])
    """
    inputs: Any = x if isinstance(x, tuple) else (x,)
    ways: Any = directions if isinstance(directions, tuple) else (directions,)
    count = next(len(w) for w in ways if w is not None)
    # Joining along the batch keeps a channels-last layout.
    stacks = [
        x if w is None else torch.cat([x, *w.to(x.dtype)]).unflatten(0, (1 + count, len(x)))
        for x, w in zip(inputs, ways, strict=True)
    ]
    before, finished = len(memory.THREAD.became_jets), False
    propagation = memory.Propagation(count, pairs, [], [], [])
    memory.THREAD.propagations.append(propagation)
    try:
        # Gradients must be on: a custom Function is detected by the fact that it turns them off.
        with torch.enable_grad(), forward_mode_on():
            jets = [
                stack if w is None else Jet.make(stack, count, pairs)
                for stack, w in zip(stacks, ways, strict=True)
            ]
            # A single Jet is handed over, as a reference kept here would count as a use.
            result: Any = unpack(function(*jets) if len(jets) > 1 else function(jets.pop()))
            del jets
        stack: Any = getattr(result, "stack", None)
        kind, finished = type(result), True
        del result
        if torch.compiler.is_compiling():
            refuse_written()
    finally:
        memory.THREAD.propagations.pop()
        memory.end(propagation)
        memory.to_tensor(before, finished)
    if not issubclass(kind, Jet):
        raise TaylorError(f"its output does not carry derivatives in x; got {kind.__name__}.")
    if stack.is_complex():
        raise TaylorError(f"the function {COMPLEX}")
    seconds = {"none": 0, "sum": 1}.get(pairs, count)
    # Second derivatives that are zero everywhere, as in a linear network, are not in the stack.
    return extend(stack, 1 + count + seconds)


def on_values(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function on the values of Jets; the result has no derivatives."""
    args, kwargs = pytree.tree_map_only(Jet, lambda jet: jet.stack[0], (args, kwargs))
    return func(*args, **kwargs)


def stacks_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The stacks of Jets and plain tensors, extended to equal length with zero derivatives."""
    stacks = [x.stack if isinstance(x, Jet) else x.unsqueeze(0) for x in tensors]
    count = max([stack.shape[0] for stack in stacks])
    return [extend(stack, count) for stack in stacks]


def jet_among(candidates: Iterable[Any]) -> Jet:
    """The first Jet among several values."""
    return next(candidate for candidate in candidates if isinstance(candidate, Jet))


def result_type(a: Any, b: Any) -> torch.dtype:
    """PyTorch's result dtype for the operands a and b, either of which may be a Jet."""
    values = [x.stack[0] if isinstance(x, Jet) else x for x in (a, b)]
    # Computed from empty tensors, because torch.compile does not trace torch.result_type.
    empty = [x.new_empty((0,) * min(x.ndim, 1)) if isinstance(x, Tensor) else x for x in values]
    return torch.add(*empty).dtype


def define_methods() -> None:
    """Define Jet's own versions of the Tensor methods that are written in Python.

    All rules must be registered before this call.
    """
    for name in METHODS.split():
        function = getattr(Tensor, name)
        IN_PYTHON.append((function, RULES.get(function)))
        setattr(Jet, name, _method(function))


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Jet, *args: Any, **named: Any) -> Any:
        # In eager mode, the function itself is called, so that active modes see the call.
        ask = torch.compiler.is_compiling()
        return call(function, (self, *args), named) if ask else function(self, *args, **named)

    return method


# ----------------------------------------------------------------- a function with its derivatives
Function = Callable[..., Tensor]
PAIRS = get_args(Pairs)


def _check_floats(name: str, value: object) -> None:
    if isinstance(value, Tensor) and value.is_floating_point():
        return
    came = value.dtype if isinstance(value, Tensor) else type(value).__name__
    remedy = f"Convert it with torch.as_tensor({name}, dtype=torch.float32)."
    if isinstance(value, Tensor) and value.is_complex():
        remedy = "Pass real numbers, for example from torch.view_as_real."
    raise TypeError(f"{name}: expected a tensor in floating point; got {came}. {remedy}")


def _check_batch(x: object, place: str = "") -> None:
    _check_floats(f"x{place}", x)
    if isinstance(x, Tensor) and x.ndim == 0:
        raise ValueError(
            f"x{place}: expected a batch (B, *); got no axes. Add one by x{place}.reshape(1)."
        )


def _check_inputs(inputs: tuple[Any, ...], ways: tuple[Any, ...], several: bool) -> None:
    """Raise an error unless all directions fit their inputs and have the same K and B."""
    sizes: set[tuple[int, ...]] = set()
    for i, (x, directions) in enumerate(zip(inputs, ways, strict=True)):
        if several and directions is None:
            continue
        place = f"[{i}]" if several else ""
        _check_batch(x, place)
        _check_floats(f"directions{place}", directions)
        if directions.shape[1:] != x.shape or not len(directions):
            shape = ", ".join(map(str, x.shape))
            came = tuple(directions.shape)
            raise ValueError(f"directions{place}: expected the shape (K, {shape}); got {came}.")
        sizes.add(tuple(directions.shape[:2]))
    if len(sizes) != 1:
        raise ValueError(
            "directions: expected one K and one B for all inputs, with directions for at least "
            f"one of them; got (K, B) of {sorted(sizes)}."
        )


def jet(
    function: Function, x: Inputs, directions: Directions, pairs: Pairs = "none"
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Return f(x), its first derivatives along directions and, on request, second derivatives.

    The function is called once. All results are differentiable with respect to x, the directions
    and the function's parameters. PyTorch 2.6, 2.13 and 2.15 compute some derivatives
    incorrectly, such as those of norm layers. For such derivatives, `jet` uses the library's own
    formulas.

    Args:
        function: a function of x (B, \*) that treats samples independently, such as a network
            whose conditioning inputs are already bound.
        x: a floating-point batch (B, \*) or, for a function of several arguments, a tuple of
            batches, each with its own shape.
        directions: K directions for every sample, of shape (K, B, \*); `jet` casts them to the
            dtype of x. For a tuple of inputs, pass a tuple; derivative k is then taken along the
            k-th directions of all inputs jointly. An input whose directions are None, such as
            class labels, is held fixed and may have any dtype.
        pairs: the second derivatives to compute: "none", "squares" (∂²f[v, v] for every direction
            v) or "sum" (the sum of these derivatives over all directions).

    Returns:
        f(x) (B, \*), the first derivatives (K, B, \*), and the second derivatives. The second
        derivatives are None if `pairs` is "none"; their shape is (K, B, \*) for "squares" and
        (B, \*) for "sum".

    Raises:
        TaylorError: if derivatives cannot be propagated through the function; the message says
            why.
        DerivativeError: if an operator inside the function has no derivative in PyTorch, or if a
            hook changes a gradient.
        TypeError: if directions, or inputs with directions, are not floating-point tensors, or if
            `pairs` is not a string.
        ValueError: if x has no axes, the directions do not fit the shape of x, K is zero, tuples
            of inputs and directions differ in length, K or B differs between inputs, all
            directions are None, or `pairs` is an unknown string.

    Example:
        >>> x, v = torch.tensor([[0.0], [1.0]]), torch.ones(1, 2, 1)
        >>> f, first, second = jet(lambda x: x**3, x, v, "squares")
        >>> first.flatten().tolist(), second.flatten().tolist()
        ([0.0, 3.0], [0.0, 6.0])
        >>> t = torch.tensor([2.0, 3.0])
        >>> jet(lambda x, t: t[:, None] * x, (x, t), (v, torch.ones(1, 2)))[1].flatten().tolist()
        [2.0, 4.0]
    """
    several = isinstance(x, tuple)
    inputs: Any = x if several else (x,)
    ways: Any = directions if several else (directions,)
    _check_inputs(inputs, ways, several)
    if pairs not in PAIRS:
        kind = ValueError if isinstance(pairs, str) else TypeError
        raise kind(f"pairs: expected one of {PAIRS}; got {pairs!r}.")
    with outside_inference_mode():
        given: Any = pytree.tree_map_only(Tensor, leave_inference_mode, (x, directions))
        stack = propagate(function, given[0], given[1], pairs)
    stack = stack if torch.is_grad_enabled() else stack.detach()
    count = next(len(w) for w in ways if w is not None)
    value, first, second = components(stack, count)
    if pairs == "none":
        return value[0], first, None
    return value[0], first, second[0] if pairs == "sum" else second


@overload
def laplacian(function: Function, x: Tensor, *, gradient: Literal[False] = False) -> Tensor: ...
@overload
def laplacian(
    function: Function, x: Tensor, *, gradient: Literal[True]
) -> tuple[Tensor, Tensor, Tensor]: ...
def laplacian(
    function: Function, x: Tensor, *, gradient: bool = False
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Return Δf, the sum of the second derivatives ∂²f/∂x_i² over the elements of a sample.

    One direction is used for each of the d elements of a sample. Inside the function, a tensor
    that depends on x therefore occupies up to d + 2 times as much memory as its value alone.
    `laplacian` raises the same errors as `jet`.

    Args:
        function: a function of x (B, \*) that treats samples independently.
        x: a floating-point batch (B, \*).
        gradient: whether to return f(x) and ∇f as well, from the same pass.

    Returns:
        Δf, with the shape of f(x). With `gradient`, a tuple of f(x), ∇f and Δf, where ∇f has the
        axes of f(x), followed by the axes of a sample. If f(x) is one number per sample, ∇f has
        the shape of x.

    Example:
        >>> laplacian(lambda x: (x**3).sum(1), torch.tensor([[1.0, 2.0]]))
        tensor([18.])
        >>> laplacian(lambda x: (x**3).sum(1), torch.tensor([[1.0, 2.0]]), gradient=True)
        (tensor([9.]), tensor([[ 3., 12.]]), tensor([18.]))
    """
    _check_batch(x)
    d = x.shape[1:].numel()
    units = torch.eye(d, dtype=x.dtype, device=x.device)
    directions = units.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    value, first, second = jet(function, x, directions, "sum")
    assert second is not None
    if not gradient:
        return second
    return value, first.movedim(0, -1).reshape(*value.shape, *x.shape[1:]), second
