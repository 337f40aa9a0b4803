r"""Derivatives of a function along given directions, computed by calling the function once.

The Taylor engine depends only on PyTorch. `jet` and `laplacian` are its public functions:

    >>> import torch
    >>> x, directions = torch.zeros(4, 3), torch.ones(2, 4, 3)
    >>> f, first, second = jet(torch.sin, x, directions, "squares")
    >>> f.shape, first.shape, second.shape
    (torch.Size([4, 3]), torch.Size([2, 4, 3]), torch.Size([2, 4, 3]))

How it works:
    The function is called once, with a `Jet` in place of x. A Jet behaves like x but contains a
    stack of C components, of shape (C, B, *). The components are the value, followed by the first
    derivative along each direction l. If requested, second derivatives follow: one along each
    direction, or their sum. PyTorch passes each function called on a Jet to
    `Jet.__torch_function__`, which looks up a rule in the `registry`. A rule computes the stack of
    y = f(x) from the stack of x by the chain rule:

        y_l = ∂f x_l        y_ll = ∂f x_ll + ∂²f[x_l, x_l]

    A function without a rule is differentiated by `torch.func.jvp`. Operations whose derivatives
    could be wrong, such as a custom autograd.Function or complex arithmetic (except in rotary
    embeddings), raise `TaylorError`.

Kinds of rules, with an example of each:
    linear: ∂²f is zero, so the rule applies the function itself to one component at a time or,
        with adjusted axis arguments, to the whole stack.

        linear(lambda stack, dim, index: stack.select(_axis(stack, dim), index), "select")

    bilinear: `product_rule` computes y_l = a_l · b + a · b_l and the second derivatives.

        @rule("mul", several=True, kind="bilinear")
        def multiply(a, b):
            return product_rule(a, b, torch.mul, ndim)

    pointwise: a generator that yields the function's value and first three derivatives at x. Only
    the backward passes use the third derivative. All pointwise rules share the code of these
    passes; see `pointwise`.

        @pointwise("exp")
        def _exp(x):
            return repeat(torch.exp(x), 4)

    composite: a combination of a few other functions. For plain tensors, `ops` provides torch's
    own functions; for Jets, `ops` provides the rules for these functions.

        @composite(F.glu)
        def _glu(ops, input, dim=-1):
            value, gate = ops.chunk(input, 2, dim)
            return ops.mul(value, ops.sigmoid(gate))

    A rule of another kind, such as the rule for softmax, operates on stacks directly. The page
    "Inside the engines" explains how to add and test a rule.

Source:
    Griewank and Walther, "Evaluating derivatives" (2008), chapter 13; Bettencourt, Johnson and
    Duvenaud, "Taylor-mode automatic differentiation for higher-order derivatives in JAX" (2019).

Files, from the bottom up:
- `_torch`: the private PyTorch names that the engine uses.
- `stacks`: stacks of components.
- `registry`: the rule for each function, error messages, and hooks inside a network.
- `memory`: which tensors share memory; functions that keep only their arguments, or only their
  result, for the backward passes.
- `primitives`: operators whose double backward is correct, and the `TorchFunctionMode` that
  substitutes them for PyTorch's operators in reverse mode.
- `jets`: the class `Jet`, function calls on Jets, and the functions `jet` and `laplacian`.
- `linear`, `products`, `matrices`, `pointwise`, `composites`, `attention`, `norms` and `in_place`:
  the rules, which are registered on import, and their hand-written gradients.
"""

from hosm_losses.taylor import attention, matrices, norms, pointwise  # noqa: F401
from hosm_losses.taylor.in_place import register_changes
from hosm_losses.taylor.jets import Jet as Jet
from hosm_losses.taylor.jets import define_methods
from hosm_losses.taylor.jets import jet as jet
from hosm_losses.taylor.jets import laplacian as laplacian
from hosm_losses.taylor.jets import propagate as propagate
from hosm_losses.taylor.memory import CHANGED_ARGUMENT as CHANGED_ARGUMENT
from hosm_losses.taylor.primitives import CHECKPOINT_ADVICE as CHECKPOINT_ADVICE
from hosm_losses.taylor.primitives import ForeignCheckpointError as ForeignCheckpointError
from hosm_losses.taylor.primitives import complete_primitives
from hosm_losses.taylor.primitives import recomputable as recomputable
from hosm_losses.taylor.primitives import refuse_constants as refuse_constants
from hosm_losses.taylor.primitives import safe_primitives as safe_primitives
from hosm_losses.taylor.primitives import transformable as transformable
from hosm_losses.taylor.registry import FINAL as FINAL
from hosm_losses.taylor.registry import GIVE_THE_SOURCE as GIVE_THE_SOURCE
from hosm_losses.taylor.registry import DerivativeError as DerivativeError
from hosm_losses.taylor.registry import ScriptedError as ScriptedError
from hosm_losses.taylor.registry import TaylorError as TaylorError
from hosm_losses.taylor.registry import check_unchanged as check_unchanged
from hosm_losses.taylor.stacks import at_least_float32 as at_least_float32

# These calls must come after every rule is registered.
register_changes()
complete_primitives()
define_methods()
