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

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import hosm_losses as hosm
from hosm_losses.derivatives import select
from hosm_losses.taylor import TaylorError
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
        if self.error is not None and self.engines[-1] == "taylor":
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


REFUSED = TaylorError("an operator without a derivative")
ERRORS = [kind("not now") for kind in (TypeError, AssertionError, AttributeError, IndexError)]


@pytest.mark.parametrize(("error", "times"), [(REFUSED, 1), *((each, 2) for each in ERRORS)])
def test_an_engine_that_fails_twice_or_refuses_once_is_not_tried_again(error, times):
    network = Watched(error)
    for _ in range(times):
        assert engines_of(network) == ["taylor", "reverse"]
    assert engines_of(network) == ["reverse"]


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


def test_a_failure_is_remembered_for_calls_of_its_kind():
    """Of two probes it says nothing about one, nor about another order, mode or dtype."""
    network, two = Watched(TaylorError()), {"probe": torch.randn(2, *SHAPE)}
    assert engines_of(network, **two) == ["taylor", "reverse"]
    network.error = None
    for order, options in ((2, {}), (3, {}), (3, two)):
        assert engines_of(network, order, **options) == ["taylor"]
    assert engines_of(network, **two) == ["reverse"]
    assert engines_of(network.eval(), **two) == ["taylor"]
    network, model = network.train().float(), hosm.ScoreModel(network, VP)
    network.engines.clear()
    hosm.second_order_dsm(model, torch.randn(4, 3, dtype=torch.float32), probes=2)
    assert network.engines == ["taylor"]


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


def hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def profiler():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@pytest.mark.parametrize(
    ("around", "error"),
    [
        (BaseTorchFunctionMode, TypeError("a mode that knows no Jet")),
        (CountCalls, TypeError()),
        pytest.param(hooks, TypeError(), marks=tells_hooks),
        (profiler, TypeError()),
        (nullcontext, RecursionError()),
    ],
)
def test_a_failure_that_the_surroundings_may_cause_is_not_remembered(around, error):
    network = Watched(error)
    for _ in range(2):
        with around():
            assert engines_of(network) == ["taylor", "reverse"]
        assert engines_of(network, transform=torch.func.grad) == ["taylor", "reverse"]
    network.error = None
    assert engines_of(network) == ["taylor"]
    network.error = TypeError("of what surrounds the call, though the engine has served others")
    assert engines_of(network, transform=torch.func.grad) == ["taylor", "reverse"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("16 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        KeyboardInterrupt(),
        "of the network itself",
    ],
)
def test_an_error_that_says_nothing_of_the_network_is_raised_and_not_remembered(error):
    network = Watched(None if isinstance(error, str) else error)
    if isinstance(error, str):
        network.inner = nn.Bilinear(2, 1, 3)
    kind = RuntimeError if isinstance(error, str) else type(error)
    for _ in range(2):
        with pytest.raises(kind) as raised:
            engines_of(network)
        assert raised.type is kind  # and no DerivativeError
    network.error, network.inner = None, MLP(3)
    assert engines_of(network) == ["taylor"]


def test_a_checkpoint_around_the_loss_keeps_the_engine():
    network = Watched()
    module = hosm.SecondOrderDSM(hosm.ScoreModel(network, VP))
    torch_checkpoint(module, torch.randn(SHAPE), use_reentrant=False).backward()
    assert network.engines == ["taylor", "taylor"]
    assert engines_of(network) == ["taylor"]


def right_in_two_threads(times, once):
    """Whether two threads that start together get each time what one gets alone."""
    start, expected = threading.Barrier(2), once()

    def work():
        start.wait()
        return all(torch.equal(once(), expected) for _ in range(times))

    with ThreadPoolExecutor(2) as pool:
        return all(each.result() for each in [pool.submit(work), pool.submit(work)])


def test_two_threads_do_not_disturb_each_other():
    """An operator without a rule goes to torch.func.jvp, whose levels are the process's."""
    network = Around(lambda h: torch.logsumexp(torch.stack([F.mish(h), h.sin()]), 0))
    model, (x0, inputs) = hosm.ScoreModel(network, VP), cases.given((2, 2), 3)

    def once():
        return hosm.third_order_dsm(model, x0, **inputs).detach()

    assert right_in_two_threads(100, once)


def test_threads_that_take_derivatives_in_time():
    """Rates of a schedule are taken by torch.func.jvp as well."""
    schedule, t = hosm.CosineSchedule(), torch.linspace(0.1, 0.9, 5)
    assert right_in_two_threads(100, lambda: torch.stack(schedule.rates(t)))
