"""A custom autograd.Function that drops the graph is refused when the value is made."""

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.oracles import Detaches, OnceDifferentiable

DROPPED = r"expected an autograd\.Function whose backward keeps the graph; got {}"
REMEDY = r"lambda f, i, p, flag: hosm_losses\.checkpoint\(f, \*i\) if flag else f\(\*i\)"
LOSSES = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


class GuidedCheckpoint(torch.autograd.Function):
    """As guided-diffusion's is documented to work: it recomputes, and returns plain gradients."""

    @staticmethod
    def forward(ctx, function, count, *tensors):
        ctx.function = function
        ctx.inputs, ctx.parameters = list(tensors[:count]), list(tensors[count:])
        with torch.no_grad():
            return function(*ctx.inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [each.detach().requires_grad_() for each in ctx.inputs]
        with torch.enable_grad():
            output = ctx.function(*[each.view_as(each) for each in inputs])
        found = torch.autograd.grad(output, inputs + ctx.parameters, grad, allow_unused=True)
        del ctx.inputs, ctx.parameters
        return None, None, *found


def guided(function, inputs, parameters, flag):
    if not flag:
        return function(*inputs)
    return GuidedCheckpoint.apply(function, len(inputs), *inputs, *parameters)


def plain(function, inputs, parameters, flag):
    return function(*inputs)


class Attention(nn.Module):
    """A residual block whose attention goes through the project's checkpoint, always."""

    def __init__(self, checkpoint=guided):
        super().__init__()
        torch.manual_seed(0)
        self.checkpoint = checkpoint
        self.inner, self.qkv, self.outer = nn.Linear(3, 4), nn.Linear(4, 12), nn.Linear(4, 3)

    def attend(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + torch.softmax(q @ k.mT / 2, -1) @ v

    def forward(self, x, t):
        hidden = torch.tanh(self.inner(x) + t[:, None, None])
        hidden = self.checkpoint(self.attend, (hidden,), tuple(self.qkv.parameters()), True)
        return self.outer(hidden)


def given(model, **options):
    torch.manual_seed(2)
    x0, noise, probe = torch.randn(3, 2, 5, 3).unbind()
    tensors = {"t": torch.tensor([0.3, 0.6]), "noise": noise, "probe": probe}
    return model, x0, {**tensors, **options}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("derivative", ["auto", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_checkpoint_that_drops_the_graph_is_refused(order, derivative, mode):
    model, x0, options = given(hosm.ScoreModel(Attention(), hosm.VPSchedule()))
    message = DROPPED.format("GuidedCheckpoint") + ".*" + REMEDY
    with mode(), pytest.raises(hosm.DerivativeError, match=message):
        LOSSES[order](model, x0, derivative=derivative, **options)


@pytest.mark.parametrize("order", [2, 3])
def test_so_is_it_by_the_engine_that_cannot_follow_it(order):
    model, x0, options = given(hosm.ScoreModel(Attention(), hosm.VPSchedule()))
    expected = pytest.raises(hosm.DerivativeError, match=r"custom autograd\.Function")
    with torch.no_grad(), expected:
        LOSSES[order](model, x0, derivative="taylor", **options)


def test_and_with_an_estimator_that_auto_would_replace():
    model, x0, options = given(hosm.ScoreModel(Attention(), hosm.VPSchedule()), third="laplacian")
    with pytest.raises(hosm.DerivativeError, match=REMEDY):
        hosm.third_order_dsm(model, x0, **options)


def test_a_likelihood_with_a_gradient_refuses_it_and_one_without_does_not():
    x = torch.randn(2, 5, 3)
    found = []
    for checkpoint in (guided, plain):
        model = hosm.ScoreModel(Attention(checkpoint), hosm.VPSchedule())
        found.append(hosm.ode_nll(model, x, divergence="exact", steps=4).nll)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    model = hosm.ScoreModel(Attention(), hosm.VPSchedule())
    with pytest.raises(hosm.DerivativeError, match=REMEDY):
        hosm.ode_nll(model, x, steps=4, enable_grad=True)


@pytest.mark.parametrize("options", [{}, {"third": "laplacian"}, {"probes": 2}])
@pytest.mark.parametrize("order", [2, 3])
def test_the_remedy_works(order, options):
    """The replacement that the message names, in training and without gradients."""
    if order == 2 and "third" in options:
        options = {"fraction": 0.5}

    def replaced(f, i, p, flag):
        return hosm.checkpoint(f, *i) if flag else f(*i)

    found = []
    for checkpoint in (replaced, plain):
        network = Attention(checkpoint)
        model, x0, inputs = given(hosm.ScoreModel(network, hosm.VPSchedule()), **options)
        if "probes" in options:
            del inputs["probe"]
        torch.manual_seed(3)
        loss = LOSSES[order](model, x0, **inputs)
        with torch.no_grad():
            torch.manual_seed(3)
            value = LOSSES[order](model, x0, **inputs)
        loss.backward()
        found.append((loss.detach(), value, [p.grad for p in network.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


class Partly(Detaches):
    """Keeps the graph to the incoming gradient and loses that to its input."""

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * grad


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


class Nested(torch.autograd.Function):
    """Cubes, with a backward that keeps the graph once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return Slope.apply(ctx.saved_tensors[0], grad)


class Without(torch.autograd.Function):
    """A gradient of None is no gradient lost."""

    @staticmethod
    def forward(ctx, x, y):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 1, None


def cubes(function):
    torch.manual_seed(0)
    inner, outer = nn.Linear(3, 4), nn.Linear(4, 3)
    network = nn.ModuleList([inner, outer])
    network.forward = lambda x, t: outer(function(inner(x)) + t[:, None])
    return network


def small(function, order, **options):
    model = hosm.ScoreModel(cubes(function), hosm.VPSchedule())
    x0, noise = torch.randn(2, 2, 3).unbind()
    given = {"t": torch.tensor([0.3, 0.6]), "noise": noise, "probe": noise.sign()}
    return LOSSES[order](model, x0, **given, **options)


@pytest.mark.parametrize("function", [Detaches, OnceDifferentiable])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("order", [2, 3])
def test_a_function_that_detaches_is_refused_by_the_engine_that_calls_its_backward(
    order, mode, function
):
    with mode(), pytest.raises(hosm.DerivativeError, match=DROPPED.format(function.__name__)):
        small(function.apply, order, derivative="reverse")


@pytest.mark.parametrize("order", [2, 3])
def test_a_graph_dropped_in_the_second_pass_back_is_refused_where_it_is_wanted(order):
    torch.manual_seed(1)
    with torch.no_grad():
        got = small(Nested.apply, order, derivative="reverse")
    torch.manual_seed(1)
    torch.testing.assert_close(got, small(lambda x: x**3, order).detach(), rtol=1e-10, atol=0)
    with pytest.raises(hosm.DerivativeError, match=DROPPED.format("Slope")):
        small(Nested.apply, order, derivative="reverse")


@pytest.mark.parametrize("order", [2, 3])
def test_a_function_that_drops_a_part_is_not_noticed_here(order):
    """It is what check_derivatives is for."""
    torch.manual_seed(1)
    loss = small(Partly.apply, order, derivative="reverse")
    model = hosm.ScoreModel(cubes(Partly.apply), hosm.VPSchedule())
    assert loss.requires_grad
    with pytest.raises(hosm.DerivativeError, match="agree with differences"):
        hosm.check_derivatives(model, torch.randn(2, 3), order=order, derivative="reverse")


@pytest.mark.parametrize("order", [2, 3])
def test_a_gradient_of_none_is_nothing_lost(order):
    torch.manual_seed(1)
    got = small(lambda x: Without.apply(x**3, x), order, derivative="reverse")
    torch.manual_seed(1)
    expected = small(lambda x: x**3, order, derivative="reverse")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [2, 3])
def test_a_function_that_forgets_gradients_is_refused_under_a_transform(order):
    model = hosm.ScoreModel(cubes(Detaches.apply), hosm.VPSchedule())
    x0, noise = torch.randn(2, 2, 3).unbind()
    given = {"t": torch.tensor([0.3, 0.6]), "noise": noise, "probe": noise.sign()}

    def loss(x0):
        return LOSSES[order](model, x0, derivative="reverse", **given)

    with pytest.raises(hosm.DerivativeError, match=DROPPED.format("Detaches")):
        torch.func.grad(loss)(x0)


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


def test_a_buffer_that_changes_after_it_was_read_is_named():
    model = hosm.ScoreModel(Running(), hosm.VPSchedule())
    message = "expected what its forward reads to stay.*Assign a new tensor"
    for call in (hosm.third_order_dsm, hosm.ode_nll):
        with pytest.raises(hosm.DerivativeError, match=message):
            call(model, torch.randn(4, 2))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_that_gives_its_memory_away_says_what_to_set():
    """What `aot_autograd` says: 2.6 to 2.13."""

    def compiled(x, t):
        raise RuntimeError(
            "This backward function was compiled with non-empty donated buffers which requires"
        )

    with pytest.raises(
        hosm.DerivativeError, match=r"donated_buffer = False.*before torch\.compile"
    ):
        hosm.ode_nll(hosm.ScoreModel(compiled, hosm.VPSchedule()), torch.randn(4, 2))


def test_a_checkpoint_under_a_transform_is_named():
    model = hosm.ScoreModel(
        nn.Linear(2, 2), hosm.VPSchedule(), call=lambda net, x, t: hosm.checkpoint(net, x).sin()
    )

    def loss(x0):
        return hosm.third_order_dsm(model, x0, derivative="reverse")

    with pytest.raises(hosm.DerivativeError, match="activation checkpoint inside the network"):
        torch.func.grad(loss)(torch.randn(4, 2))


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


@pytest.mark.parametrize("engine", ["auto", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_backward_that_changes_in_place_is_named(engine, order):
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = hosm.ScoreModel(
        lambda x, t: ChangesInBackward.apply(layer(x), other(x)), hosm.VPSchedule()
    )
    with pytest.raises(hosm.DerivativeError, match=r"in the backward of a custom autograd\.Func"):
        LOSSES[order](model, torch.randn(3, 2), derivative=engine).backward()
