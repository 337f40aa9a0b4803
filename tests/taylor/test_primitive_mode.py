"""The mode: where it is on, and the checkpoints that carry it or do not."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import hosm_losses as hosm
from hosm_losses.taylor import primitives
from hosm_losses.taylor.primitives import safe_primitives
from tests.cases import ENGINES, VP, OfX, assert_same, loss_and_gradients
from tests.taylor.test_primitives import LAYERS, SDPA, network_of
from tests.versions import tells_hooks

torchs_own = partial(torch_checkpoint, use_reentrant=False)
reentrant = partial(torch_checkpoint, use_reentrant=True)
contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
selective = partial(torchs_own, context_fn=contexts)


def without(function, x):
    return function(x)


class Network(nn.Module):
    """A layer norm, or another part, inside an activation checkpoint."""

    def __init__(self, checkpoint=without, norm=nn.LayerNorm):
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Linear(4, 4), norm(4), nn.Tanh())
        self.outer = nn.Linear(4, 4)
        self.checkpoint = checkpoint
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t):
        self.calls += torch.rand(()).ceil()
        return self.outer(self.checkpoint(self.inner, x))


def losses(network, engine="auto", order=3, **options):
    """Of three probes; engines draw none."""
    probe = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))
    options = {"probe": probe, "engine": engine} | options
    return loss_and_gradients(network, (3, 4), order, **options)


def active() -> bool:
    """Whether layer_norm is the primitive here: the native one saves a tensor of its own."""
    x = torch.ones(1, 2, requires_grad=True)
    return "NativeLayerNorm" not in type(F.layer_norm(x, (2,)).grad_fn).__name__


def test_the_mode_is_on_only_in_its_block_and_its_thread():
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


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_our_checkpoint_is_right(engine, order):
    network = Network(hosm.checkpoint)
    for options in ({}, {"probe": torch.ones(3, 4)}):
        expected = losses(Network(), order=order, **options)
        assert_same(losses(network, engine, order, **options), expected, 1e-10)
        with torch.no_grad():
            assert_same(losses(network, engine, order, **options)[0], expected[0], 1e-10)


def test_torchs_own_checkpoint_is_right_or_an_error():
    """The taylor engine has its own rules, and no mode that a recomputation could miss."""
    expected = losses(Network())
    for engine in ("auto", "taylor"):
        assert_same(losses(Network(torchs_own), engine), expected, 1e-10)
    for checkpoint, engine in ((torchs_own, "reverse"), *((reentrant, each) for each in ENGINES)):
        with pytest.raises(hosm.DerivativeError):
            losses(Network(checkpoint), engine)
    others = Network(torchs_own, nn.Identity)  # which need no primitive
    assert_same(losses(others, "reverse"), losses(Network(norm=nn.Identity)), 1e-10)


@tells_hooks
@pytest.mark.parametrize("order", [2, 3])
def test_paired_probes_leave_torchs_own_checkpoint_to_the_taylor_engine(order):
    """They take reverse mode where they can; the attempt leaves no trace."""
    network, options = Network(torchs_own), {"order": order, "probes": hosm.Paired()}
    expected, attempts = [*losses(Network(), **options), torch.rand(1)], []
    network.register_forward_pre_hook(lambda *_: attempts.append(1))
    for calls in (1, 2):
        assert_same([*losses(network, **options), torch.rand(1)], expected, 1e-10)
        assert network.calls == calls
    assert len(attempts) == 3  # the second time without one that fails


def test_a_selective_checkpoint_is_right_in_the_taylor_engine():
    """The bias is not added to the product that it keeps, and would be there again."""
    assert_same(losses(Network(selective), order=2), losses(Network(), order=2), 1e-10)


@pytest.mark.parametrize("options", [{}, {"engine": "reverse"}])
def test_a_selective_checkpoint_is_an_error_where_two_passes_go_back(options):
    with pytest.raises((RuntimeError, hosm.DerivativeError), match=r"an extra time|hosm_losses"):
        losses(Network(selective), **options)


def test_around_a_loss_it_is_right_or_an_error():
    found = []
    for around in (without, selective):
        network = Network()
        loss = hosm.SecondOrderDSM(hosm.ScoreModel(network, VP))
        torch.manual_seed(2)
        around(loss, torch.randn(3, 4)).backward()
        found.append([each.grad for each in network.parameters()])
    assert_same(*found, 1e-10)
    third = hosm.ThirdOrderDSM(hosm.ScoreModel(Network(), VP))
    with pytest.raises(RuntimeError, match=r"during backward|Recomputed|extra time"):
        selective(third, torch.randn(3, 4)).backward()


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("name", [*LAYERS, "math attention"])
def test_torchs_own_checkpoint_is_an_error_around_every_primitive(name, seen, monkeypatch):
    """Also where no hooks can be seen, as on an older PyTorch: the recomputation shows it.

    What a primitive saves never looks like what the operator saves.
    """
    if not seen:
        monkeypatch.setattr(primitives, "checkpoint_hook", lambda: None)
    network, shape = network_of(name.split()[-1])
    if name == "math attention":
        network[1].forward = lambda x: SDPA(*network[1].qkv(x).chunk(3, -1))
    model = hosm.ScoreModel(OfX(partial(torchs_own, network)), VP)
    with pytest.raises(hosm.DerivativeError):
        hosm.third_order_dsm(model, torch.randn(4, *shape), engine="reverse")


def test_the_checkpoint_takes_the_word_of_torchs():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    assert torch.equal(hosm.checkpoint(layer, x, use_reentrant=False), layer(x))


def test_outside_a_loss_our_checkpoint_is_torchs():
    layer, x = nn.LayerNorm(4), torch.randn(2, 4, requires_grad=True)
    found = [
        torch.autograd.grad(each(x).sin().sum(), x)[0]
        for each in (partial(hosm.checkpoint, layer), layer)
    ]
    assert_same(*found)
    with torch.inference_mode():  # as where samples are drawn
        made = torch.randn(2, 4)
        assert torch.equal(hosm.checkpoint(layer, made), layer(made))
