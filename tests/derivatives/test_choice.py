"""engine="auto": which engine runs, and that an attempt that failed leaves no trace."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
from random import Random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import hosm_losses as hosm
from hosm_losses.derivatives import select
from hosm_losses.taylor import TaylorError
from hosm_losses.taylor._torch import TELLS_HOOKS
from tests import cases
from tests.cases import (
    ENGINES,
    FUNCTIONS,
    MLP,
    VP,
    Around,
    CountCalls,
    OnceDifferentiable,
    Sine,
    Spectral,
    assert_same,
    default_dtype,
    loss_and_gradients,
    margins,
)
from tests.versions import tells_hooks

SHAPE, PAIRED = (4, 3), {"probes": hosm.Paired(), "probe": None}


def quiet():
    """Without the warning that another engine runs, which has a test of its own."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


class Late(nn.Module):
    """Counts, draws and normalises, and then turns complex, where the Taylor engine stops."""

    def __init__(self, function=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.out, self.function = nn.Linear(4, 3), function
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sum", torch.zeros(3))

    def forward(self, x, t):
        self.calls += 1
        self.sum = self.sum + x.detach().sum(0)
        hidden = self.drop(self.norm(self.layer(x))) + t[:, None]
        return self.function(self.out(torch.fft.ifft(torch.fft.fft(hidden)).real.tanh()))


@pytest.mark.parametrize("order", [2, 3])
def test_a_refused_attempt_leaves_no_trace(order):
    """One loss, one step of statistics, one draw: those of the engine that runs, by its name."""
    found = []
    for engine in ("reverse", "auto"):
        network = Late()
        with torch.inference_mode():  # as where samples are drawn: a buffer is made in it
            network.eval()(torch.randn(SHAPE), torch.rand(4))
        network.train()
        with quiet():
            parts = loss_and_gradients(network, SHAPE, order, engine=engine)
        found.append([*parts, *network.buffers(), torch.rand(1)])
        assert network.calls == 2
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_no_engine_leaves_no_trace_either():
    network = Late(OnceDifferentiable.apply)
    before = [buffer.clone() for buffer in network.buffers()]
    with pytest.raises(hosm.DerivativeError, match=r"taylor: .*; reverse: "):
        loss_and_gradients(hosm.ScoreModel(network.forward, VP), SHAPE)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    cases.given(SHAPE, 3)
    found = [*network.buffers(), drawn]
    torch.testing.assert_close(found, [*before, torch.rand(1)], rtol=0, atol=0)


def test_another_loss_may_have_kept_the_buffers():
    """As batch norm in evaluation keeps its statistics."""
    network, x = Late().eval(), torch.randn(SHAPE)
    other = network(x, torch.rand(4)).square().mean()
    with quiet():
        loss = hosm.third_order_dsm(hosm.ScoreModel(network, VP), x)
    (other + loss).backward()
    assert network.layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_operator_without_a_second_derivative_is_an_error_of_the_library(engine):
    def by_margins(x, t):
        return x * margins(x) + t[:, None]

    with pytest.raises(hosm.DerivativeError, match="margin"):
        loss_and_gradients(hosm.ScoreModel(by_margins, VP), SHAPE, 2, engine=engine)


def test_reverse_mode_is_said_once():
    network = Spectral()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for order in (2, 3, 3, 2):
            got = loss_and_gradients(network, SHAPE, order)
            expected = loss_and_gradients(network, SHAPE, order, engine="reverse")
            assert_same(got, expected, 1e-13)
    (slower,) = said
    assert slower.filename == cases.__file__  # the caller's line, not one of the library
    assert "Spectral" in str(slower.message)


def test_the_choice_does_not_keep_the_network_alive():
    network = Spectral()
    with quiet():
        loss_and_gradients(network, SHAPE)
    alive = weakref.ref(network)
    del network
    gc.collect()
    assert alive() is None


class Watched(nn.Module):
    """Notes which engines call it, and fails in the first as long as it is told to."""

    def __init__(self, error=None):
        super().__init__()
        self.inner, self.error, self.engines = MLP(3), error, []

    def forward(self, x, t):
        self.engines.append("reverse" if type(x) is torch.Tensor else "taylor")
        if self.error is OWN or (self.error is not None and self.engines[-1] == "taylor"):
            raise self.error
        return self.inner(x, t)


def engines_of(network, order=2, transform=lambda function: function, **options):
    """The engines that a loss calls a network with."""
    network.engines.clear()
    model, (x0, inputs) = hosm.ScoreModel(network, VP), cases.given(SHAPE, order)
    with quiet():
        transform(lambda x0: FUNCTIONS[order](model, x0, **inputs | options))(x0)
    return list(network.engines)


@pytest.mark.parametrize("order", [2, 3])
def test_auto_is_the_taylor_engine(order):
    for engine in ENGINES:
        expected = "taylor" if engine == "auto" else engine
        assert engines_of(Watched(), order, engine=engine) == [expected]


def hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def profiler():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


AROUND = {"nothing": nullcontext, "a transform": nullcontext, "a mode": BaseTorchFunctionMode}
AROUND |= {"a mode of operators": CountCalls, "a profiler": profiler}
AROUND |= {"hooks": hooks} if TELLS_HOOKS else {}
KINDS = list(product((2, 3), (1, 2), (torch.float32, torch.float64), (True, False)))
# What the engine refuses, what may be a bad batch's, and what the depth of the caller's stack is.
FAILING = [kind("not now") for kind in (TypeError, AssertionError, AttributeError, IndexError)]
FAILING += [TaylorError("an operator without a derivative"), RecursionError()]
# What says nothing of the network, and what is its own with either engine.
OWN = RuntimeError("of the network itself")
RAISED = [torch.OutOfMemoryError("16 GiB"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
RAISED += [KeyboardInterrupt(), OWN]


class Past:
    """What was seen of calls of one kind."""

    def __init__(self):
        self.served, self.failures = set(), 0

    def expect(self, around, error):
        """The engines that the next call tries, and whether it raises the error."""
        if self.failures > 1:
            return ["reverse"], error is OWN
        if error is None:
            self.served.add(around)
        if error is None or around in self.served or error in RAISED[:-1]:
            return ["taylor"], error is not None
        if error is not OWN and around == "nothing" and not isinstance(error, RecursionError):
            self.failures += 1 + isinstance(error, TaylorError)
        return ["taylor", "reverse"], error is OWN


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_that_fails_twice_or_refuses_once_is_not_tried_again(seed):
    """In calls of that kind, unless what surrounds them may be the cause or it has served some."""
    random, network, pasts = Random(seed), Watched(), {kind: Past() for kind in KINDS}
    for _ in range(150):
        kind = order, count, dtype, training = random.choice(KINDS)
        around, error = random.choice(list(AROUND)), random.choice([None, *FAILING, *RAISED])
        expected, raises = pasts[kind].expect(around, error)
        network.error = error
        options = {"probe": torch.randn(count, *SHAPE, dtype=dtype)}
        options |= {"transform": torch.func.grad} if around == "a transform" else {}
        network.train(training).to(dtype)
        said = hosm.DerivativeError if isinstance(error, TaylorError) else type(error)
        with default_dtype(dtype), AROUND[around]():
            with pytest.raises(said) if raises else nullcontext() as caught:
                engines_of(network, order, **options)
            assert not raises or caught.type is said
        assert network.engines == expected, (kind, around, error)


@pytest.mark.parametrize("failing", [0, 4])
def test_an_error_in_one_step_changes_no_other(failing):
    """As of a bad batch. In the first step reverse mode is tried; in a later one it is raised."""
    network, same = Watched(), partial(torch.testing.assert_close, rtol=0, atol=0)
    for step in range(7):
        losses = partial(loss_and_gradients, shape=SHAPE, seed=step)
        expected = losses(hosm.ScoreModel(network.inner, VP), engine="taylor")
        network.error = ValueError("bad batch") if step == failing else None
        if step != failing:
            same(losses(network), expected)
        elif step == 0:
            with pytest.warns(UserWarning, match="bad batch"):
                assert_same(losses(network), expected, 1e-12)
        else:
            with pytest.raises(ValueError, match="bad batch") as raised:
                losses(network)
            assert raised.value is network.error


@pytest.mark.parametrize("options", [{"order": 2}, {}])
def test_an_engine_that_has_served_gives_way_to_no_other(options):
    """Not even where it meets what it cannot differentiate: that is an error with its remedy."""
    network = Around(lambda h: Sine.apply(h) if network.custom else h.sin())
    losses = partial(loss_and_gradients, network, (4, 2), **options)
    network.custom = False
    first = losses()
    network.custom = True
    with pytest.raises(hosm.DerivativeError, match="engine='reverse'"):
        losses()
    network.custom = False
    torch.testing.assert_close(losses(), first, rtol=0, atol=0)


class Normed(nn.Module):
    """For the taylor engine alone: its norm is in torch's own checkpoint."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        return torch_checkpoint(F.layer_norm, self.layer(x), (3,), use_reentrant=False)


@pytest.mark.parametrize("around", [nullcontext, BaseTorchFunctionMode])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: MLP(3), {"order": 2}),
        (lambda: MLP(3), {}),
        (lambda: MLP(3), PAIRED),
        (Spectral, {}),
        pytest.param(Normed, PAIRED, marks=tells_hooks),
    ],
)
def test_no_buffer_is_copied_once_an_engine_has_served_a_call(make, options, around, monkeypatch):
    network, whole, copied = make(), select.NetworkState, []
    monkeypatch.setattr(select, "NetworkState", lambda *given: copied.append(1) or whole(*given))
    for step in range(4):
        copied.clear()
        with quiet():
            loss_and_gradients(network, SHAPE, **options)
        assert bool(copied) == (step == 0)
    with around():
        loss_and_gradients(network, SHAPE, **options)
        copied.clear()
        loss_and_gradients(network, SHAPE, **options)
    assert not copied


def test_what_is_remembered_is_no_part_of_a_copy():
    network = Watched(TaylorError("an operator without a derivative"))
    assert engines_of(network) == ["taylor", "reverse"]
    network.error = None
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert engines_of(other) == ["taylor"]
        other.error = ValueError("bad batch")
        with pytest.raises(ValueError, match="bad batch"):
            engines_of(other)
    assert engines_of(network) == ["reverse"]


@torch.no_grad()
def sine(h):
    return torch.sin(h)


CONSTANTS = {
    "a function": (lambda h: h * sine(h) + h, lambda h: h * h.sin().detach() + h),
    "places": (
        lambda h: h * torch.no_grad()(torch.sort)(h, 1).indices,
        lambda h: h * h.argsort(1),
    ),
}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_part_under_no_grad_is_the_constant_that_autograd_makes_of_it(name, order):
    """In eager mode it was once another objective. The taylor engine refuses it."""
    part, detached = CONSTANTS[name]
    expected = loss_and_gradients(Around(detached), (4, 2), order, engine="taylor")
    assert_same(loss_and_gradients(Around(part), (4, 2), order, engine="reverse"), expected)
    with pytest.warns(UserWarning, match="under torch.no_grad"):
        found = loss_and_gradients(Around(part), (4, 2), order)
    assert_same(found, expected)


def test_what_computes_under_no_grad_by_itself_is_no_constant():
    """A custom Function, a checkpoint, integers, what is detached; and nothing else is refused."""

    def own(h):
        with torch.no_grad():
            places = h.argmax(1), (h > 0).sum(1), h.detach().abs().mean(1)
        with torch.inference_mode():
            size = float(h.detach().abs().max())
        return Sine.apply(h) * hosm.checkpoint(torch.cos, h) + h * size * sum(places)[:, None]

    def plain(h):
        places, size = h.detach().abs().mean(1) + h.argmax(1) + (h > 0).sum(1), h.detach().abs()
        return h.sin() * h.cos() + h * size.max() * places[:, None]

    for order in (2, 3):
        expected = loss_and_gradients(Around(plain), (4, 2), order, engine="taylor")
        with quiet():
            assert_same(loss_and_gradients(Around(own), (4, 2), order), expected)


def test_a_checkpoint_around_the_loss_keeps_the_engine():
    network = Watched()
    module = hosm.SecondOrderDSM(hosm.ScoreModel(network, VP))
    torch_checkpoint(module, torch.randn(SHAPE), use_reentrant=False).backward()
    assert network.engines == ["taylor", "taylor"]
    assert engines_of(network) == ["taylor"]


def a_loss():
    """An operator without a rule goes to torch.func.jvp, whose levels are the process's."""
    network = Around(lambda h: torch.logsumexp(torch.stack([F.mish(h), h.sin()]), 0))
    model, (x0, inputs) = hosm.ScoreModel(network, VP), cases.given((2, 2), 3)
    return lambda: hosm.third_order_dsm(model, x0, **inputs).detach()


def rates():
    """They are taken by torch.func.jvp as well."""
    t = torch.linspace(0.1, 0.9, 5)
    return lambda: torch.stack(hosm.CosineSchedule().rates(t))


@pytest.mark.parametrize("make", [a_loss, rates])
def test_two_threads_do_not_disturb_each_other(make):
    once, start = make(), threading.Barrier(2)
    expected = once()

    def work():
        start.wait()
        return all(torch.equal(once(), expected) for _ in range(100))

    with ThreadPoolExecutor(2) as pool:
        assert all(each.result() for each in [pool.submit(work), pool.submit(work)])
