"""The mode: where it is on, and the checkpoints that carry it or do not."""

import gc
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from torch import nn
from torch.nn.functional import layer_norm
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import hosm_losses as hosm
from hosm_losses.derivatives import primitive_mode
from hosm_losses.derivatives.primitive_mode import safe_primitives
from tests.derivatives.test_primitives import ENGINES, layers, network_of
from tests.versions import tells_hooks


def active() -> bool:
    """Whether layer_norm is the primitive here: the native one saves a tensor of its own."""
    x = torch.ones(1, 2, requires_grad=True)
    return "NativeLayerNorm" not in type(F.layer_norm(x, (2,)).grad_fn).__name__


def test_the_mode_is_on_only_in_its_block_and_its_thread():
    functions = {name: getattr(F, name) for name in dir(F)}
    seen = []
    assert not active()
    with safe_primitives():
        assert active()
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
    assert seen == [False]
    with safe_primitives(False):
        assert not active()
    with pytest.raises(KeyError), safe_primitives():
        raise KeyError
    assert not active()
    assert all(getattr(F, name) is function for name, function in functions.items())


def checkpointed(checkpoint):
    """A network with a layer norm inside an activation checkpoint."""
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())
    outer = nn.Linear(4, 4)
    network = nn.ModuleList([inner, outer])
    plain = hosm.ScoreModel(lambda x, t: outer(inner(x)), hosm.VPSchedule())
    model = hosm.ScoreModel(lambda x, t: outer(checkpoint(inner, x)), hosm.VPSchedule())
    return network, plain, model


def gradient(network, model, order, **options):
    generator = torch.Generator().manual_seed(0)
    function = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}[order]
    loss = function(model, torch.ones(3, 4), generator=generator, **options)
    return parameters_to_vector(torch.autograd.grad(loss, list(network.parameters())))


selective = partial(
    torch_checkpoint,
    use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]),
)


@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}, {"estimator": "paired"}])
@pytest.mark.parametrize("engine", ["auto", "taylor", "reverse"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_selective_checkpoint_is_refused(order, engine, options):
    """The bias would be added again to the product that it keeps."""
    network, _, model = checkpointed(selective)
    with pytest.raises(hosm.DerivativeError, match="got a selective one"):
        gradient(network, model, order, derivative=engine, **options)


def test_around_a_loss_it_is_refused_above_order_one():
    network, plain, _ = checkpointed(selective)
    for module in (hosm.SecondOrderDSM, hosm.ThirdOrderDSM):
        with pytest.raises(hosm.DerivativeError, match="leave out context_fn around the loss"):
            selective(module(plain), torch.randn(3, 4))
    selective(hosm.FirstOrderDSM(plain), torch.randn(3, 4)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ["auto", "reverse", "taylor"])
def test_our_checkpoint_is_right_where_it_can_recompute(engine, order, probes):
    network, plain, model = checkpointed(hosm.checkpoint)
    expected = gradient(network, plain, order, probes=probes)
    got = gradient(network, model, order, derivative=engine, probes=probes)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_torchs_own_checkpoint_is_an_error_and_never_a_wrong_gradient(reentrant, engine, order):
    def checkpoint(function, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=reentrant)

    network, plain, model = checkpointed(checkpoint)
    if engine in ("auto", "taylor") and not reentrant:
        # The taylor engine has its own rules, and no mode that a recomputation could miss.
        expected = gradient(network, plain, order)
        got = gradient(network, model, order, derivative=engine)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    elif engine == "taylor":
        with pytest.raises(hosm.DerivativeError, match=r"custom autograd\.Function"):
            gradient(network, model, order, derivative=engine)
    else:
        with pytest.raises(hosm.DerivativeError, match=r"expected hosm_losses\.checkpoint inside"):
            gradient(network, model, order, derivative=engine)


@tells_hooks
@pytest.mark.parametrize("order", [2, 3])
def test_paired_probes_leave_torchs_own_checkpoint_to_the_taylor_engine(order):
    """They take reverse mode where they can."""

    def checkpoint(function, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)

    network, plain, model = checkpointed(checkpoint)
    options = {"probes": 2, "estimator": "paired"}
    expected = gradient(network, plain, order, **options)
    for _ in range(2):  # the second time without an attempt
        got = gradient(network, model, order, **options)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*sorted(layers()), "math attention"])
def test_torchs_own_checkpoint_is_an_error_around_every_primitive(name):
    network, shape = network_of(name.split()[-1])
    if name == "math attention":
        network[1].forward = lambda x: F.scaled_dot_product_attention(
            *network[1].qkv(x).chunk(3, -1)
        )

    def through(x, t):
        return torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False)

    model = hosm.ScoreModel(through, hosm.VPSchedule())
    with pytest.raises(hosm.DerivativeError, match=r"expected hosm_losses\.checkpoint inside"):
        hosm.third_order_dsm(model, torch.randn(4, *shape), derivative="reverse")


@pytest.mark.parametrize("name", [*sorted(layers()), "math attention"])
def test_where_hooks_cannot_be_seen_the_recomputation_shows_it(name, monkeypatch):
    """As on an older PyTorch: what a primitive saves never looks like what the operator saves."""
    monkeypatch.setattr(primitive_mode, "checkpoint_hook", lambda: None)
    test_torchs_own_checkpoint_is_an_error_around_every_primitive(name)


def test_a_function_that_the_networks_module_imported_by_name_is_seen():
    torch.manual_seed(0)
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)
    norm = nn.LayerNorm(4, elementwise_affine=False)
    network = nn.ModuleList([inner, outer])
    model = hosm.ScoreModel(lambda x, t: outer(layer_norm(inner(x), (4,))), hosm.VPSchedule())
    plain = hosm.ScoreModel(lambda x, t: outer(norm(inner(x))), hosm.VPSchedule())
    native = hosm.ScoreModel(model.network, hosm.VPSchedule(), primitives=False)
    expected, got, wrong = (
        gradient(network, each, 3, derivative="reverse") for each in (plain, model, native)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert torch.linalg.vector_norm(wrong - expected) > 0.01 * torch.linalg.vector_norm(expected)


def test_torchs_own_checkpoint_around_other_operators_is_right():
    inner, outer = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.LayerNorm(4))

    def through(x, t):
        return outer(torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False))

    network = nn.ModuleList([inner, outer])
    plain = hosm.ScoreModel(lambda x, t: outer(inner(x)), hosm.VPSchedule())
    expected = gradient(network, plain, 3)
    got = gradient(network, hosm.ScoreModel(through, hosm.VPSchedule()), 3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_checkpoint_takes_the_word_of_torchs():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    assert torch.equal(hosm.checkpoint(layer, x, use_reentrant=False), layer(x))
    for word in ({"use_reentrant": True}, {"context_fn": lambda: None}):
        with pytest.raises(ValueError, match="expected neither use_reentrant=True"):
            hosm.checkpoint(layer, x, **word)


def test_outside_a_loss_our_checkpoint_is_torchs():
    layer = nn.LayerNorm(4)
    x = torch.randn(2, 4, requires_grad=True)
    hosm.checkpoint(layer, x).sin().sum().backward()
    expected = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    with torch.inference_mode():  # as where samples are drawn
        made = torch.randn(2, 4)
        assert torch.equal(hosm.checkpoint(layer, made), layer(made))


def test_nothing_is_left_behind_by_a_graph_that_is_abandoned():
    _, _, model = checkpointed(hosm.checkpoint)
    loss = hosm.third_order_dsm(model, torch.ones(3, 4))
    assert not active()
    del loss
    gc.collect()
    assert not active()


@pytest.mark.parametrize("order", [2, 3])
def test_torchs_own_checkpoint_around_the_loss_module_is_right(order):
    """As the error about one inside advises: the recomputation enters the mode by itself."""
    network, plain, _ = checkpointed(hosm.checkpoint)
    module = {2: hosm.SecondOrderDSM, 3: hosm.ThirdOrderDSM}[order](plain)
    x0 = torch.randn(3, 4)
    inputs = {"t": torch.full((3,), 0.5), "noise": torch.randn(3, 4), "probe": torch.randn(3, 4)}
    parameters = list(network.parameters())
    expected = torch.autograd.grad(module(x0, **inputs), parameters)
    around = torch.utils.checkpoint.checkpoint(module, x0, use_reentrant=False, **inputs)
    around.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)
