"""check_derivatives is silent on what is right, and names a module at fault with its remedy."""

import contextlib
import copy
from itertools import count, pairwise, product
from types import new_class

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import hosm_losses as hosm
from hosm_losses.diagnostics import differences
from tests.cases import (
    ENGINES,
    MLP,
    VP,
    CountFlops,
    Function,
    OfX,
    OnceDifferentiable,
    Sine,
    Spectral,
    default_dtype,
    margins,
    networks,
)
from tests.versions import layer_norm_is_wrong


class Net(nn.Module):
    """Two layers, between them one that may be at fault, and a function in its own forward."""

    def __init__(self, layer=None, own=lambda hidden, t: hidden):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer, self.own = layer or nn.Tanh(), own

    def forward(self, x, t, **conditions):
        hidden = torch.tanh(self.inner(x) + t[:, None])
        return self.outer(self.own(hidden + self.layer(hidden), t, **conditions))


class Partly(Sine):
    """Right once, without a graph to what it was given."""

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].detach().cos()


class PartlyInFloat32(Sine):
    """Another kernel in each dtype."""

    @staticmethod
    def backward(ctx, grad):
        return (Partly if grad.dtype == torch.float32 else Sine).backward(ctx, grad)


class InHalf(Sine):
    """Computed in half precision, where no graph shows it."""

    @staticmethod
    def forward(ctx, x):
        return Sine.forward(ctx, x.bfloat16()).to(x)


class WithoutGraph(nn.Linear):
    """Its weights are seen by no graph."""

    def forward(self, x):
        return F.linear(x, self.weight.data, self.bias)


class InFloat32(nn.Linear):
    """Its weights are cast where they are used."""

    def __init__(self):
        super().__init__(4, 4, dtype=torch.float32)

    def forward(self, x):
        return F.linear(x, self.weight.to(x), self.bias.to(x))


class Counts(nn.Module):
    """A layer that changes a little with every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1e-5
        return x * (1 + self.seen)


class LooksUp(nn.Module):
    """Times from a table, and tokens with one that stands for none."""

    def __init__(self):
        super().__init__()
        self.times, self.bag = nn.Embedding(1000, 4), nn.EmbeddingBag(9, 4)
        self.tokens = nn.Embedding(9, 4, padding_idx=0)
        nn.init.normal_(self.tokens.weight)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(self, x, t, tokens):
        return self.layers(x + self.times(t) + self.tokens(tokens).mean(1) + self.bag(tokens))


def named(name, function=Partly):
    """An autograd.Function under another name."""
    return new_class(name, (function,)).apply


def detaching(x):
    return x.sin() * x.detach().cos()


def taken(hidden):
    """A branch of torch.where that is not taken has no derivative."""
    return torch.where(hidden < 9, hidden.sin(), hidden.sqrt())


def temporal():
    """Convolutions of a sequence with group norms, as planners have them."""

    def block(inner, outer):
        return nn.Conv1d(inner, outer, 5, padding=2), nn.GroupNorm(4, outer), nn.Mish()

    widths = (2, 16, 16, 32, 32, 16)
    blocks = [each for pair in pairwise(widths) for each in block(*pair)]
    return OfX(nn.Sequential(*blocks, nn.Conv1d(16, 2, 1)))


def convolutions(activation):
    first, second, last = (nn.Conv2d(*each, 3, padding=1) for each in ((3, 16), (16, 16), (16, 3)))
    return OfX(nn.Sequential(first, activation, second, activation, last))


def attention():
    """Layers that share all of their parameters."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu, batch_first=True)
    return OfX(nn.Sequential(nn.Linear(3, 8), layer, layer, nn.Linear(8, 3)))


def around(function):
    """A maker of a network with this function in a layer."""
    return lambda: Net(Function(function))


def within(own):
    """A maker of a network with this function in its own forward."""
    return lambda: Net(own=own)


def check(make, order=3, *, dtype=torch.float64, shape=(4,), batch=2, size=1.0, **options):
    own = {name: options.pop(name) for name in ("prediction", "primitives") if name in options}
    with default_dtype(dtype):
        model = hosm.ScoreModel(make(), options.pop("schedule", VP), **own)
    hosm.check_derivatives(model, size * torch.randn(batch, *shape, dtype=dtype), order, **options)


FLOAT32, IMAGES = {"dtype": torch.float32}, {"shape": (3, 6, 6)}
TWO, THREE = {"order": 2}, {"order": 3}
REVERSE, TAYLOR = ({"engine": engine} for engine in ("reverse", "taylor"))
LATE = {"t": torch.full((2,), 0.99, dtype=torch.float64)}
INDICES = torch.tensor([1, 0])
TABLE = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
LAYER, GENERAL = "in the module 'layer' (Function)", "without .detach()"
IN_HALF = "Check a float32 copy"


def given(**conditions):
    return {"model_kwargs": conditions}


def late(hidden, t):
    return torch.where(t[:, None] > 0.98, detaching(hidden), hidden)


def slightly(x):
    return x.sin() + 1e-3 * x * x.detach()


def beside_float32(wrong):
    """A function of the time in float32 leaves the precision that of the data."""
    return lambda hidden, t: wrong(hidden) + t.float().sin().to(hidden)[:, None]


def rounded(x, t):
    return x.sin() if x.dtype == torch.float64 else 0.9 * x.sin() + 0.1 * x.detach().sin()


def in_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, x).sum(1, keepdim=True)


def counting():
    """It changes with every call, which no seed undoes."""
    calls = count(1)
    return lambda x: x * next(calls)


def remembering():
    first = []

    def own(hidden, t):
        first.append(t[:, None])
        return hidden * first[0]

    return own


def attends(hidden, t, tokens):
    return hidden + (torch.softmax(tokens @ hidden[..., None], -2) * tokens).sum(-2)


def by_place(hidden, t, own, tables=()):
    """Conditions of every sample, and tables of which all samples use the first row."""
    return sum((table[0] for table in tables), hidden * own)


RIGHT = {
    "attention": (attention, FLOAT32 | {"shape": (5, 3)}),
    "linear": (lambda: OfX(nn.Linear(4, 4)), {}),
    "linear, float32": (lambda: OfX(nn.Linear(4, 4)), FLOAT32),
    "second derivatives jump": (lambda: Net(nn.ELU()), TWO),
    "third derivatives": (around(lambda x: x.sin() + (x - x.detach()) ** 3), TWO),
    "kinks in time": (within(lambda hidden, t: hidden * (t[:, None] - 0.5).relu()), {}),
    "fast waves": (around(lambda x: (40 * x).sin()), {}),
    "nearly a step": (lambda: Net(nn.GroupNorm(2, 4)), {}),
    "small data": (lambda: Net(nn.SiLU()), FLOAT32 | {"size": 1e-5}),
    "no data": (lambda: Net(nn.SiLU()), {"size": 0.0}),
    "no parameters": (lambda: lambda x, t: (x + 1).sin(), FLOAT32 | {"size": 1e-4}),
    "large data": (lambda: lambda x, t: x + (x / 1e4).sin(), FLOAT32 | {"size": 1e4}),
    "large values": (lambda: lambda x, t: x.sin() + 1e5, FLOAT32),
    "a time in float32": (within(beside_float32(torch.sin)), {}),
    "parameters in float32": (lambda: Net(InFloat32()), {}),
    "float32 inside": (around(lambda x: x.float().sin().to(x)), {}),
    "complex numbers": (Spectral, {"shape": (3,), "prediction": "x0"}),
    "a function": (around(named("FlashKernel", Sine)), FLOAT32 | REVERSE),
    "batch norm in evaluation": (lambda: Net(nn.BatchNorm1d(4).eval()), {}),
    "dropout": (lambda: Net(nn.Dropout(0.5)), {}),
    "batches of two alone": (around(lambda x: x.reshape(2, 4).sin()), {}),
    "one sample": (within(lambda hidden, t: hidden * t[0]), {"batch": 1}),
    "indices, and a number of NumPy": (
        Net,
        {"schedule": hosm.DiscreteSchedule([0.9, 0.5, 0.1]), "order": np.int64(2), "t": INDICES},
    ),
    "embeddings": (
        LooksUp,
        given(tokens=torch.eye(2).long()) | {"schedule": hosm.DiscreteSchedule.linear(1000)},
    ),
    "its own tokens": (within(attends), given(tokens=torch.stack([TABLE, 2 * TABLE]))),
    "shared tokens": (within(attends), given(tokens=hosm.Shared(TABLE))),
    "another length": (within(attends), {"batch": 3} | given(tokens=TABLE)),
    "a shared table": (within(by_place), given(own=TABLE, tables=[hosm.Shared(TABLE)])),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_no_alarm(name):
    make, options = RIGHT[name]
    check(make, **options)


def test_what_is_right_is_said_with_the_engine_and_advice():
    x0, wide = torch.randn(2, 4, dtype=torch.float32), torch.randn(2, 4)
    net = Net(nn.SiLU())
    report = hosm.check_derivatives(hosm.ScoreModel(net.double(), VP), wide.double())
    assert (report.orders, report.engine, report.advice) == ((1, 2, 3), "taylor", ())
    assert str(report) == "ok: orders 1, 2 and 3, by the engine 'taylor'"
    report = hosm.check_derivatives(hosm.ScoreModel(net.float(), VP), x0[:1], 2, engine="reverse")
    assert str(report).startswith("ok: orders 1 and 2, by the engine 'reverse'\n")
    assert "check two" in str(report)
    assert "A float64 copy" in str(report)
    report = hosm.check_derivatives(hosm.ScoreModel(rounded, VP), x0)
    assert "agree in a float64 copy" in report.advice[0]
    own = hosm.ScoreModel(Spectral().double(), VP)
    for order in (2, 3):
        report = hosm.check_derivatives(own, wide[:, :3].double(), order)
        assert report.engine == "reverse"
        assert "cannot differentiate it (" in report.advice[0]
    report = hosm.check_derivatives(hosm.ScoreModel(lambda x, t: x.sin(), VP), wide.double())
    assert "not an nn.Module" in report.advice[0]


@pytest.mark.parametrize(("make", "shape"), [(lambda: Net(nn.SiLU()), (4,)), (temporal, (2, 16))])
def test_what_is_right_costs_some_twenty_steps(make, shape, monkeypatch):
    torch.manual_seed(0)
    model, x0 = hosm.ScoreModel(make().double(), VP), torch.randn(2, *shape, dtype=torch.float64)
    with CountFlops() as step:
        hosm.third_order_dsm(model, x0).backward()
    made, derive = [], differences.derive
    monkeypatch.setattr(
        differences, "derive", lambda *args, **kw: made.append(1) or derive(*args, **kw)
    )
    with CountFlops() as flops:
        hosm.check_derivatives(model, x0)
    assert len(made) == 31
    assert flops.total <= 22 * step.total


CASES = list(
    zip(product(ENGINES, (torch.float32, torch.float64)), 2 * list(networks()), strict=True)
)


@pytest.mark.parametrize(("case", "name"), CASES)
def test_neither_is_it_with_any_engine_and_dtype(case, name):
    engine, dtype = case
    network, shape = networks()[name]
    check(lambda: network.to(dtype), dtype=dtype, shape=shape, engine=engine)


ALONE = "samples that do not affect each other"
WRONG = {
    "a detach": (around(detaching), TAYLOR | FLOAT32, LAYER, "off by", GENERAL),
    "the last order": (
        around(lambda x: x.sin() + (x - x.detach()) ** 3),
        THREE,
        "the gradient of the gradient of the quadratic form off by",
        LAYER,
    ),
    "two levels down": (
        lambda: Net(nn.Sequential(nn.Sequential(nn.Linear(4, 4), Function(detaching)))),
        FLOAT32,
        "in the module 'layer.0.1' (Function)",
        GENERAL,
    ),
    "in small data": (around(detaching), FLOAT32 | REVERSE | {"size": 1e-5}, LAYER, GENERAL),
    "in large data": (
        lambda: lambda x, t: x * x.detach(),
        FLOAT32 | {"size": 1e4},
        "directional derivative off by",
        "its own forward",
        GENERAL,
    ),
    "slight": (around(slightly), {}, LAYER, "off by 0"),
    "slight beside float32": (within(beside_float32(slightly)), {}, "off by 0"),
    "late": (within(late), LATE, "its own forward", GENERAL),
    "in parameters": (
        lambda: Net(WithoutGraph(4, 4)),
        {},
        "the gradient of the value off by",
        "'layer' (WithoutGraph)",
    ),
    "inside float32": (around(lambda x: detaching(x.float()).to(x)), {}, LAYER, "off by"),
    "none in float32": (
        lambda: lambda x, t: x.sin() if x.dtype == torch.float64 else x * margins(x),
        FLOAT32 | {"batch": 1},
        "no derivative at all",
        GENERAL,
    ),
    "not finite": (around(taken), TAYLOR, LAYER, "torch.where(x"),
    **{
        f"not finite beside abs, order {order}": (
            around(lambda x: x.abs() + (0 * x).square().sum(1, keepdim=True).sqrt()),
            {"order": order},
            LAYER,
            "that is not finite",
            "A root, a norm",
        )
        for order in (2, 3)
    },
    "no primitive": (
        lambda: Net(nn.LayerNorm(4)),
        REVERSE | {"primitives": False},
        "'layer' (LayerNorm)",
        "Leave primitives=True",
    ),
    # Functions.
    "no rule": (around(Partly.apply), TAYLOR, LAYER, "no derivative at all", "Partly"),
    "once": (
        lambda: OfX(nn.Sequential(nn.Linear(4, 4), Function(OnceDifferentiable.apply))),
        REVERSE | {"prediction": "x0"},
        "no derivative at all",
        "OnceDifferentiable",
    ),
    "a small part": (around(lambda x: 0.03 * Partly.apply(x)), FLOAT32 | REVERSE, LAYER, "off by"),
    "a kernel of float32": (
        around(PartlyInFloat32.apply),
        FLOAT32 | REVERSE,
        LAYER,
        "needs a backward",
    ),
    "EDM's": (around(named("AttentionOp", Sine)), TAYLOR, LAYER, "right in reverse mode"),
    # Jumps.
    "ReLU": (lambda: Net(nn.ReLU()), FLOAT32, "relu, whose derivative", "(ReLU)", "nn.SiLU"),
    "convolutions": (lambda: convolutions(nn.ReLU()), IMAGES | FLOAT32, "relu, whose derivative"),
    "maximum": (
        around(lambda x: torch.maximum(x, x.flip(1))),
        REVERSE | THREE,
        "maximum, whose derivative jumps",
        LAYER,
    ),
    "ELU": (lambda: Net(nn.ELU()), THREE, "elu, whose second derivative jumps", "(ELU)"),
    # Values.
    "infinite": (
        around(lambda x: x / 0),
        {},
        "8 NaN or infinite of 8, first in the module 'layer'",
    ),
    "a buffer": (lambda: Net(Counts()), {}, "buffers layer.seen"),
    "chance": (around(counting()), {}, "same output for the same input and seed"),
    "half": (
        lambda: Net(nn.Sequential(Function(torch.Tensor.half), Function(torch.Tensor.float))),
        FLOAT32,
        "'layer.0'",
        IN_HALF,
    ),
    "autocast": (around(in_autocast), FLOAT32, "'layer'", IN_HALF),
    "half in a function": (around(InHalf.apply), FLOAT32, "its own forward", IN_HALF),
    # Samples.
    "batch norm": (lambda: Net(nn.BatchNorm1d(4)), {}, ALONE, "'layer' (Batch", "GroupNorm"),
    "a mean": (
        lambda: Net(nn.Sequential(Function(lambda x: x - x.mean(0)))),
        FLOAT32,
        ALONE,
        "'layer.0' (Function)",
        "over the first dimension",
    ),
    "its own": (within(lambda hidden, t: hidden * t[0]), {}, ALONE, "its own forward"),
    "the last sees the first": (within(lambda hidden, t: hidden * hidden[:1]), {}, ALONE),
    "the first sees the last": (within(lambda hidden, t: hidden * hidden[-1:]), {}, ALONE),
    "places": (
        within(lambda hidden, t: hidden * torch.arange(len(hidden))[:, None]),
        {},
        "depends on the position in the batch",
    ),
    "memory": (within(remembering()), {}, "state that it keeps from an earlier call"),
    "a set": (within(attends), given(tokens=TABLE), "model_kwargs['tokens']: expected"),
    "a set of five": (
        within(attends),
        {"batch": 5} | given(tokens=torch.randn(5, 4, dtype=torch.float64)),
        "model_kwargs['tokens']: expected",
        "hosm_losses.Shared(tensor)",
    ),
    "two tables": (
        within(by_place),
        given(own=TABLE, tables=[TABLE, TABLE]),
        "model_kwargs['tables'][0] and model_kwargs['tables'][1]: expected",
    ),
}


def told(make, **options):
    with pytest.raises((hosm.DerivativeError, TypeError)) as caught:
        check(make, **TWO | options)
    assert (caught.type is TypeError) is (IN_HALF in str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=layer_norm_is_wrong) if name == "no primitive" else name
        for name in WRONG
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(name):
    make, options, *words = WRONG[name]
    message = told(make, **options)
    for each in words:
        assert each in message
    assert "order two" not in message


REMEDIES = {
    "CheckpointFunction": "lambda f, i, p, flag: hosm_losses.checkpoint(f, *i) if flag else f(*i)",
    "UpFirDn2dCompiled": "impl='ref'",
    "FlashKernel": "plain attention",
    "XformersKernel": "plain attention",
    "Kernel": "needs a backward that can be differentiated again",
}


def test_functions_at_fault_have_the_remedies_of_their_names_each_once():
    def function(x):
        for name in REMEDIES:
            x = named(name)(x)
        return x

    message = told(around(function), **REVERSE)
    assert f"{LAYER}. In its graph: " in message
    for words in (*REMEDIES, GENERAL):
        assert words in message
    for words in REMEDIES.values():
        assert message.count(words) == 1


def test_what_is_not_at_fault_is_not_blamed():
    class FlashAttentionCheckpoint(Function):
        """A name alone."""

    beside = nn.Sequential(
        Function(named("FlashKernel", Sine)), FlashAttentionCheckpoint(detaching)
    )
    message = told(lambda: Net(beside), primitives=False, **REVERSE)
    assert "in the module 'layer.1' (FlashAttentionCheckpoint)" in message
    assert GENERAL in message
    for words in ("In its graph", "plain attention", "autograd.Function", "primitives"):
        assert words not in message


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4)), lambda: Function(detaching)],
)
def test_the_network_and_the_generator_stay_as_they_were(make):
    network = Net(make()).float()
    network.outer.requires_grad_(False)
    network.inner.eval()
    before, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    with contextlib.suppress(hosm.DerivativeError):
        hosm.check_derivatives(hosm.ScoreModel(network, VP), TABLE.float(), 2)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.outer.weight.requires_grad
    assert [network.inner.training, network.layer.training] == [False, True]
    assert not any(module._forward_pre_hooks for module in network.modules())


class Writing(MLP):
    """It writes to its input, its condition, its times and a buffer, and draws."""

    def __init__(self):
        super().__init__(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, y):
        self.calls += 1
        torch.rand(1)
        return super().forward(x.mul_(2) + y.mul_(2), t.mul_(2))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode, torch.no_grad])
def test_a_network_that_writes_to_its_inputs_changes_no_tensor_of_the_caller(mode):
    own = hosm.ScoreModel(Writing(), VP)
    with mode():
        x0, t, y = 1 * TABLE, 0.5 + 0 * TABLE[:, 0], 2 * TABLE
        before = copy.deepcopy([own.state_dict(), torch.get_rng_state(), x0, t, y])
        hosm.check_derivatives(own, x0, t=t, model_kwargs={"y": y}, engine="reverse")
    now = [own.state_dict(), torch.get_rng_state(), x0, t, y]
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    assert all(each.grad is None for each in own.parameters())


def test_a_network_that_cannot_be_copied_is_an_error_that_says_so():
    network = MLP(4)
    network.kept = network.inner.weight * 2
    with pytest.raises(TypeError, match=r"which says: .*deepcopy.* Check it in a fresh process"):
        hosm.check_derivatives(hosm.ScoreModel(network, VP), TABLE)


def test_autocast_around_it_is_none_of_the_network():
    with torch.autocast("cpu", torch.bfloat16):
        check(Net, dtype=torch.float32)
