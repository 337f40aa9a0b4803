"""Norms of a PyTorch that raises where it is wrong today: at the third derivative of a norm.

PyTorch 2.6, 2.13 and 2.15 get it wrong without an error, but for batch norm and instance norm in
the reverse mode of 2.14 and 2.15, which raises. Pull requests 176234 (layer norm) and 186779
(batch norm) raise there. Nothing in the library may rest on today's silence. So the operators
below `F.layer_norm` and its like are replaced by ones that are right once and twice, and then
raise: in the dispatcher, where every road in Python and C++ meets them, for the length of a test.
"""

from functools import partial

import pytest
import torch

import hosm_losses as hosm
from hosm_losses import _torch_internals as internals
from hosm_losses.diagnostics import localize
from tests.cases import ENGINES, VP, OfX, assert_same, loss_and_gradients
from tests.taylor.test_primitives import network_of

pytestmark = pytest.mark.filterwarnings("ignore:.*verriding a previously registered kernel")

SAID = "norm: derivatives of third order are not supported"
ALONE = ["layer_norm", "group_norm", "instance_norm"]  # of each sample
NORMS = [*ALONE, "batch_norm", "tracking"]


class Norm(torch.autograd.Function):
    """A value that is given, with the derivatives of a function of the inputs."""

    @staticmethod
    def forward(ctx, function, value, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return value.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return None, None, *NormBackward.apply(ctx.function, cotangent, *ctx.saved_tensors)


class NormBackward(torch.autograd.Function):
    """Its pass back, whose own pass back is right, and raises where it is differentiated."""

    @staticmethod
    @torch.enable_grad()
    def pull(function, leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        cotangent, *inputs = leaves
        value = function(*inputs)
        return leaves, torch.autograd.grad(value, inputs, cotangent, create_graph=True)

    @staticmethod
    def forward(ctx, function, *leaves):
        ctx.function = function
        ctx.save_for_backward(*leaves)
        return tuple(part.detach() for part in NormBackward.pull(function, leaves)[1])

    @staticmethod
    def backward(ctx, *cotangents):
        leaves, pulled = NormBackward.pull(ctx.function, ctx.saved_tensors)
        options = {"grad_outputs": cotangents, "materialize_grads": True}
        twice = torch.autograd.grad(pulled, leaves, **options)
        if torch.is_grad_enabled():
            zero = 0 * sum(tensor.sum() for tensor in (*ctx.saved_tensors, *cotangents))
            error = torch._C._functions.DelayedError(SAID, len(twice))
            twice = error(*(part.detach() + zero for part in twice))
        return None, *twice


def standardise(x, dims, eps):
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def by_channel(parameter, x):
    return None if parameter is None else parameter.reshape(-1, *(1,) * (x.ndim - 2))


def layer(x, shape, weight, bias, eps):
    return standardise(x, tuple(range(-len(shape), 0)), eps), weight, bias


def group(x, weight, bias, batch, channels, elements, groups, eps):
    y = standardise(x.reshape(batch, groups, -1), 2, eps).reshape(x.shape)
    return y, by_channel(weight, x), by_channel(bias, x)


def batch(x, weight, bias, mean, variance, training, momentum, eps):
    assert training
    y = standardise(x, (0, *range(2, x.ndim)), eps)
    return y, by_channel(weight, x), by_channel(bias, x)


def kernel(operator, composed, *arguments):
    """The operator, with the derivatives of one that is composed of others, up to the second."""
    with torch._C._AutoDispatchBelowAutograd():
        value, *statistics = operator(*arguments)
    tensors = {
        place: argument
        for place, argument in enumerate(arguments)
        if isinstance(argument, torch.Tensor) and argument.requires_grad
    }
    if not tensors or not torch.is_grad_enabled():
        return value, *statistics

    def function(*inputs):
        replaced = dict(enumerate(arguments)) | dict(zip(tensors, inputs, strict=True))
        y, weight, bias = composed(*replaced.values())
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return Norm.apply(function, value, *tensors.values()), *statistics


@pytest.fixture
def raising(monkeypatch):
    """The norms raise; and like PyTorch's own they count as no custom Functions."""
    library = torch.library.Library("aten", "IMPL")
    composed = {"native_layer_norm": layer, "native_group_norm": group, "native_batch_norm": batch}
    for name, function in composed.items():
        operator = getattr(torch.ops.aten, name).default
        library.impl(name, partial(kernel, operator, function), "AutogradCPU")
    usual = internals.custom_function

    def custom_function(node):
        return None if usual(node) in (Norm, NormBackward) else usual(node)

    for module in (internals, localize):
        monkeypatch.setattr(module, "custom_function", custom_function)
    yield
    library._destroy()


def derivatives(function, x, times):
    """Directional derivatives up to an order."""
    x = x.clone().requires_grad_()
    values, w = [function(x).sin().sum()], torch.linspace(-1, 2, x.numel()).reshape(x.shape)
    for _ in range(times):
        (gradient,) = torch.autograd.grad(values[-1], x, create_graph=True)
        values.append((gradient * w).sum())
    return values


@pytest.mark.parametrize("name", NORMS)
def test_the_norms_here_are_right_twice_and_then_raise(name, request):
    network, shape = network_of(name)
    x = torch.randn(4, *shape)
    expected = derivatives(network, x, 2)
    request.getfixturevalue("raising")
    assert_same(derivatives(network, x, 2), expected)
    with pytest.raises(RuntimeError, match=SAID):
        derivatives(network, x, 3)


OPTIONS = [{"order": 2}, {}, {"probes": hosm.Paired(), "probe": None}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NORMS)
def test_losses_are_what_they_are_without_an_error(name, options, request):
    network, shape = network_of(name)
    losses = partial(loss_and_gradients, OfX(network), (4, *shape), **options)
    expected = [losses(engine=engine) for engine in ENGINES]
    request.getfixturevalue("raising")
    for engine, values in zip(ENGINES, expected, strict=True):
        assert_same(losses(engine=engine), values)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ALONE)
def test_the_check_passes_and_without_primitives_gives_its_advice(name, engine, raising):
    network, shape = network_of(name)
    check = partial(hosm.check_derivatives, x0=torch.randn(2, *shape), engine=engine)
    assert check(hosm.ScoreModel(OfX(network), VP)).orders == (1, 2, 3)
    native = hosm.ScoreModel(OfX(network), VP, primitives=False)
    if engine != "reverse":  # the taylor engine has rules of its own
        assert check(native).engine == "taylor"
        return
    with pytest.raises(hosm.DerivativeError, match=f"{SAID}.*Leave primitives=True"):
        check(native)
