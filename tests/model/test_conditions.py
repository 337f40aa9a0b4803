"""What belongs to a sample goes with it; what a network writes to its arguments stays its own."""

import warnings
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import MLP, VP, assert_same, with_gradients

Pair = namedtuple("Pair", ["label", "scale"])  # noqa: PYI024


@dataclass(frozen=True)
class Frozen:
    label: torch.Tensor
    scale: float = 2.0
    derived: str = field(init=False, default="kept")


class Ours(UserDict):
    pass


def set_name(cond, label):
    cond.y = 2 * label


def set_entry(cond, label):
    cond["y"] = 2 * label


def in_place(_cond, label):
    label.mul_(2)


# How a label is put into a container and read out of it.
CONTAINERS = {
    "tensor": (lambda y: y, lambda c: c),
    "dict": (lambda y: {"y": y}, lambda c: c["y"]),
    "OrderedDict": (lambda y: OrderedDict(y=y), lambda c: c["y"]),
    "UserDict": (lambda y: Ours(y=y), lambda c: c["y"]),
    "proxy": (lambda y: MappingProxyType({"y": y}), lambda c: c["y"]),
    "namedtuple": (lambda y: Pair(y, 2.0), lambda c: c.label),
    "dataclass": (lambda y: Frozen(y), lambda c: c.label),
    "namespace": (lambda y: SimpleNamespace(y=y, name="y"), lambda c: c.y),
    "list": (lambda y: ["text", y], lambda c: c[1]),
    "nested": (
        lambda y: {"a": [OrderedDict(b=Pair(Frozen(y), None))]},
        lambda c: c["a"][0]["b"].label.label,
    ),
}


class Conditioned(nn.Module):
    """An MLP of x plus twice a label, which may be doubled where it is, as x and t are then."""

    def __init__(self, read, write=None, inside=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.read, self.write, self.inside = MLP(3), read, write, inside

    def forward(self, x, t, cond):
        label = self.read(cond)
        if self.write is None:
            return self.inner(x + 2 * label, t)
        self.write(cond, label)
        x.mul_(2)
        t.mul_(1000)
        return self.inner(self.inside(x / 2 + self.read(cond)), t / 1000)


FEW = hosm.FixedGrid(4)


def nll(model, x, solver=FEW, **options):
    return hosm.ode_nll(model, x, solver=solver, **options).nll.sum()


USES = {
    "taylor": partial(hosm.third_order_dsm, engine="taylor"),
    "reverse": partial(hosm.third_order_dsm, engine="reverse"),
    "falls back": hosm.second_order_dsm,
    "fraction": partial(hosm.third_order_dsm, probes=2, fraction=0.5),
    "paired": partial(hosm.second_order_dsm, probes=hosm.Paired()),
    "fixed": nll,
    "adaptive": partial(nll, solver=hosm.Adaptive(0.1)),
    "graph": partial(nll, enable_grad=True),
    "sample": lambda model, x, **given: hosm.ode_sample(model, x, solver=FEW, **given).x.sum(),
    "bound": lambda model, x, **given: hosm.variational_nll(
        model, x, samples=2, **given
    ).nll.sum(),
}
WRITES = [
    *((use, "nested", in_place) for use in USES),
    *(("falls back", *each) for each in (("dict", set_entry), ("OrderedDict", set_entry))),
    *(("falls back", *each) for each in (("namespace", set_name), ("tensor", in_place))),
]


def of_complex(x):
    """The first engine has tried a network with this when another takes its place."""
    return torch.fft.ifft(torch.fft.fft(x)).real


@pytest.mark.filterwarnings("ignore:engine='auto'")
@pytest.mark.parametrize(("use", "container", "write"), WRITES)
def test_a_network_may_write_to_all_that_it_is_given(use, container, write):
    """Every evaluation is given its own copy, and the caller's stays as it was."""
    (hold, read), x = CONTAINERS[container], torch.randn(4, 3)
    inside = of_complex if use == "falls back" else torch.clone
    for shared in (False, True):
        label, found = torch.randn(3) if shared else torch.randn(4, 3), []
        for changes in (None, write):
            network, held = Conditioned(read, changes, inside), hold(label.clone())
            model = hosm.ScoreModel(network, VP, "velocity")
            kwargs = {"cond": hosm.Shared(held) if shared else held}
            given = {"generator": torch.Generator().manual_seed(0), "model_kwargs": kwargs}
            found.append(with_gradients(USES[use](model, x, **given), network))
            assert torch.equal(read(held), label)
        assert_same(found[1], found[0])


def test_so_may_functions_of_time():
    x, t, noise = torch.randn(2, 3), torch.full((2,), 0.3), torch.randn(2, 3)
    model = hosm.ScoreModel(MLP(3), VP, time=lambda t: t.mul_(3))
    first = model.noise(x, t)
    assert torch.equal(model.noise(x, t), first)
    hosm.first_order_dsm(model, x, t=t, noise=noise, weighting=lambda t: t.mul_(2))
    assert torch.equal(t, torch.full((2,), 0.3))


@pytest.mark.parametrize("name", CONTAINERS)
def test_conditions_follow_their_samples_out_of_any_container(name):
    x, label = torch.randn(4, 3), torch.randn(4, 3)
    for use in (
        partial(hosm.third_order_dsm, probes=3, fraction=0.5),
        partial(nll, batch_size=3, enable_grad=True, divergence="exact"),
    ):
        found = []
        for hold, read in (CONTAINERS["tensor"], CONTAINERS[name]):
            network, held = Conditioned(read), hold(label)
            torch.manual_seed(1)
            value = use(hosm.ScoreModel(network, VP), x, model_kwargs={"cond": held})
            found.append(with_gradients(value, network))
            assert read(held) is label
        assert_same(found[1], found[0])


def test_a_table_of_another_length_stays_whole_when_rows_become_as_many():
    """Of 8 samples a half is evaluated: a table of 4 rows is nobody's."""
    model = hosm.ScoreModel(lambda x, t, table: (x * table.sum()).sin(), VP)
    table, x0, given = torch.rand(4), torch.randn(8, 3), {"fraction": 0.5, "probes": 2}
    found = []
    for each in (table, hosm.Shared(table)):
        given["generator"] = torch.Generator().manual_seed(0)
        found.append(hosm.third_order_dsm(model, x0, model_kwargs={"table": each}, **given))
    assert torch.equal(*found)


@pytest.mark.parametrize("loss", [hosm.first_order_dsm, partial(hosm.third_order_dsm, probes=2)])
def test_what_is_of_no_sample_reaches_the_network_as_it_is(loss):
    seen = {}

    def network(x, t, **kwargs):
        seen.update(kwargs)
        return x.sin()

    table = torch.randn(3, 2)
    given = {"odd": object(), "pair": Pair("a", 1), "ours": Ours(a=1), "frozen": Frozen(1.0)}
    given |= {"flag": True, "none": None, "table": table, "deep": OrderedDict(b=table)}
    kwargs = given | {"shared": hosm.Shared([table, "text"])}
    loss(hosm.ScoreModel(network, VP), torch.zeros(4, 2), model_kwargs=kwargs)
    tensors = {name: seen.pop(name) for name in ("table", "deep", "shared")}
    assert all(each is given[name] for name, each in seen.items())
    assert type(tensors["deep"]) is OrderedDict
    for each in (tensors["table"], tensors["deep"]["b"], tensors["shared"][0]):
        assert torch.equal(each, table)  # a copy perhaps, to which the network may write
    assert isinstance(kwargs["shared"], hosm.Shared)


WORDS = ["one", "two", "three", "four"]
UNSPLIT = [WORDS, [0, 1, 2, 3], np.arange(4)]
OF_NONE = [(8, 8, 8, 8), WORDS[:3], np.arange(5), torch.zeros(4), torch.tensor(1.0), np.array(4)]
OF_NONE += [nn.Linear(2, 4), [torch.zeros(4)] * 4, *map(hosm.Shared, UNSPLIT)]


def test_labels_that_are_not_split_are_named():
    """A network that pairs it with its rows gives others to the samples of a later part."""
    model, x = hosm.ScoreModel(lambda x, t, c: x, VP), torch.randn(4, 3)
    for value in UNSPLIT:
        with pytest.warns(UserWarning, match=r"model_kwargs\['c'\]: .*Shared\(\.{3}\)"):
            hosm.second_order_dsm(model, x, model_kwargs={"c": value})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in OF_NONE:
            hosm.second_order_dsm(model, x, model_kwargs={"c": value})
        # One sample is not split.
        hosm.second_order_dsm(model, x[:1], model_kwargs={"c": WORDS[:1]})


@pytest.mark.filterwarnings("ignore:engine='auto'")  # no rule for a sparse product
@pytest.mark.parametrize("options", [{"probes": 2}, {"fraction": 0.5}])
def test_a_sparse_table_as_long_as_the_batch_has_to_be_marked(options):
    """As an adjacency matrix of as many nodes as there are samples: PyTorch would not index it."""
    model = hosm.ScoreModel(lambda x, t, graph: (graph @ x.T).T.sin(), VP)
    table, x0 = torch.eye(4).to_sparse(), torch.randn(4, 4)
    with pytest.raises((RuntimeError, IndexError)):
        hosm.third_order_dsm(model, x0, model_kwargs={"graph": table}, **options)
    loss = hosm.third_order_dsm(model, x0, model_kwargs={"graph": hosm.Shared(table)}, **options)
    assert torch.isfinite(loss)


def noted(call, network, x0, **options):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call(hosm.ScoreModel(network, VP), x0, **options)
    (note,) = caught.value.__notes__
    return note


def test_an_error_with_other_rows_says_what_followed_them():
    """As of an edge mask (B·n·n, 1), and of a network that only takes one time."""

    def masked(x, t, y, edges):
        return (x.reshape(-1, 1, 3) * edges[0].reshape(2, 9, 1)).mean(1) + y[:, None]

    kwargs = {"y": torch.ones(2), "edges": [torch.ones(18, 1)]}
    x0 = torch.randn(2, 3)
    hosm.second_order_dsm(hosm.ScoreModel(masked, VP), x0, model_kwargs=kwargs)
    engine = {"engine": "reverse", "model_kwargs": kwargs}
    note = noted(hosm.third_order_dsm, masked, x0, probes=3, **engine)
    assert "called with 6 rows for a batch of 2" in note
    assert "Passed per sample: model_kwargs['y'] (6,); passed" in note
    assert "unchanged: model_kwargs['edges'][0] (18, 1). " in note
    note = noted(hosm.second_order_dsm, masked, x0, fraction=0.5, **engine)
    assert "called with 1 rows for a batch of 2" in note
    assert "fraction" in note
    note = noted(hosm.third_order_dsm, lambda x, t: x * t.item(), x0[:1], probes=2)
    assert "called with 2 rows for a batch of 1" in note
    assert "Passed per sample" not in note
    with pytest.raises(RuntimeError) as caught:
        hosm.first_order_dsm(hosm.ScoreModel(lambda x, t: x * t.item(), VP), x0)
    assert not hasattr(caught.value, "__notes__")
