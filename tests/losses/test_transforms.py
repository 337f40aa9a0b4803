"""torch.func around the losses and the likelihood: what it gives is what plain autograd gives."""

import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

import hosm_losses as hosm
from tests.cases import (
    FUNCTIONS,
    MLP,
    MODULES,
    VP,
    Around,
    ConvNet,
    assert_same,
    given,
    gradients,
    randomise,
)

PAIRED = {"probes": hosm.Paired()}
OPTIONS = [
    (1, {}),
    (2, {"probes": 2}),
    (2, {"engine": "reverse"}),
    (3, {}),
    (3, {"engine": "reverse", "fraction": 0.5}),
    (3, {"probes": "exact", "weighting": "likelihood", "weights": "paper"}),
    (2, PAIRED),
    (3, PAIRED),  # where one pass back from the value runs beside the engine
]


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
        heads = self.qkv(hidden).unflatten(-1, (6, 2)).transpose(1, 2).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        hidden = F.silu(self.group(mixed)) + F.mish(hidden)
        return self.outer(torch.logsumexp(torch.stack([hidden, hidden.sin()]), 0))


NETWORKS = {"conv": (ConvNet, (3, 2, 3, 2)), "everything": (Everything, (3, 6, 3))}


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        yield


def detached(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def loss_of(network, order, options):
    """The loss as a function of the parameters, the data and the other inputs."""
    options = {"generator": torch.Generator().manual_seed(7)} | options
    state = options["generator"].get_state()

    def loss(parameters, x0, inputs):
        def bare(x, t):
            return functional_call(network, parameters, (x, t))

        options["generator"].set_state(state)
        return FUNCTIONS[order](hosm.ScoreModel(bare, VP), x0, **inputs, **options)

    return loss


def by_autograd(loss, parameters, x0, inputs):
    """The loss, and its gradients in the parameters and the data."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    x0 = x0.detach().requires_grad_()
    value = loss(leaves, x0, inputs)
    *found, of_data = gradients(value, [*leaves.values(), x0])
    return value.detach(), dict(zip(leaves, found, strict=True)), of_data


def same(found, expected):
    assert_same([found[name] for name in expected], [*expected.values()], 1e-8)


@pytest.mark.parametrize(("order", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name, order, options):
    make, shape = NETWORKS[name]
    network = make()
    x0, inputs = given(shape)
    loss, parameters = loss_of(network, order, options), detached(network)
    value, expected, of_data = by_autograd(loss, parameters, x0, inputs)
    found = grad(loss, argnums=(0, 1))(parameters, x0, inputs)
    same(found[0], expected)
    assert_same(found[1], of_data, 1e-8)

    def of_parameters(parameters):
        return loss(parameters, x0, inputs)

    again, back = vjp(of_parameters, parameters)
    assert_same(again, value)
    same(back(torch.tensor(1.0))[0], expected)
    same(jacrev(of_parameters)(parameters), expected)
    ways = {n: torch.randn_like(p) for n, p in parameters.items()}
    again, slope = jvp(of_parameters, (parameters,), (ways,))
    assert_same([again, slope], [value, sum((expected[n] * ways[n]).sum() for n in ways)], 1e-8)


@pytest.mark.parametrize(("order", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_ensembles_and_gradients_of_every_sample(name, order, options):
    """vmap(grad) over stacked parameters and over the data: each as if alone."""
    make, shape = NETWORKS[name]
    members = [make() for _ in range(2)]
    x0, inputs = given(shape)
    loss = loss_of(members[0], order, options)
    stacked = {n: p.detach() for n, p in stack_module_state(members)[0].items()}
    found = vmap(grad(loss), (0, None, None), randomness="same")(stacked, x0, inputs)
    for place, member in enumerate(members):
        _, expected, _ = by_autograd(loss, detached(member), x0, inputs)
        same({n: p[place] for n, p in found.items()}, expected)
    rows = {n: p[:, None] for n, p in inputs.items()}
    parameters = detached(members[0])
    found = vmap(grad(loss), (None, 0, 0), randomness="same")(parameters, x0[:, None], rows)
    for row in range(len(x0)):
        alone = {n: p[row] for n, p in rows.items()}
        _, expected, _ = by_autograd(loss, parameters, x0[row : row + 1], alone)
        same({n: p[row] for n, p in found.items()}, expected)


@pytest.mark.parametrize(("order", "options"), OPTIONS[:4], ids=str)
def test_second_derivatives_over_parameters(order, options):
    """What the method detaches is held fixed by both."""
    network, options = Around(torch.tanh, 3), dict(options)
    x0, inputs = given((2, 2), order, options.pop("probes", 1))
    loss, parameters = loss_of(network, order, options), detached(network)

    def of_bias(bias):
        return loss(parameters | {"inner.bias": bias}, x0, inputs)

    point = parameters["inner.bias"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(of_bias(point), point, create_graph=True)
    expected = torch.stack([gradients(each, [point])[0] for each in slope])
    assert_same(hessian(of_bias)(point.detach()), expected, 1e-8)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_random_numbers_under_vmap(order):
    """Drawn with randomness="different": for every sample other times, noises and probes."""
    model, x0 = hosm.ScoreModel(MLP(3), VP), torch.randn(1, 3).expand(64, 3)
    for distribution in ("rademacher", "gaussian", "sphere", "dct"):
        options = {"probes": hosm.Hutchinson(1, distribution)} if order > 1 else {}
        for generator in (None, torch.Generator().manual_seed(7)):
            options["generator"] = generator

            def loss(x, options=options):
                return FUNCTIONS[order](model, x[None], **options)

            with torch.no_grad():
                assert len(vmap(loss, randomness="different")(x0).unique()) == 64
                assert len(vmap(loss, randomness="same")(x0).unique()) == 1
    with pytest.raises(RuntimeError):
        vmap(loss)(x0)


@pytest.mark.parametrize("solver", [hosm.FixedGrid(4), hosm.Adaptive(1.0)])
@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson()])
def test_the_gradient_of_a_likelihood(divergence, solver):
    network, shape = (Everything(), (2, 6, 3)) if solver == hosm.FixedGrid(4) else (MLP(3), (2, 3))
    x0 = torch.randn(shape)
    options = {"solver": solver, "divergence": divergence}

    def nll(parameters, x, _):
        model = hosm.ScoreModel(lambda x, t: functional_call(network, parameters, (x, t)), VP)
        generator = torch.Generator().manual_seed(5)
        found = hosm.ode_nll(model, x, enable_grad=True, generator=generator, **options)
        return found.nll.sum()

    _, expected, of_data = by_autograd(nll, detached(network), x0, None)
    found = grad(nll, argnums=(0, 1))(detached(network), x0, None)
    same(found[0], expected)
    assert_same(found[1], of_data, 1e-8)


@pytest.mark.parametrize("transform", [grad, jacrev, hessian])
@pytest.mark.parametrize("function", [hosm.ode_nll, hosm.ode_sample, hosm.variational_nll])
def test_a_likelihood_without_a_graph_has_no_gradient_in_silence(function, transform):
    """It was zero."""
    model, x0 = hosm.ScoreModel(MLP(3), VP), torch.randn(2, 3)
    with pytest.raises(ValueError):
        transform(lambda x: function(model, x).nll.sum())(x0)

    def looked_at(x):
        with torch.no_grad():
            number = function(model, x).nll.sum()
        return x.square().sum(), number

    assert_same(grad(looked_at, has_aux=True)(x0)[0], 2 * x0)


@pytest.mark.parametrize("divergence", ["exact", hosm.Hutchinson()])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_likelihood_under_vmap_is_that_of_every_sample(name, divergence):
    make, shape = NETWORKS[name]
    model, x0 = hosm.ScoreModel(make(), VP), torch.randn(shape)
    options = {"divergence": divergence, "solver": hosm.FixedGrid(4, data_std=1.0)}

    def nll(x):
        generator = torch.Generator().manual_seed(0)
        return hosm.ode_nll(model, x[None], generator=generator, **options).nll[0]

    assert_same(vmap(nll, randomness="same")(x0), torch.stack([nll(x) for x in x0]), 1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention_under_vmap_is_that_of_every_sample(training):
    """In evaluation without gradients, PyTorch has a fast path of its own."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True).train(training)
    call = lambda attention, x, t: attention(x, x, x, need_weights=False)[0]  # noqa: E731
    model, x, t = hosm.ScoreModel(attention, VP, call=call), torch.randn(3, 5, 4), torch.rand(3)
    with torch.no_grad():
        assert_same(vmap(model.noise)(x[:, None], t[:, None])[:, 0], model.noise(x, t))


def both_gradients(function, order, engine="auto"):
    """The gradients of a loss module by torch.func and by plain autograd."""
    options = {} if order == 1 else {"engine": engine}
    objective = MODULES[order](hosm.ScoreModel(Around(function), VP), **options)
    x0, inputs = given((4, 2), order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the engine
        expected = gradients(objective(x0, **inputs), objective)
        found = grad(lambda p: functional_call(objective, p, (x0,), inputs))(detached(objective))
    return [*found.values()], expected


def of_changed_data(h):
    z = h.clone()
    z.data.mul_(0.5)
    return z.sin()


DETACHED = {
    "data": lambda h: h * h.data.sin() + h,
    "the data of a view": lambda h: h * h[:, :3].repeat(1, 3).data.cos() + h,
    "changed data": of_changed_data,
    "detach": lambda h: h * h.detach().sin() + h,
    "no_grad": lambda h: h * torch.no_grad()(torch.sin)(h) + h,
}


@pytest.mark.parametrize("engine", ["auto", "reverse"])
@pytest.mark.parametrize("name", DETACHED)
def test_networks_that_detach(name, engine):
    for order in (2, 3):
        assert_same(*both_gradients(DETACHED[name], order, engine), 1e-8)


def test_a_change_that_detaches_is_refused_where_there_is_more_than_one_level():
    """PyTorch's own detaches from one level alone."""

    def function(h):
        return h * (h * 2).detach_().sin() + h

    assert_same(*both_gradients(function, 1))
    for order, engine in ((2, "auto"), (3, "reverse")):
        with pytest.raises(hosm.DerivativeError):
            both_gradients(function, order, engine)
