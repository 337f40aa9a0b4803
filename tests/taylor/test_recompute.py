"""Only inputs are kept, and gradients of any order are autograd's."""

import torch

from hosm_losses.taylor.memory import with_recomputation
from tests.cases import assert_same


def formula(x, y):
    return (x * y.sin()).exp().cos() * x


def product(x, y):
    return x * y.sin()


def of_product(_, x, y, cotangent):
    return cotangent * y.sin(), cotangent * x * y.cos()


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)


def by_recomputing(function, **options):
    return lambda *given: with_recomputation(function, *given, **options)


def kept(function):
    """How many storages autograd keeps, besides those of the inputs."""
    given, seen = inputs(), {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*given)
    return len(seen.keys() - {each.untyped_storage().data_ptr() for each in given})


def test_nothing_but_the_inputs_is_kept():
    assert kept(formula) >= 3
    assert kept(by_recomputing(formula)) == 0


def test_gradients_of_every_order():
    found = []
    for function in (formula, by_recomputing(formula)):
        x, y = given = inputs()
        value, parts = function(x, y), []
        for _ in range(3):
            parts += torch.autograd.grad(value.sin().sum(), given, create_graph=True)
            value = parts[-2] * parts[-1].cos()
        # Where one argument is made of another, as in x / x.norm() of the data themselves, and
        # the weights that follow may be all that is trained.
        (slope,) = torch.autograd.grad((function(x, x.cos()) * y).sum(), x, create_graph=True)
        for asked in ([y], [y, x]):
            parts += torch.autograd.grad(slope.square().sum(), asked, retain_graph=True)
        found.append(parts)
    assert_same(*found, 1e-12)


def test_only_the_gradients_that_are_needed():
    x, y = inputs()
    seen = []

    def pullback(needed, x, y, cotangent):
        seen.append(needed)
        return cotangent * y.sin(), None

    for other in (y, y.detach()):
        value = with_recomputation(product, x, other, pullbacks=[pullback])
        assert_same(torch.autograd.grad(value.sum(), [x]), [y.sin()])
    value = with_recomputation(lambda x, y: x, x, None, pullbacks=[lambda _, x, y, c: (c, None)])
    assert_same(torch.autograd.grad(value.sum(), [x]), [torch.ones_like(x)])
    assert seen == [[True, False]] * 2


def test_the_second_pullback_is_that_of_the_first_tensors_gradient_alone():
    """Of another's, and of both together, autograd finds the gradients."""
    used = []

    def again(_, x, y, cotangent, second):
        used.append(1)
        return torch.zeros_like(x), cotangent * second * y.cos(), second * y.sin()

    found = []
    for function in (by_recomputing(product, pullbacks=[of_product, again]), product):
        x, y = given = inputs()
        parts = torch.autograd.grad(function(x, y).sin().sum(), given, create_graph=True)
        found.append([*torch.autograd.grad(sum(part.cos().sum() for part in parts), given)])
        (of_y,) = torch.autograd.grad(function(x.detach(), y).sin().sum(), y, create_graph=True)
        found[-1] += torch.autograd.grad(of_y.sum(), [y])
        assert used == []
        (of_x,) = torch.autograd.grad(function(x, y).sin().sum(), x, create_graph=True)
        found[-1] += torch.autograd.grad(of_x.sum(), given)
        used.clear()
    assert_same(*found, 1e-12)


def test_a_gradient_that_depends_on_nothing_is_zero():
    """As that of a bias in a gradient, where autograd finds the gradients of a pullback."""

    def pullback(_, x, bias, cotangent):
        return 2 * x * cotangent, cotangent.detach() * 1

    x, bias = inputs()
    value = with_recomputation(lambda x, bias: x * x + bias, x, bias, pullbacks=[pullback])
    parts = torch.autograd.grad(value.sum(), (x, bias), create_graph=True)
    both = torch.autograd.grad(sum(part.sum() for part in parts), x, retain_graph=True)
    of_bias = torch.autograd.grad(parts[1].sum(), x)
    assert_same(both + of_bias, [torch.full_like(x, 2.0), torch.zeros_like(x)])
