"""What has to hold of the values: precision, finite numbers, and samples treated alone."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.diagnostics.test_check import Around, check
from tests.oracles import MLP, AttentionNet

ENGINES = ("auto", "taylor", "reverse")
VP = hosm.VPSchedule()
FLOAT32, FLOAT64 = torch.float32, torch.float64


class Casts(nn.Module):
    """It works in another dtype than that of x, in all or in a torso beside a skip connection."""

    def __init__(self, dtype, middle=None, skip=False):
        super().__init__()
        self.dtype, self.skip = dtype, skip
        self.inner = nn.Linear(3, 8, dtype=dtype)
        self.middle = nn.Tanh() if middle is None else middle
        self.outer = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x, t):
        hidden = self.inner(x.to(self.dtype)) + t.to(self.dtype)[:, None]
        out = self.outer(self.middle(hidden)).to(x.dtype)
        return torch.sin(x) + out if self.skip else out


class Partly(nn.Module):
    def forward(self, x):
        return x.sin() * (x + x.detach())


class OwnCast(nn.Module):
    """float32 parameters, cast to the dtype of x where they are used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=FLOAT32))

    def forward(self, x, t):
        return torch.tanh(x @ self.weight.to(x.dtype)) * t[:, None]


def check_rows(network, order=3, dtype=FLOAT64, **options):
    x0 = torch.randn(2, 3, dtype=dtype)
    hosm.check_derivatives(hosm.ScoreModel(network, VP), x0, order, **options)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["all", "torso", "parameters"])
def test_a_network_that_casts_to_float32_is_no_alarm(kind, engine, order):
    network = OwnCast() if kind == "parameters" else Casts(FLOAT32, skip=kind == "torso")
    check_rows(network, order, derivative=engine)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("skip", [False, True])
def test_and_what_is_wrong_in_it_is_found(skip, order):
    network = Casts(FLOAT32, Partly(), skip)
    with pytest.raises(hosm.DerivativeError, match=r"off by.*the module 'middle' \(Partly\)"):
        check_rows(network, order)


def test_a_table_in_float32_does_not_lower_the_precision():
    """A derivative that is wrong by less than 1 % is still found in float64."""

    class Slightly(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.layer, self.wrong = nn.Linear(3, 3), wrong
            self.register_buffer("table", torch.linspace(0, 1, 4, dtype=FLOAT32))

        def forward(self, x, t):
            features = (t.float()[:, None] * self.table).sin().sum(1)
            hidden = self.layer(x) + features.to(x.dtype)[:, None]
            return torch.sin(hidden) + self.wrong * hidden * hidden.detach()

    check_rows(Slightly(0.0))
    with pytest.raises(hosm.DerivativeError, match="off by 0"):
        check_rows(Slightly(1e-3))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_half_precision_inside_is_refused(dtype, half):
    message = rf"got {half}, in the module 'inner' \(Linear\)\. Check a float32 copy"
    with pytest.raises(TypeError, match=message):
        check_rows(Casts(half, skip=True), dtype=dtype)


def test_so_is_autocast_in_a_forward():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=FLOAT32)

        def forward(self, x, t):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x).float()

    with pytest.raises(TypeError, match=r"got torch\.bfloat16, in the module 'layer'"):
        check_rows(Autocast(), dtype=FLOAT32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_with_their_module(value):
    network = Casts(FLOAT64)
    with torch.no_grad():
        network.inner.bias[0] = value
    network.middle = nn.Identity()
    message = r"network: expected finite values; got 6 NaN or infinite of 6, first in the module "
    with pytest.raises(hosm.DerivativeError, match=message + "'inner'"):
        check_rows(network)


@pytest.mark.parametrize(("parameters", "data"), [(FLOAT32, FLOAT64), (FLOAT64, FLOAT32)])
def test_a_dtype_with_which_the_call_fails_is_explained(parameters, data):
    message = rf"network: its call failed .*The data are {data} and its parameters {parameters}"
    with pytest.raises(TypeError, match=message):
        check_rows(MLP(3).to(parameters), dtype=data)


def test_the_networks_own_error_comes_through():
    class Own(MLP):
        def forward(self, x, t):
            raise RuntimeError("the network's own words")

    with pytest.raises(RuntimeError, match=r"^the network's own words$"):
        check_rows(Own(3).double())


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Discriminating(nn.Module):
    """Minibatch discrimination: a feature of the distances to the other samples."""

    def forward(self, x):
        distances = (x[:, None] - x[None]).square().sum(-1)
        return x + (-distances).exp().sum(1, keepdim=True)


class OverBatch(nn.Module):
    """Attention that takes the samples for tokens."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = x[:, None]
        return self.attention(x, x, x, need_weights=False)[0][:, 0]


class OfTwo(nn.Module):
    """It takes batches of two alone."""

    def forward(self, x):
        return x.reshape(2, 4).sin()


class DropPath(nn.Module):
    def forward(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1), 0.5, dtype=x.dtype))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(4), r"'blocks\.1' \(BatchNorm1d\).*GroupNorm.*\.eval\(\)"),
        (Centred(), r"'blocks\.1' \(Centred\).*no mean.*over the first dimension"),
        (Discriminating(), r"'blocks\.1' \(Discriminating\)"),
        (OverBatch(), r"'blocks\.1\.attention' \(MultiheadAttention\).*batch_first=True"),
    ],
)
def test_samples_that_see_each_other_are_found_and_named(layer, message, order):
    expected = "expected every sample to be treated alone.*in the module " + message
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(hosm.DerivativeError, match=expected):
            check(Around(layer), dtype=dtype, order=order)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4).eval(), nn.Dropout(0.5), DropPath(), OfTwo(), nn.LayerNorm(4)]
)
def test_no_false_alarm(layer):
    check(Around(layer), dtype=torch.float64)


class Own(nn.Module):
    """Code in its own forward."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x, t, **conditions):
        return self.function(torch.tanh(self.layer(x)), t, **conditions)


@pytest.mark.parametrize(
    "function",
    [
        lambda hidden, t: hidden * t[0],
        lambda hidden, t: hidden * hidden.norm(),
        lambda hidden, t: hidden * (1 + t.mean()),
    ],
)
def test_the_networks_own_forward_is_named(function):
    with pytest.raises(hosm.DerivativeError, match=r"treated alone.*in its own forward"):
        check(Own(function), dtype=torch.float64)


def test_a_dependence_on_the_place_in_the_batch_is_found():
    def placed(hidden, t):
        return hidden * torch.arange(1, 1 + len(hidden), dtype=hidden.dtype)[:, None]

    with pytest.raises(hosm.DerivativeError, match=r"follow their samples.*place in the batch"):
        check(Own(placed), dtype=torch.float64)


def test_what_is_kept_from_an_earlier_call_is_named_as_a_cause():
    kept = []

    def cached(hidden, t):
        kept.append(t[:, None])
        return hidden * kept[0]

    with pytest.raises(hosm.DerivativeError, match=r"what it keeps from an earlier call"):
        check(Own(cached), dtype=torch.float64)


def test_one_sample_sees_no_others():
    network = Own(lambda hidden, t: hidden * t[0])
    hosm.check_derivatives(hosm.ScoreModel(network, VP), torch.randn(1, 4))


class Tokens(nn.Module):
    """Two tokens with positions, a label and what else is found in its conditions."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.network, self.dropout = AttentionNet(3), nn.Dropout(dropout)

    def forward(self, x, t, label=None, ids=None, cond=None):
        for table in (ids, *found(cond)):
            x = x + table
        return self.dropout(self.network(x, t, label))


def found(cond):
    if cond is None:
        return []
    entries = cond.values() if isinstance(cond, dict) else cond
    return [
        each
        for entry in entries
        for each in (entry if isinstance(entry, tuple | list) else [entry])
    ]


def tokens(batch=2, dropout=0.0, **conditions):
    torch.manual_seed(0)
    model = hosm.ScoreModel(Tokens(dropout), VP)
    hosm.check_derivatives(
        model, torch.randn(batch, 2, 3), model_kwargs={"label": torch.rand(batch), **conditions}
    )


POSITIONS = torch.randn(2, 2, 3).unbind()


@pytest.mark.parametrize(
    ("conditions", "path"),
    [
        ({"ids": POSITIONS[0]}, r"^model_kwargs\['ids'\]: expected"),
        (
            {"ids": torch.zeros(()), "cond": OrderedDict(pos=[POSITIONS[0]])},
            r"^model_kwargs\['cond'\]\['pos'\]\[0\]: expected",
        ),
        (
            {"ids": torch.zeros(()), "cond": Pair(POSITIONS[0], torch.zeros(2, 1, 1))},
            r"^model_kwargs\['cond'\]\.first: |^model_kwargs\['cond'\]\[0\]: ",
        ),
        (
            {"ids": POSITIONS[0], "cond": {"other": POSITIONS[1]}},
            r"^model_kwargs\['ids'\] and model_kwargs\['cond'\]\['other'\]: expected",
        ),
    ],
)
def test_a_table_taken_for_the_samples_is_named(conditions, path):
    with pytest.raises(hosm.DerivativeError, match=path + r".*Shared\(tensor\)"):
        tokens(**conditions)


@pytest.mark.parametrize(
    "conditions",
    [
        {"ids": hosm.Shared(POSITIONS[0])},
        {"ids": torch.randn(2, 1, 3)},
        {"ids": hosm.Shared(POSITIONS[0]), "cond": {"own": torch.randn(2, 2, 3)}},
    ],
)
def test_what_is_marked_or_does_belong_to_the_samples_is_no_alarm(conditions):
    tokens(**conditions)


def test_another_batch_size_tells_them_apart():
    tokens(batch=3, ids=POSITIONS[0])


def test_what_draws_by_place_is_not_permuted():
    tokens(dropout=0.5, ids=hosm.Shared(POSITIONS[0]))


def test_the_row_of_a_padding_index_is_left_where_it_is():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bag = nn.Embedding(9, 4, padding_idx=0), nn.EmbeddingBag(9, 4)
            self.layers = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 2))

        def forward(self, x, t, tokens):
            told = self.table(tokens).mean(1) + self.bag(tokens)
            return self.layers(torch.cat([x, told], 1))

    network = Network()
    with torch.no_grad():
        network.table.weight[0].normal_()
    tokens = torch.tensor([[1, 2], [3, 0], [5, 6], [7, 0]])
    model = hosm.ScoreModel(network, hosm.VPSchedule())
    hosm.check_derivatives(model, torch.randn(4, 2), model_kwargs={"tokens": tokens})
