"""torch.func around the losses and the likelihood: what it gives is what plain autograd gives."""

import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import hosm_losses as hosm
from tests.oracles import MLP, AttentionNet, ConvNet, randomise

ORDERS = [
    (1, {}),
    (2, {}),
    (3, {}),
    (3, {"third": "laplacian"}),
    (3, {"probes": 2}),
    (2, {"derivative": "reverse"}),
    (3, {"derivative": "reverse"}),
    (3, {"probes": "exact", "weighting": "likelihood"}),
]
LOSSES = {1: hosm.first_order_dsm, 2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


class Everything(nn.Module):
    """An operator of every kind of rule, and one without a rule."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.qkv = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 12)
        self.group, self.outer = nn.GroupNorm(2, 6), nn.Linear(4, 3)
        randomise(self.norm)
        randomise(self.group)

    def forward(self, x, t):
        hidden = self.norm(self.inner(x) + t[:, None, None])
        q, k, v = self.qkv(hidden).chunk(3, -1)
        hidden = F.silu(self.group(F.scaled_dot_product_attention(q, k, v))) + F.mish(hidden)
        return self.outer(torch.logsumexp(torch.stack([hidden, hidden.sin()]), 0))


NETWORKS = {
    "mlp": (lambda: MLP(3), (3,)),
    "conv": (ConvNet, (2, 3, 2)),
    "attention": (AttentionNet, (4, 3)),
    "everything": (Everything, (6, 3)),
}


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        yield


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def setting(name, batch=3):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make()
    x0, noise = torch.randn(2, batch, *shape)
    given = {"t": torch.linspace(0.2, 0.7, batch), "noise": noise}
    return network, x0, given


def loss_of(network, parameters, x0, given, order, options, seed=1):
    """The loss as a function of the parameters."""

    def bare(x, t):
        return functional_call(network, parameters, (x, t))

    if order > 1 and options.get("probes") != "exact":
        shape = (options.get("probes", 1), *x0.shape)
        probe = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        options = {k: v for k, v in options.items() if k != "probes"} | {"probe": probe}
    return LOSSES[order](hosm.ScoreModel(bare, hosm.VPSchedule()), x0, **given, **options)


def detached(network):
    return {name: p.detach() for name, p in network.named_parameters()}


def plain(network, x0, given, order, options):
    parameters = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}
    loss = loss_of(network, parameters, x0, given, order, options)
    found = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize(("order", "options"), ORDERS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_over_parameters(name, order, options):
    network, x0, given = setting(name)
    expected, gradients = plain(network, x0, given, order, options)

    def loss(parameters):
        return loss_of(network, parameters, x0, given, order, options)

    parameters = detached(network)
    close(grad(loss)(parameters), gradients)
    value, back = vjp(loss, parameters)
    close(value, expected)
    close(back(torch.tensor(1.0))[0], gradients)
    close(jacrev(loss)(parameters), gradients)
    ways = {n: torch.randn_like(p) for n, p in parameters.items()}
    value, slope = jvp(loss, (parameters,), (ways,))
    close(value, expected)
    close(slope, sum((gradients[n] * ways[n]).sum() for n in ways))


@pytest.mark.parametrize(("order", "options"), ORDERS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_an_ensemble(name, order, options):
    """vmap(grad) over stacked parameters: each member as if alone."""
    members = [setting(name)[0] for _ in range(3)]
    with torch.no_grad():
        for member in members:
            for parameter in member.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    _, x0, given = setting(name)
    stacked, _ = stack_module_state(members)
    stacked = {n: p.detach() for n, p in stacked.items()}

    def loss(parameters):
        return loss_of(members[0], parameters, x0, given, order, options)

    got = vmap(grad(loss), randomness="same")(stacked)
    for place, member in enumerate(members):
        _, expected = plain(member, x0, given, order, options)
        close({n: p[place] for n, p in got.items()}, expected)


@pytest.mark.parametrize(("order", "options"), ORDERS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_every_sample(name, order, options):
    """vmap over x0: the gradients of each sample's loss."""
    network, x0, given = setting(name)

    def loss(parameters, x, t, noise):
        alone = {"t": t[None], "noise": noise[None]}
        return loss_of(network, parameters, x[None], alone, order, options)

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0), randomness="same")
    got = per_sample(detached(network), x0, given["t"], given["noise"])
    for row in range(len(x0)):
        alone = {key: value[row : row + 1] for key, value in given.items()}
        _, expected = plain(network, x0[row : row + 1], alone, order, options)
        close({n: p[row] for n, p in got.items()}, expected)


@pytest.mark.parametrize(("order", "options"), ORDERS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_in_the_data(name, order, options):
    network, x0, given = setting(name)
    parameters = detached(network)

    def loss(x0):
        return loss_of(network, parameters, x0, given, order, options)

    point = x0.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(point), point)
    close(grad(loss)(x0), expected)


@pytest.mark.parametrize(("order", "options"), ORDERS[:4], ids=str)
def test_second_derivatives_over_parameters(order, options):
    """Of a small network; what the method detaches is held fixed by both."""
    x0 = torch.randn(2, 3)
    given = {"t": torch.tensor([0.3, 0.6]), "noise": torch.randn(2, 3)}
    layer = nn.Linear(3, 3)

    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, t):
            return torch.tanh(self.layer(x)) + t[:, None]

    network = Bent()
    weight, bias = layer.weight.detach(), layer.bias.detach()

    probe = {"probe": torch.randn(2, 3)} if order > 1 else {}

    def loss(bias):
        parameters = {"layer.weight": weight, "layer.bias": bias}
        model = hosm.ScoreModel(
            lambda x, t: functional_call(network, parameters, (x, t)), hosm.VPSchedule()
        )
        return LOSSES[order](model, x0, **given, **probe, **options)

    point = bias.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(point), point, create_graph=True)
    expected = torch.stack(
        [torch.autograd.grad(each, point, retain_graph=True)[0] for each in slope]
    )
    close(hessian(loss)(bias), expected)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere", "dct"])
def test_random_numbers_under_vmap(order, distribution):
    """Drawn with randomness="different": for every sample other times, noises and probes."""
    network, x0, _ = setting("mlp", 64)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x0 = x0[:1].expand(64, 3)
    options = {"distribution": distribution} if order > 1 else {}

    def loss(x):
        return LOSSES[order](model, x[None], **options)

    with torch.no_grad():
        found = vmap(loss, randomness="different")(x0)
        assert len(found.unique()) == 64
        same = vmap(loss, randomness="same")(x0)
        assert len(same.unique()) == 1
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(loss)(x0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_generator_under_transforms(order):
    network, x0, _ = setting("mlp")
    model = hosm.ScoreModel(network, hosm.VPSchedule())

    def loss(x0):
        return LOSSES[order](model, x0, generator=torch.Generator().manual_seed(7))

    point = x0.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(point), point)
    close(grad(loss)(x0), expected)
    with torch.no_grad():
        found = vmap(lambda x: loss(x[None]), randomness="different")(x0[:1].expand(8, 3))
    assert len(found.unique()) == 8


@pytest.mark.parametrize("fraction", [0.5, 0.7])
def test_a_fraction_under_a_transform(fraction):
    network, x0, given = setting("mlp", 4)

    def loss(parameters):
        model = hosm.ScoreModel(
            lambda x, t: functional_call(network, parameters, (x, t)), hosm.VPSchedule()
        )
        generator = torch.Generator().manual_seed(3)
        return hosm.third_order_dsm(model, x0, fraction=fraction, generator=generator, **given)

    parameters = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    close(list(grad(loss)(detached(network)).values()), list(expected))


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", ["mlp", "everything"])
def test_the_gradient_of_a_likelihood(name, divergence, method):
    network, x0, _ = setting(name, 2)

    def nll(parameters, x):
        model = hosm.ScoreModel(
            lambda x, t: functional_call(network, parameters, (x, t)), hosm.VPSchedule()
        )
        return hosm.ode_nll(
            model,
            x,
            method=method,
            divergence=divergence,
            probes=1 if divergence == "exact" else 2,
            steps=4,
            tolerance=1.0,
            enable_grad=True,
            generator=torch.Generator().manual_seed(5),
        ).nll.sum()

    parameters = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}
    point = x0.clone().requires_grad_()
    leaves = [*parameters.values(), point]
    expected = torch.autograd.grad(nll(parameters, point), leaves)
    got = grad(nll, argnums=(0, 1))(detached(network), x0)
    close([*got[0].values(), got[1]], list(expected))


@pytest.mark.parametrize("transform", [grad, torch.func.jacrev, torch.func.hessian])
@pytest.mark.parametrize("function", [hosm.ode_nll, hosm.ode_sample, hosm.variational_nll])
def test_a_likelihood_without_a_graph_has_no_gradient_in_silence(function, transform):
    """It was zero."""
    network, x0, _ = setting("mlp", 2)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    with pytest.raises(ValueError, match=r"enable_grad: expected True under torch\.func\.grad"):
        transform(lambda x: function(model, x).nll.sum())(x0)

    def looked_at(x):
        with torch.no_grad():
            number = function(model, x).nll.sum()
        return x.square().sum(), number

    got, _ = grad(looked_at, has_aux=True)(x0)
    close(got, 2 * x0)


@pytest.mark.parametrize("order", [2, 3])
def test_a_loss_module_by_functional_call(order):
    network, x0, given = setting("attention")
    kind = {2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}[order]
    objective = kind(hosm.ScoreModel(network, hosm.VPSchedule()))
    kwargs = {"probe": torch.randn_like(x0), **given}
    expected = torch.autograd.grad(objective(x0, **kwargs), list(objective.parameters()))
    parameters = {n: p.detach() for n, p in objective.named_parameters()}
    found = grad(lambda p: functional_call(objective, p, (x0,), kwargs))(parameters)
    close(list(found.values()), list(expected))


DETACHED = {
    "data": lambda h: h * h.data.sin() + h,
    "the data of a view": lambda h: h * h[:, :3].repeat(1, 2).data.cos() + h,
    "changed data": lambda h: (lambda z: (z.data.mul_(0.5), z.sin())[1])(h.clone()),
    "detach": lambda h: h * h.detach().sin() + h,
    "no_grad": lambda h: h * torch.no_grad()(torch.sin)(h) + h,
}


def with_a_part(function):
    """A network, and what `grad_and_value` and plain autograd find of its losses."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 6), nn.Linear(6, 3)
    network = nn.ModuleList([first, last])
    network.forward = lambda x, t: last(function(first(torch.cat([x, t[:, None]], 1)).tanh()))
    given = {"t": torch.rand(4) * 0.8 + 0.1, "noise": torch.randn(4, 3)}
    return network, torch.randn(4, 3), given


def both_gradients(function, order, **options):
    """The gradient of a loss by torch.func and by plain autograd."""
    network, x0, given = with_a_part(function)
    if order > 1:
        given["probe"] = torch.randn(4, 3)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    modules = {1: hosm.FirstOrderDSM, 2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}
    objective = modules[order](model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the engine
        return _both(objective, x0, given)


def _both(objective, x0, given):
    plain = torch.autograd.grad(objective(x0, **given), list(objective.parameters()))
    parameters = {n: p.detach() for n, p in objective.named_parameters()}
    found = grad(lambda p: functional_call(objective, p, (x0,), given))(parameters)
    return list(found.values()), list(plain)


@pytest.mark.parametrize("name", DETACHED)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("derivative", ["auto", "reverse"])
def test_what_a_network_detaches(name, order, derivative):
    close(*both_gradients(DETACHED[name], order, derivative=derivative))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_change_that_detaches_says_what_to_write(order):
    """PyTorch's own detaches from one level alone; at order one there is but one."""

    def detached(h):
        return h * (h * 2).detach_().sin() + h

    if order == 1:
        close(*both_gradients(detached, 1))
        return
    for derivative in ("auto", "reverse"):
        with pytest.raises(hosm.DerivativeError, match=r"Write x = x\.detach\(\)"):
            both_gradients(detached, order, derivative=derivative)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_likelihood_under_vmap_is_that_of_every_sample(divergence):
    network, x0, _ = setting("attention")
    model = hosm.ScoreModel(network, hosm.VPSchedule())

    def nll(x):
        options = {"divergence": divergence, "steps": 4, "data_std": 1.0}
        generator = torch.Generator().manual_seed(0)
        return hosm.ode_nll(model, x[None], generator=generator, **options).nll[0]

    got = vmap(nll, randomness="same")(x0)
    close(got, torch.stack([nll(x) for x in x0]))
