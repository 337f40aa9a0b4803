"""derivative="auto": which engine runs, and that an attempt that failed leaves no trace."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import hosm_losses as hosm
from hosm_losses.derivatives.select import ENGINES, _choice
from tests.oracles import MLP, OnceDifferentiable, networks
from tests.versions import tells_hooks

LOSSES = {2: hosm.second_order_dsm, 3: hosm.third_order_dsm}
REFUSED = "the engine 'taylor' cannot differentiate"


class Late(nn.Module):
    """Counts, draws and normalises, and then turns complex, where the Taylor engine stops."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.out = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sum", torch.zeros(3))

    def forward(self, x, t):
        self.calls += 1
        self.sum = self.sum + x.detach().sum(0)
        hidden = self.drop(self.norm(self.layer(x))) + t[:, None]
        return self.out(torch.tanh(by_frequency(hidden)))


def by_frequency(x):
    """The same, by way of complex numbers."""
    return torch.fft.ifft(torch.fft.fft(x)).real


def quiet():
    """Without the warning that another engine runs, which has a test of its own."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


@pytest.mark.parametrize("order", [2, 3])
def test_a_refused_attempt_leaves_no_trace(order):
    """One loss, one step of statistics, one draw: those of the engine that runs, called by name."""
    found = []
    x0, noise, probe = torch.randn(3, 4, 3).unbind()
    t = torch.linspace(0.2, 0.7, 4)
    for derivative in ("reverse", "auto"):
        network = Late()
        torch.manual_seed(1)
        with quiet():
            loss = LOSSES[order](
                hosm.ScoreModel(network, hosm.VPSchedule()),
                *(x0,),
                t=t,
                noise=noise,
                probe=probe,
                derivative=derivative,
            )
            loss.backward()
        state = {name: buffer.clone() for name, buffer in network.named_buffers()}
        gradients = [p.grad for p in network.parameters()]
        found.append((loss.detach(), gradients, state, torch.rand(1)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert found[1][2]["calls"] == 1


class Never(Late):
    def forward(self, x, t):
        return OnceDifferentiable.apply(super().forward(x, t))


def test_no_engine_leaves_no_trace_either():
    network = Never()
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    t, noise = torch.full((3,), 0.5), torch.randn(3, 3)
    torch.manual_seed(1)
    with pytest.raises(hosm.DerivativeError, match="by any engine"):
        hosm.second_order_dsm(model, torch.ones(3, 3), t=t, noise=noise, probe=noise.sign())
    torch.testing.assert_close(dict(network.named_buffers()), before, rtol=0, atol=0)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)


def by_distances(x, t):
    return x * torch.cdist(x[:, None], torch.eye(3)[None]).squeeze(1) + t[:, None]


def of_two_lengths(x, t):
    """By a nested tensor, which PyTorch differentiates once."""
    nested = torch.nested.as_nested_tensor([x[0, :2], x[1]], layout=torch.jagged)
    return torch.nested.to_padded_tensor(nested.sin(), 0.0, (2, 3)) + t[:, None]


@pytest.mark.parametrize("derivative", ENGINES)
@pytest.mark.parametrize("function", [by_distances, of_two_lengths])
def test_what_an_engine_cannot_differentiate_is_told_in_words(function, derivative):
    layer = nn.Linear(3, 3)
    model = hosm.ScoreModel(lambda x, t: layer(function(x, t)), hosm.VPSchedule())
    words = "by any engine" if derivative == "auto" else rf"engine '{derivative}'.*at 'auto'"
    with pytest.raises(hosm.DerivativeError, match=words):
        hosm.second_order_dsm(model, torch.randn(2, 3), derivative=derivative)


def refused(x, t):
    return by_frequency(x.sin() + t[:, None])


@pytest.mark.parametrize("options", [{}, {"third": "exact"}, {"third": "laplacian"}], ids=str)
def test_a_slower_engine_is_a_warning_once(options):
    order = 3 if options else 2
    layer = nn.Linear(3, 3)
    model = hosm.ScoreModel(lambda x, t: layer(refused(x, t)), hosm.VPSchedule())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            LOSSES[order](model, torch.randn(4, 3), **options)
    (told,) = [str(each.message) for each in said]
    assert said[0].filename == __file__  # the user's line, not one of the library
    assert f"{REFUSED} function" in told
    assert "makes complex numbers" in told
    replaced = "third='exact' that of 'laplacian'" in told
    assert replaced == (options == {"third": "laplacian"})


def test_a_replaced_objective_is_said_after_a_slower_engine_was():
    layer = nn.Linear(3, 3)
    model = hosm.ScoreModel(lambda x, t: layer(refused(x, t)), hosm.VPSchedule())
    with pytest.warns(UserWarning, match="takes its place.$"):
        hosm.dsm_terms(model, torch.randn(4, 3), order=2, third="laplacian")
    with pytest.warns(UserWarning, match="that of 'laplacian'.$"):
        hosm.third_order_dsm(model, torch.randn(4, 3), third="laplacian")


def test_where_taylor_is_refused_exact_takes_the_place_of_laplacian():
    layer = nn.Linear(3, 3)
    model = hosm.ScoreModel(lambda x, t: layer(refused(x, t)), hosm.VPSchedule())
    x0, noise, probe = torch.randn(3, 4, 3).unbind()
    given = {"t": torch.linspace(0.2, 0.7, 4), "noise": noise, "probe": probe}
    with quiet():
        got = hosm.dsm_terms(model, x0, third="laplacian", **given)
    exact = hosm.dsm_terms(model, x0, derivative="reverse", **given)
    torch.testing.assert_close(got, exact, rtol=0, atol=0)


def works():
    return networks()["mlp"][0]


def loss_of(network, order=2):
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    return LOSSES[order](model, torch.randn(4, 3))


class Seeing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if any(type(each).__name__ == "_Opaque" for each in args):
            raise TypeError("a mode of the user's that knows no Jet")
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def failing(network, fails):
    """The network, which fails as long as it is asked to."""

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t):
            if type(x) is not torch.Tensor and fails:
                raise TypeError("not now")
            return self.network(x, t)

    return Failing()


@pytest.mark.parametrize(
    "around", ["mode", "dispatch", pytest.param("hooks", marks=tells_hooks), "profiler"]
)
def test_what_happened_inside_something_of_the_users_is_not_remembered(around):
    fails = [True]
    network = failing(works(), fails)
    contexts = {
        "mode": Seeing,
        "dispatch": Dispatching,
        "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        "profiler": lambda: torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]
        ),
    }
    with quiet(), contexts[around]():
        loss_of(network)
    assert _choice(network).refused == {}
    fails.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(network)


def test_nor_what_happened_under_a_transform():
    fails = [True]
    network = failing(works(), fails)
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    x0, noise = torch.randn(2, 4, 3).unbind()
    given = {"t": torch.full((4,), 0.5), "noise": noise, "probe": noise.sign()}
    with quiet():
        torch.func.grad(lambda x0: hosm.second_order_dsm(model, x0, **given))(x0)
    assert _choice(network).refused == {}


def test_what_the_network_cannot_do_is_remembered():
    network = Late().eval()
    with quiet():
        loss_of(network)
    assert list(_choice(network).refused) == ["taylor"]


def test_how_deep_calls_may_go_is_not_remembered():
    network = works()

    def deep(module, args):
        if type(args[0]) is not torch.Tensor:
            raise RecursionError

    handle = network.register_forward_pre_hook(deep)
    with quiet():
        loss_of(network)
    assert _choice(network).refused == {}
    handle.remove()


class Interrupted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.interrupts = MLP(3), [True]

    def forward(self, x, t):
        if self.interrupts:
            self.interrupts.pop()
            raise KeyboardInterrupt
        return self.inner(x, t)


def test_an_interrupt_is_not_remembered():
    network = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        loss_of(network)
    assert _choice(network).refused == {}


def test_a_checkpoint_around_the_loss_keeps_the_engine():
    network = works()
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    module = hosm.SecondOrderDSM(model)
    torch_checkpoint(module, torch.randn(4, 3), use_reentrant=False).backward()
    assert _choice(network).refused == {}


class Mixed(nn.Module):
    """An operator without a rule, which the Taylor engine gives to torch.func.jvp."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 16), nn.Linear(16, 3)

    def forward(self, x, t):
        hidden = F.mish(self.inner(x) + t[:, None])
        return self.outer(torch.logsumexp(torch.stack([hidden, hidden.sin()]), 0))


def wrong_in_two_threads(times, once, expected):
    """What two threads that start together get that is not what one gets alone."""
    wrong, start = [], threading.Barrier(2)

    def work():
        start.wait()
        for _ in range(times):
            try:
                got = once()
            except Exception as error:
                wrong.append(error)
            else:
                if not torch.equal(got, expected):
                    wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.mark.parametrize(
    ("order", "options"),
    [
        *((order, {"derivative": d}) for order in (2, 3) for d in ENGINES),
        *((3, {"derivative": d, "third": "laplacian"}) for d in ENGINES if d != "reverse"),
    ],
    ids=str,
)
def test_two_threads_do_not_disturb_each_other(order, options):
    """Levels of torch.func.jvp are the process's: 400 losses are what they are alone."""
    model = hosm.ScoreModel(Mixed(), hosm.VPSchedule())
    x0, noise, probe = torch.randn(3, 2, 3).unbind()
    given = {"t": torch.tensor([0.3, 0.6]), "noise": noise, "probe": probe}

    def once():
        return LOSSES[order](model, x0, **given, **options).detach()

    expected = once()
    assert wrong_in_two_threads(200, once, expected) == []


def test_threads_that_take_derivatives_in_time():
    """Rates of a schedule are taken by torch.func.jvp as well."""
    schedule = hosm.CosineSchedule()
    t = torch.linspace(0.1, 0.9, 5)
    expected = torch.stack(schedule.rates(t))
    assert wrong_in_two_threads(300, lambda: torch.stack(schedule.rates(t)), expected) == []
