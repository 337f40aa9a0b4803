"""Graphs that a network loses, or changes, are refused when the value is made, with the remedy."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

import hosm_losses as hosm
from hosm_losses.derivatives import quadratic_forms
from hosm_losses.derivatives.engines import DroppedGraphError
from hosm_losses.model import bind_model
from tests.cases import (
    FUNCTIONS,
    VP,
    Around,
    Cubes,
    Detaches,
    OnceDifferentiable,
    assert_same,
    loss_and_gradients,
)


class GuidedCheckpoint(torch.autograd.Function):
    """As guided-diffusion's is documented to work: it recomputes, and returns plain gradients."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.x = function, x
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(x)
        return None, *torch.autograd.grad(output, x, grad)


class Forgets(GuidedCheckpoint):
    """One that keeps the graph, and forgets its inputs in the first pass back."""

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            del ctx.x
            return None, *torch.autograd.grad(ctx.function(x), x, grad, create_graph=True)


class Slope(torch.autograd.Function):
    """The slope of a cube, whose own backward loses its graph."""

    @staticmethod
    def forward(ctx, x, grad):
        ctx.save_for_backward(x, grad)
        return 3 * x**2 * grad

    @staticmethod
    def backward(ctx, again):
        x, grad = ctx.saved_tensors
        return (6 * x * grad * again).detach(), (3 * x**2 * again).detach()


class Nested(Detaches):
    """Cubes, with a backward that keeps the graph once."""

    @staticmethod
    def backward(ctx, grad):
        return Slope.apply(ctx.saved_tensors[0], grad)


class Without(torch.autograd.Function):
    """A gradient of None or zero is no gradient lost."""

    @staticmethod
    def forward(ctx, x, y, z):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 1, None, torch.zeros_like(grad)


class ChangesInBackward(torch.autograd.Function):
    """As the parallel scan of mambapy: its backward changes what its own graph needs."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        changed = gradient.clone()
        of_x = changed * y
        changed.mul_(x)
        return of_x, changed


class Running(nn.Module):
    """Reads a buffer, and changes it in place before the pass back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.ones(2))

    def forward(self, x, t):
        found = self.layer(x * self.mean) * x.tanh() + t[:, None]
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return found


def cube(h):
    return h**3


def guided(h):
    return GuidedCheckpoint.apply(torch.sin, h)


def losses(function, order=3, engine="reverse", **options):
    """Of a function on one of two paths: what is lost of it would leave no trace."""
    network = Around(lambda h: h.sin() + function(h))
    return loss_and_gradients(network, (4, 2), order, engine=engine, **options)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("function", [Detaches.apply, OnceDifferentiable.apply, guided])
def test_a_backward_that_drops_the_graph_is_refused(function, order, mode):
    for options in ({}, {"probe": torch.ones(2, 4, 2), "probes": hosm.Paired()}):
        with mode(), pytest.raises(DroppedGraphError):
            losses(function, order, **options)
        for engine in ("auto", "taylor"):
            with mode(), pytest.raises(hosm.DerivativeError):
                losses(function, order, engine, **options)


@pytest.mark.parametrize("options", [{}, {"probes": hosm.Paired()}])
@pytest.mark.parametrize("order", [2, 3])
def test_a_graph_dropped_in_the_second_pass_back_is_refused_where_it_is_wanted(order, options):
    options = {"probe": torch.ones(2, 4, 2)} | options
    with torch.no_grad():
        expected = losses(cube, order, **options)
        assert_same(losses(Nested.apply, order, **options), expected)
    with pytest.raises(DroppedGraphError):
        losses(Nested.apply, order, **options)


@pytest.mark.parametrize("order", [2, 3])
def test_a_gradient_of_none_or_zero_is_nothing_lost(order):
    assert_same(losses(lambda h: Without.apply(h**3, h, h), order), losses(cube, order))


class Vectorized(Detaches):
    generate_vmap_rule = True


@pytest.mark.parametrize("transform", [grad, partial(vmap, randomness="different")])
@pytest.mark.parametrize("order", [2, 3])
def test_a_function_that_forgets_gradients_is_refused_under_a_transform(order, transform):
    model = hosm.ScoreModel(Around(lambda h: h.sin() + Vectorized.apply(h)), VP)

    def loss(x0):
        return FUNCTIONS[order](model, x0.reshape(4, 2), engine="reverse")

    with pytest.raises(DroppedGraphError):
        transform(loss)(torch.randn(1, 4, 2))


@pytest.mark.slow
def test_quadratic_forms_are_no_part_of_a_compiled_graph():
    """There, the check for dropped graphs would be lost."""
    bound = bind_model(hosm.ScoreModel(Around(torch.sin), VP), 4, t=torch.full((4,), 0.5))
    forms = torch.compile(
        lambda x: quadratic_forms(bound, x, [x[None]])[1], backend="eager", fullgraph=True
    )
    with pytest.raises(RuntimeError):
        forms(torch.randn(4, 2))


def test_a_likelihood_with_a_gradient_refuses_it_and_one_without_does_not():
    x, found = torch.randn(2, 2), []
    for function in (guided, torch.sin):
        model = hosm.ScoreModel(Around(lambda h, each=function: h.sin() + each(h)), VP)
        found.append(hosm.ode_nll(model, x, solver=hosm.FixedGrid(4), divergence="exact").nll)
    assert_same(*found, 1e-12)
    model = hosm.ScoreModel(Around(lambda h: h.sin() + guided(h)), VP)
    with pytest.raises(DroppedGraphError):
        hosm.ode_nll(model, x, solver=hosm.FixedGrid(4), enable_grad=True)


@pytest.mark.parametrize("detached", [lambda x: x.detach(), torch.ones_like])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "velocity"])
def test_the_part_of_x_in_a_prediction_does_not_hide_a_lost_graph(prediction, detached):
    """The network alone is differentiated: x itself has a graph that a lost one would hide in."""
    layer, w = nn.Linear(3, 3), torch.randn(1, 1, 3)
    for network in (Cubes(), lambda x, t: layer(detached(x))):
        bound = bind_model(hosm.ScoreModel(network, VP, prediction), 1, t=torch.tensor([0.5]))
        for order in (2, 3):
            with pytest.raises(hosm.DerivativeError):
                bound.derive(torch.randn(1, 3), w, order=order, engine="reverse")
    with pytest.raises(hosm.DerivativeError):
        quadratic_forms(bound, torch.randn(1, 3), [w])


def detached():
    loss_and_gradients(Around(torch.detach), (4, 2), engine="reverse")


REMEDIES = {
    "a checkpoint": (lambda: losses(guided, engine="reverse"), "guided-diffusion"),
    "a detach": (detached, "Remove .detach"),
    "what forgets": (
        lambda: losses(lambda h: Forgets.apply(torch.sin, h).sin()),
        "detaches: write it",
    ),
    "a buffer": (lambda: loss_and_gradients(Running(), (4, 2)), "Assign a new tensor to it"),
    "a scan": (lambda: losses(lambda h: ChangesInBackward.apply(h, h.sin())), "a fast scan"),
}


@pytest.mark.filterwarnings("ignore:engine='auto'")
@pytest.mark.parametrize("name", REMEDIES)
def test_the_error_says_what_to_do(name):
    call, words = REMEDIES[name]
    with pytest.raises(hosm.DerivativeError, match=words):
        call()
