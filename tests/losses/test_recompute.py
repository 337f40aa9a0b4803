"""The batch in parts: the same loss and gradients, with less kept."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

import hosm_losses as hosm
from hosm_losses.losses.recompute import in_chunks
from tests.oracles import Learned, OfX, networks
from tests.versions import compiles_higher_orders

FUNCTIONS = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}


def setting(name="conv", batch=5):
    network, shape = networks()[name]
    x0 = torch.randn(batch, *shape)
    given = {"t": torch.linspace(0.2, 0.7, batch), "noise": torch.randn_like(x0)}
    return network, hosm.ScoreModel(network, hosm.VPSchedule()), x0, given


def loss_and_gradients(function, leaves, chunks, seed=0):
    torch.manual_seed(seed)
    loss = function(chunks)
    return (loss, *torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("chunks", [2, 3, 5, 9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"third": "laplacian"},
        {"third": "sliced", "probes": 2},
        {"fraction": 0.6},
        {"probes": 2, "reduction": "none", "weighting": "likelihood"},
        {"derivative": "reverse", "reduction": "sum"},
        {"derivative": "forward"},
        {"derivative": "taylor"},
    ],
    ids=str,
)
def test_the_same_loss_and_gradients(options, chunks):
    network, model, x0, given = setting()
    if "weighting" in options:
        given = {}

    def function(chunks):
        return hosm.third_order_dsm(model, x0, chunks=chunks, **options, **given)

    leaves = list(network.parameters())
    expected, got = (loss_and_gradients(function, leaves, each) for each in (1, chunks))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_modules_conditions_and_data_that_learn(order):
    network, model, x0, given = setting("attention", 4)
    x0.requires_grad_()
    label = torch.rand(4, requires_grad=True)
    scale = torch.tensor(1.5, requires_grad=True)
    leaves = [x0, label, scale, *network.parameters()]
    found = []
    for chunks in (1, 2):
        kind = {2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}[order]
        module = kind(model, chunks=chunks)

        def function(_, module=module):
            kwargs = {"label": label * scale}
            return module(x0, probe=torch.ones(4, 4, 3), model_kwargs=kwargs, **given)

        found.append(loss_and_gradients(function, leaves, chunks))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ["reverse", "forward"])
@pytest.mark.parametrize("estimator", ["hutchinson", "paired"])
def test_a_term_without_a_graph(engine, estimator):
    """As the third of a network that is linear in x."""
    network = OfX(nn.Linear(3, 3))
    model, x0 = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(4, 3)

    def function(chunks):
        options = {"derivative": engine, "estimator": estimator}
        return hosm.third_order_dsm(model, x0, chunks=chunks, **options)

    leaves = list(network.parameters())
    expected, got = (loss_and_gradients(function, leaves, each) for each in (1, 2))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


class Box:
    """A saved tensor, as long as a graph keeps it."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_only_what_was_given_is_kept():
    network, model, x0, given = setting(batch=40)
    kept = {}
    for chunks in (1, 5):
        boxes = weakref.WeakSet()

        def pack(tensor, boxes=boxes):
            box = Box(tensor)
            boxes.add(box)
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            loss = hosm.third_order_dsm(model, x0, chunks=chunks, **given)
        gc.collect()
        storages = {box.tensor.untyped_storage() for box in boxes}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        kept[chunks] = sum(sizes.values())
        del loss
    own = sum(each.numel() * 8 for each in (*network.parameters(), *[x0] * 4))
    assert kept[5] < 1.2 * own
    assert kept[1] > 5 * kept[5]


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, t):
        return self.outer(nn.functional.dropout(torch.tanh(self.inner(x)), 0.5, True))


def test_dropout_has_the_same_masks_again():
    """A small step along the gradient lowers the loss by what the gradient says."""
    network = Dropping()
    model, x0 = hosm.ScoreModel(network, hosm.VPSchedule()), torch.randn(4, 4)
    given = {"t": torch.full((4,), 0.5), "noise": torch.randn(4, 4)}
    given["probe"] = torch.ones(4, 4)
    weights = (1, 0, 0, 0)  # which holds nothing fixed
    leaves = list(network.parameters())

    def function(chunks):
        return hosm.second_order_dsm(model, x0, chunks=chunks, weights=weights[:3], **given)

    _loss, *gradients = loss_and_gradients(function, leaves, 2)
    direction = [torch.randn_like(leaf) for leaf in leaves]
    h, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for leaf, move in zip(leaves, direction, strict=True):
                leaf.add_(sign * h * move)
        ends.append(loss_and_gradients(function, leaves, 2)[0])
        with torch.no_grad():
            for leaf, move in zip(leaves, direction, strict=True):
                leaf.sub_(sign * h * move)
    expected = (ends[0] - ends[1]) / (2 * h)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-6, atol=0)


def test_the_generator_is_left_as_the_forward_pass_left_it():
    _network, model, x0, given = setting()
    loss = hosm.third_order_dsm(model, x0, chunks=2, **given)
    torch.rand(3)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_is_as_it_was():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4)).float()
    model = hosm.ScoreModel(OfX(network), hosm.VPSchedule())
    x0 = torch.randn(4, 4, dtype=torch.float32)
    given = {"t": torch.full((4,), 0.5, dtype=torch.float32), "noise": torch.randn_like(x0)}
    given["probe"] = torch.ones_like(x0)
    found = []
    for chunks in (1, 2):
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = hosm.second_order_dsm(model, x0, chunks=chunks, **given)
        loss.backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-3)


def test_what_cannot_be_known_is_an_error():
    network, model, x0, _given = setting()
    with pytest.raises(ValueError, match="chunks: expected a whole number of at least 1; got 0"):
        hosm.third_order_dsm(model, x0, chunks=0)
    function = hosm.ScoreModel(lambda x, t: network(x, t), hosm.VPSchedule())
    with pytest.raises(TypeError, match=r"chunks: expected a network that is an nn\.Module"):
        hosm.second_order_dsm(function, x0, chunks=2)


class Scaled(nn.Module):
    """A network that multiplies by what is no part of it."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, [factor]

    def forward(self, x, t):
        return self.factor[0] * self.network(x, t)


@pytest.mark.parametrize("engine", ["taylor", "reverse"])
def test_leaves_that_are_no_parameters_of_the_network_have_their_gradient(engine):
    network, _model, x0, given = setting()
    given["probe"] = torch.randn_like(x0)
    leaf = torch.tensor(1.3, requires_grad=True)
    head = nn.Conv2d(x0.shape[1], x0.shape[1], 1).requires_grad_(False)
    leaves = [leaf, *head.parameters(), *network.parameters()]

    def gradients(factor, chunks, trained):
        head.requires_grad_(trained)
        model = hosm.ScoreModel(Scaled(network, factor), hosm.VPSchedule(), output=head)
        loss = hosm.third_order_dsm(model, x0, chunks=chunks, derivative=engine, **given)
        return torch.autograd.grad(loss, leaves if trained else [leaf, *network.parameters()])

    # A leaf, and what was made of it before; then with a head that was frozen until now.
    for made in (lambda: leaf, lambda: leaf.sin()):
        for trained in (False, True):
            expected, got = (gradients(made(), chunks, trained) for chunks in (1, 2))
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_schedule_that_is_learned(prediction):
    network, _model, x0, given = setting()
    given["probe"] = torch.randn_like(x0)
    rate = torch.tensor(3.0, requires_grad=True)
    model = hosm.ScoreModel(network, Learned(rate), prediction)
    expected, got = (
        torch.autograd.grad(hosm.third_order_dsm(model, x0, chunks=chunks, **given), rate)
        for chunks in (1, 3)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_hooks_of_parameters_are_called_once():
    network, model, x0, given = setting()
    given["probe"] = torch.randn_like(x0)
    parameter = next(network.parameters())
    called = []
    handle = parameter.register_hook(lambda gradient: called.append(1) or 0.1 * gradient)
    found = []
    for chunks in (1, 3):
        (gradient,) = torch.autograd.grad(
            hosm.third_order_dsm(model, x0, chunks=chunks, **given), parameter
        )
        found.append(gradient)
    assert len(called) == 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    handle.remove()
    assert not parameter._backward_hooks


def test_other_parameters_in_the_pass_back_are_refused():
    _network, model, x0, given = setting()
    given["probe"] = torch.randn_like(x0)
    module = hosm.ThirdOrderDSM(model, chunks=2)
    values = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    loss = torch.func.functional_call(module, values, (x0,), given)
    with pytest.raises(hosm.DerivativeError, match=r"chunks: .* as of functional_call"):
        loss.backward()


def test_parameters_frozen_before_the_pass_back_are_refused():
    network, model, x0, given = setting()
    given["probe"] = torch.randn_like(x0)
    loss = hosm.third_order_dsm(model, x0, chunks=2, **given)
    next(network.parameters()).requires_grad_(False)
    with pytest.raises(hosm.DerivativeError, match=r"chunks: .* Freeze it after loss\.backward"):
        loss.backward()


def test_parameters_that_are_no_leaves_have_their_gradient_once():
    network, model, x0, given = setting()
    given["probe"] = torch.randn_like(x0)
    scale = torch.tensor(1.3, requires_grad=True)
    values = {name: p.detach() * scale for name, p in network.named_parameters()}

    def gradient(chunks):
        # As FSDP has views of its flat parameter, in both passes.
        with _reparametrize_module(network, values):
            loss = hosm.third_order_dsm(model, x0, chunks=chunks, **given)
            return torch.autograd.grad(loss, scale, retain_graph=True)

    torch.testing.assert_close(gradient(2), gradient(1), rtol=1e-9, atol=1e-12)


def test_a_parameter_that_later_parts_alone_use_is_an_error():
    network, _model, x0, given = setting()
    given["probe"] = torch.randn_like(x0)
    head = nn.Conv2d(x0.shape[1], x0.shape[1], 1)

    def call(network, x, t):
        late = (t > 0.5).to(x.dtype)[:, None, None, None]
        return network(x, t) + (late * head(x) if late.any() else 0)

    model = hosm.ScoreModel(network, hosm.VPSchedule(), call=call)
    loss = hosm.third_order_dsm(model, x0, chunks=2, **given)
    with pytest.raises(hosm.DerivativeError, match="that the first part does not use"):
        loss.backward()


def test_a_parameter_that_each_part_makes_is_none_that_was_missed():
    network, _model, x0, given = setting()
    given["probe"] = torch.randn_like(x0)

    def call(network, x, t):
        return network(x, t) * nn.Parameter(torch.tensor(2.0, dtype=x.dtype))

    model = hosm.ScoreModel(network, hosm.VPSchedule(), call=call)
    one, two = (
        torch.autograd.grad(
            hosm.third_order_dsm(model, x0, chunks=chunks, **given), list(network.parameters())
        )
        for chunks in (1, 2)
    )
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


@compiles_higher_orders
@pytest.mark.filterwarnings("ignore")
def test_it_is_refused_under_compile():
    _network, model, x0, given = setting("mlp")
    module = hosm.SecondOrderDSM(model, chunks=2)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"chunks: expected 1 under torch\.compile"):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x0, **given)


def test_without_gradients_it_is_a_loop():
    _network, model, x0, given = setting()
    with torch.no_grad():
        one, two = (
            hosm.third_order_dsm(model, x0, chunks=chunks, probe=torch.ones_like(x0), **given)
            for chunks in (1, 2)
        )
    torch.testing.assert_close(one, two)
    assert not two.requires_grad


def test_second_gradients_are_an_error():
    """Else a penalty on a gradient, added to the loss, would train nothing, and say nothing."""
    network, model, x0, given = setting()
    loss = hosm.second_order_dsm(model, x0, chunks=2, **given)
    with pytest.raises(hosm.DerivativeError, match=r"create_graph=True.*Leave chunks at 1"):
        torch.autograd.grad(loss, network.parameters().__next__(), create_graph=True)


def test_parts_are_of_almost_one_size():
    seen = []

    def function(rows, x):
        seen.append(rows.stop - rows.start)
        return (x[rows].sum(1),)

    in_chunks(function, 4, nn.Linear(1, 1), [torch.randn(10, 2)], 10)
    assert seen == [3, 3, 3, 1]
