"""A function of a Jet against nested reverse mode, with every gradient of a loss."""

import torch

from hosm_losses.taylor import propagate
from hosm_losses.taylor.primitives import safe_primitives
from tests.cases import gradients

BATCH = 3
# Kinds of stacks: their pairs, and the number of directions.
KINDS = [("none", 1), ("none", 2), ("squares", 1), ("sum", 2), ("squares", 2)]


def name(function):
    """The name of a function of PyTorch with that of what it belongs to."""
    owner = getattr(function, "__objclass__", getattr(function, "__module__", None))
    return f"{getattr(owner, '__name__', owner)}.{getattr(function, '__name__', function)}"


def slope(function, x, v):
    """∂f v, the derivative in its cotangent of a pass back, which is linear in that."""
    value = function(x)
    cotangent = torch.zeros_like(value, requires_grad=True)
    (pulled,) = gradients(value, [x], grad_outputs=cotangent, create_graph=True)
    return gradients(pulled, [cotangent], grad_outputs=v, create_graph=True)[0]


def expected(function, x, directions, pairs):
    """The stack that `propagate` returns, by reverse mode, with the safe primitives."""

    def safe(point):
        with safe_primitives():
            return function(point)

    curved = directions if pairs != "none" else ()
    seconds = [slope(lambda point, v=v: slope(safe, point, v), x, v) for v in curved]
    seconds = [sum(seconds)] if pairs == "sum" else seconds
    return torch.stack([safe(x), *(slope(safe, x, v) for v in directions), *seconds])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def same_gradients(got, expected, leaves):
    """Compare the gradients of a random combination."""
    weight = torch.randn_like(expected)
    mine, theirs = (gradients((each * weight).sum(), leaves) for each in (got, expected))
    for one, other in zip(mine, theirs, strict=True):
        close(one, other)


def check(function, shape, *parameters, reference=None, kinds=KINDS):
    """Compare values and gradients of every kind of stack.

    Args:
        function: of x (3, *).
        shape: of a sample.
        parameters: tensors of `function` whose gradients are compared.
        reference: the same function in operators that PyTorch differentiates rightly.
        kinds: those of `KINDS` to compare.
    """
    generator = torch.Generator().manual_seed(0)
    x, *w = torch.randn(4, BATCH, *shape, generator=generator)
    leaves = (x.requires_grad_(), *parameters)
    for pairs, count in kinds:
        directions = torch.stack(w[:count])
        got = propagate(function, x, directions, pairs)
        theirs = expected(reference or function, x, directions, pairs)
        close(got, theirs)
        with torch.no_grad():  # as in validation
            close(propagate(function, x, directions, pairs), theirs)
        same_gradients(got, theirs, leaves)
        if pairs != "none":
            continue
        # Third order: the gradient of a form, and its own gradients; of what follows the function
        # also alone, as where it is given the data themselves, which no training step varies.
        weight = torch.randn_like(theirs[-1], requires_grad=True)
        mine, right = (
            gradients((weight * each[-1]).sum(), [x], create_graph=True)[0]
            for each in (got, theirs)
        )
        close(mine, right)
        same_gradients(mine, right, (*leaves, weight))
        same_gradients(mine, right, (weight,))
