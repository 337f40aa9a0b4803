"""Only inputs are kept, and gradients of any order are autograd's."""

import pytest
import torch

from hosm_losses.derivatives.recompute import recomputed


def formula(x, y):
    return (x * y.sin()).exp().cos() * x


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)


def kept(function):
    """Storages that autograd keeps, besides those of the inputs."""
    x, y = inputs()
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = function(x, y)
    del value
    return len(seen.keys() - {each.untyped_storage().data_ptr() for each in (x, y)})


def test_nothing_but_the_inputs_is_kept():
    assert kept(formula) >= 3
    assert kept(lambda *given: recomputed(formula, *given)) == 0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_gradients_of_every_order(order):
    found = []
    for function in (formula, lambda *given: recomputed(formula, *given)):
        given = inputs()
        value = function(*given)
        for _ in range(order):
            parts = torch.autograd.grad(value.sin().sum(), given, create_graph=True)
            value = parts[0] * parts[1].cos()
        found.append(parts)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_only_the_gradients_that_are_needed():
    x, y = inputs()
    seen = []

    def pullback(needed, x, y, cotangent):
        seen.append(needed)
        return cotangent * y, None

    value = recomputed(lambda x, y: x * y, x, y.detach(), pullbacks=[pullback])
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, y)

    def none(x, y):
        return x if y is None else x * y

    recomputed(none, x, None, pullbacks=[lambda _, x, y, c: (c, None)]).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    assert seen == [[True, False]]


def test_a_given_pullback_is_used_and_so_is_its_own():
    used = []

    def first(_, x, cotangent):
        used.append("first")
        return 2 * x * cotangent

    def second(_, x, cotangent, again):
        used.append("second")
        return 2 * cotangent * again, 2 * x * again

    x, _ = inputs()
    value = recomputed(lambda x: x * x, x, pullbacks=[first, second])
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (hessian,) = torch.autograd.grad(gradient.sin().sum(), x)
    torch.testing.assert_close(hessian, 2 * (2 * x).cos())
    assert used == ["first", "second"]


def test_a_pullback_of_another_tensor_goes_by_autograd():
    """The second pullback is that of the first tensor's gradient."""

    def never(*everything):
        raise AssertionError

    def pullback(_, x, y, cotangent):
        return cotangent * y.sin(), cotangent * x * y.cos()

    x, y = inputs()
    value = recomputed(lambda x, y: x * y.sin(), x.detach(), y, pullbacks=[pullback, never])
    (gradient,) = torch.autograd.grad(value.sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), y)
    torch.testing.assert_close(second, -x * y.sin())


def test_gradients_of_every_result_of_a_pullback():
    """Where its own pullback is that of its first result."""

    def pullback(_, x, y, cotangent):
        return cotangent * y.sin(), cotangent * x * y.cos()

    used = []

    def again(_, x, y, cotangent, second):
        used.append(1)
        return torch.zeros_like(x), cotangent * second * y.cos(), second * y.sin()

    def product(x, y):
        return x * y.sin()

    def given(x, y):
        return recomputed(product, x, y, pullbacks=[pullback, again])

    found = []
    for function in (given, product):
        x, y = inputs()
        parts = torch.autograd.grad(function(x, y).sin().sum(), (x, y), create_graph=True)
        found.append(torch.autograd.grad(sum(part.cos().sum() for part in parts), (x, y)))
        (first,) = torch.autograd.grad(function(x, y).sin().sum(), x, create_graph=True)
        found[-1] += torch.autograd.grad(first.sum(), (x, y))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    assert used == [1]  # where the first result alone has a cotangent


def test_a_gradient_that_depends_on_nothing_is_zero():
    """As that of a bias in a gradient, where autograd finds the gradients of a pullback."""

    def pullback(_, x, bias, cotangent):
        return 2 * x * cotangent, cotangent.detach() * 1

    x, bias = inputs()
    value = recomputed(lambda x, bias: x * x + bias, x, bias, pullbacks=[pullback])
    parts = torch.autograd.grad(value.sum(), (x, bias), create_graph=True)
    (found,) = torch.autograd.grad(sum(part.sum() for part in parts), x, retain_graph=True)
    torch.testing.assert_close(found, torch.full_like(x, 2.0))
    (found,) = torch.autograd.grad(parts[1].sum(), x)
    torch.testing.assert_close(found, torch.zeros_like(x))


@pytest.mark.parametrize("asked", ["scale", "both"])
def test_an_argument_that_another_is_made_of(asked):
    # As in x / x.norm() of the data themselves, where weights that follow train alone.
    found = []
    for function in (formula, lambda *given: recomputed(formula, *given)):
        x, scale = inputs()
        value = function(x, x.cos()) * scale
        (slope,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        inputs_of = [scale] if asked == "scale" else [scale, x]
        found.append(torch.autograd.grad(slope.square().sum(), inputs_of))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


class Drops(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *cotangents):
        return None


def test_what_is_kept_is_for_the_pullbacks_alone():
    """Not for autograd, which takes their place where no cotangent comes, or none is given."""

    def doubled(x):
        return x * x, 2 * x

    def pullback(_, x, slope, cotangent):
        return slope * cotangent

    x, _ = inputs()
    value = recomputed(doubled, x, pullbacks=[pullback], keeps=True)
    (gradient,) = torch.autograd.grad((Drops.apply(value) + x).sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, torch.ones_like(x))
    for given in (value, recomputed(doubled, x, keeps=True)):
        (gradient,) = torch.autograd.grad(given.sum(), x)
        torch.testing.assert_close(gradient, 2 * x)
