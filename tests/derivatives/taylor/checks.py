"""A function of a Jet against nested torch.func.jvp in float64, with every gradient a loss takes."""

import torch
from torch.func import jvp

from hosm_losses.derivatives.taylor import carried

BATCH = 3


def along(function, x, v, u):
    """f, ∂f v, ∂f u, ∂²f[v, v] and ∂²f[v, u], by nested torch.func.jvp."""

    def first(point, w):
        return jvp(function, (point,), (w,))[1]

    def second(w):
        return jvp(lambda point: first(point, v), (x,), (w,))[1]

    return function(x), first(x, v), first(x, u), second(v), second(u)


def name(function):
    """Of a function of PyTorch and of what it belongs to."""
    owner = getattr(function, "__objclass__", getattr(function, "__module__", None))
    return f"{getattr(owner, '__name__', owner)}.{getattr(function, '__name__', function)}"


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def gradients(number, leaves, create_graph=False):
    """Zero where a number does not depend on a leaf, or on anything."""
    if not number.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        number, leaves, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def same_gradients(got, expected, leaves):
    """Of a random combination."""
    weight = torch.randn_like(expected)
    mine, theirs = (gradients((each * weight).sum(), leaves) for each in (got, expected))
    for one, other in zip(mine, theirs, strict=True):
        close(one, other)


def check(function, shape, *parameters, reference=None, positive=False, rounding=1e-11):
    """Values and gradients of every kind of stack.

    Args:
        function: of x (B, *).
        shape: of a sample.
        parameters: tensors of `function` whose gradients are compared.
        reference: the same function in operators that PyTorch differentiates rightly.
        positive: whether x has to be.
        rounding: that of the type in which `function` computes.
    """
    reference = reference or function
    generator = torch.Generator().manual_seed(0)
    x, v, u = torch.randn(3, BATCH, *shape, generator=generator)
    x = (x.abs() + 0.5 if positive else x).requires_grad_()
    leaves = (x, *parameters)
    value, by_v, by_u, squared, mixed = along(reference, x, v, u)
    one, two = v.unsqueeze(0), torch.stack([v, u])
    single = carried(function, x, one)
    for got, expected in (
        (single, (value, by_v)),
        (carried(function, x, two), (value, by_v, by_u)),
        (carried(function, x, one, "squares"), (value, by_v, squared)),
        (carried(function, x, two, "halves"), (value, by_v, by_u, mixed)),
        (carried(function, x, two, "last"), (value, by_v, by_u, mixed)),
    ):
        close(got, torch.stack(expected))
        for mine, theirs in zip(got, expected, strict=True):
            same_gradients(mine, theirs, leaves)
    several = carried(function, x, two, "squares")
    close(several[3], squared)
    summed = carried(function, x, two, "sum")
    assert len(summed) == 4
    three = torch.stack([v, 2 * v, u])
    last = torch.stack([value, by_v, 2 * by_v, by_u, mixed, 2 * mixed])
    torch.testing.assert_close(carried(function, x, three, "last"), last, rtol=1e-9, atol=rounding)
    # A function that casts to float32 rounds a sum, and not the sum of what it rounded.
    torch.testing.assert_close(summed[3], several[3] + several[4], rtol=1e-9, atol=rounding)
    if rounding < 1e-9:
        same_gradients(summed[3], several[3] + several[4], leaves)
    # Third order: the gradient of a form, and its own gradients; of what follows the function
    # also alone, as where it is given the data themselves, which no training step varies.
    weight = torch.randn_like(value).requires_grad_()
    mine, theirs = (
        gradients((weight * each).sum(), (x,), create_graph=True)[0] for each in (single[1], by_v)
    )
    close(mine, theirs)
    same_gradients(mine, theirs, leaves)
    same_gradients(mine, theirs, (weight,))
