r"""Derivatives of a function along directions, in one call of it.

`jet` and `laplacian` are for users; the engine below them needs PyTorch and nothing else:

    >>> import torch
    >>> x, directions = torch.zeros(4, 3), torch.ones(2, 4, 3)
    >>> f, first, second = jet(torch.sin, x, directions, "squares")
    >>> f.shape, first.shape, second.shape
    (torch.Size([4, 3]), torch.Size([2, 4, 3]), torch.Size([2, 4, 3]))

How it works:
    The function is called once, on a `Jet` in the place of x: a tensor that looks like x, and
    carries a stack (C, B, *) of its value, its first derivatives along the directions and its
    second ones, along l and twice along l. PyTorch hands each function that is called on a Jet
    to `Jet.__torch_function__`, which looks for a rule in the `registry`. A rule makes the stack
    of y = f(x) from that of x. It is the chain rule, in two lines:

        y_l = ∂f x_l        y_ll = ∂f x_ll + ∂²f[x_l, x_l]

    A function without a rule is differentiated by itself, by `torch.func.jvp`. What cannot be
    right raises `TaylorError`, such as a custom autograd.Function or complex numbers, but for
    those of rotary embeddings.

Kinds of rules, with one of each:
    linear: ∂²f is zero, so it is the function itself, of one component after the other or of the
    stack, one axis further on.

        linear(lambda stack, dim, index: stack.select(_axis(stack, dim), index), "select")

    bilinear: y_l = a_l · b + a · b_l, and so on: `product_rule` knows the rest.

        @rule("mul", several=True, kind="bilinear")
        def multiply(a, b):
            return product_rule(a, b, torch.mul, ndim)

    pointwise: a generator of the function and its first three derivatives at x. The third is for
    gradients, which are written once for all: see `pointwise`.

        @pointwise("exp")
        def _exp(x):
            return repeat(torch.exp(x), 4)

    composite: a few other functions. `ops` are those of torch, or the engine's.

        @composite(F.glu)
        def _glu(ops, input, dim=-1):
            value, gate = ops.chunk(input, 2, dim)
            return ops.mul(value, ops.sigmoid(gate))

    A rule that is none of these, such as that of softmax, computes with stacks by hand. The page
    on derivatives says how to add one and to test it.

Source:
    Griewank and Walther, "Evaluating derivatives" (2008), chapter 13; Bettencourt, Johnson and
    Duvenaud, "Taylor-mode automatic differentiation for higher-order derivatives in JAX" (2019).

Files:
- `directional`: `jet` and `laplacian`.
- `tensor`: the Jet, and what happens to a function that is called on one; `unknown`: functions
  without a rule. `stacks`: stacks of components. `registry`: which functions have which rule.
- `linear`, `products`, `pointwise`, `arithmetic`, `composites`, `attention`, `norms`, `lengths`,
  `softmax`, `properties`: the rules, registered on import.
- `recompute`: functions of which only the arguments are kept for the backward passes.
- `aliases`, `in_place`: which tensors share memory; rules for changes in place.
- `primitives`, `primitive_mode`: operators whose double backward is right, and the mode that puts
  them in place of PyTorch's in reverse mode.
- `hooks`: hooks inside a function, which may look at gradients and not change them.
- `errors`, `_torch`: the errors; private names of PyTorch.
"""

from hosm_losses.taylor import (  # noqa: F401
    arithmetic,
    attention,
    in_place,
    lengths,
    norms,
    primitives,
    properties,
    softmax,
)
from hosm_losses.taylor.aliases import CHANGED_ARGUMENT as CHANGED_ARGUMENT
from hosm_losses.taylor.directional import jet as jet
from hosm_losses.taylor.directional import laplacian as laplacian
from hosm_losses.taylor.errors import DerivativeError as DerivativeError
from hosm_losses.taylor.errors import TaylorError as TaylorError
from hosm_losses.taylor.hooks import FINAL as FINAL
from hosm_losses.taylor.hooks import GIVE_THE_SOURCE as GIVE_THE_SOURCE
from hosm_losses.taylor.hooks import ScriptedError as ScriptedError
from hosm_losses.taylor.hooks import check_unchanged as check_unchanged
from hosm_losses.taylor.primitive_mode import CHECKPOINT_ADVICE as CHECKPOINT_ADVICE
from hosm_losses.taylor.primitive_mode import ForeignCheckpointError as ForeignCheckpointError
from hosm_losses.taylor.primitive_mode import recomputable as recomputable
from hosm_losses.taylor.primitive_mode import refuse_constants as refuse_constants
from hosm_losses.taylor.primitive_mode import safe_primitives as safe_primitives
from hosm_losses.taylor.stacks import at_least_float32 as at_least_float32
from hosm_losses.taylor.tensor import Jet as Jet
from hosm_losses.taylor.tensor import define_methods
from hosm_losses.taylor.tensor import propagate as propagate

define_methods()
