"""What belongs to a sample goes with it; what a network writes to its times stays its own."""

import copy
import warnings
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.model.conditions import bound, map_tensors, unwrapped
from tests.oracles import MLP

LOSSES = {1: hosm.first_order_dsm, 2: hosm.second_order_dsm, 3: hosm.third_order_dsm}
Pair = namedtuple("Pair", ["label", "scale"])  # noqa: PYI024


@dataclass(frozen=True)
class Frozen:
    label: torch.Tensor
    scale: float = 2.0
    derived: str = field(init=False, default="kept")


class Ours(UserDict):
    pass


class Writes(nn.Module):
    """The same function with and without a write to its input and times."""

    def __init__(self, writes):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.writes = MLP(3), writes

    def forward(self, x, t):
        if self.writes:
            t *= 1000
            x.mul_(2)
            return self.inner(x / 2, t / 1000)
        return self.inner(x * 2 / 2, t * 1000 / 1000)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow_prediction"])
@pytest.mark.parametrize(
    "weighting", ["noise", "likelihood", pytest.param(lambda t: 1 + t, id="its own")]
)
@pytest.mark.parametrize(
    ("order", "options"),
    [
        (1, {}),
        *((order, {"derivative": d}) for order in (2, 3) for d in ("auto", "reverse")),
        (3, {"third": "laplacian", "probes": 2}),
        (3, {"fraction": 0.5, "probes": 2}),
    ],
    ids=str,
)
def test_a_network_may_write_to_its_input_and_times(order, options, weighting, prediction):
    found = []
    for writes in (False, True):
        network = Writes(writes)
        model = hosm.ScoreModel(network, hosm.VPSchedule(), prediction)
        torch.manual_seed(1)
        t = torch.linspace(0.2, 0.7, 4)
        given = t.clone()
        loss = LOSSES[order](model, torch.randn(4, 3), t=given, weighting=weighting, **options)
        found.append((loss, *gradients(network, loss)))
        assert torch.equal(given, t)
    same(found[1], found[0])


@pytest.mark.parametrize(
    "time",
    [None, 2.0, lambda t: t, lambda t: t.mul_(3)],
    ids=["none", "number", "same", "in place"],
)
def test_so_may_the_function_of_time(time):
    model = hosm.ScoreModel(Writes(True), hosm.VPSchedule(), time=time)
    x, t = torch.randn(2, 3), torch.full((2,), 0.3)
    first = model.noise(x, t)
    same(model.noise(x, t), first)
    assert torch.equal(t, torch.full((2,), 0.3))


@pytest.mark.parametrize("method", ["fixed", "adaptive"])
def test_and_in_a_likelihood(method):
    x, found = torch.randn(3, 3), []
    for writes in (False, True):
        model = hosm.ScoreModel(Writes(writes), hosm.VPSchedule())
        found.append(
            hosm.ode_nll(model, x, method=method, divergence="exact", steps=8, tolerance=0.1).nll
        )
    same(found[1], found[0])


class Changes(nn.Module):
    """Adds a condition to x after it was doubled, in place or not, where a container holds it."""

    def __init__(self, read, write):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.read, self.write = MLP(3), read, write

    def forward(self, x, t, cond):
        label = self.read(cond)
        if self.write is None:
            return self.inner(x + 2 * label, t)
        self.write(cond, label)
        # Complex numbers: the first engine has tried this network when another takes its place.
        return self.inner(torch.fft.ifft(torch.fft.fft(x + self.read(cond))).real, t)


def set_name(cond, label):
    cond.y = 2 * label


def set_entry(cond, label):
    cond["y"] = 2 * label


def in_place(_cond, label):
    label.mul_(2)


KEEPERS = {
    "tensor": (lambda y: y, lambda c: c, in_place),
    "deep": (lambda y: {"a": [Pair(y, 1.0)]}, lambda c: c["a"][0].label, in_place),
    "dict": (lambda y: {"y": y}, lambda c: c["y"], set_entry),
    "OrderedDict": (lambda y: OrderedDict(y=y), lambda c: c["y"], set_entry),
    "namespace": (lambda y: SimpleNamespace(y=y), lambda c: c.y, set_name),
}
USES = {
    "order two": hosm.second_order_dsm,
    "reverse": partial(hosm.third_order_dsm, derivative="reverse"),
    "paired": partial(hosm.second_order_dsm, estimator="paired"),
    "stein": hosm.stein_dsm,
    "fixed": lambda model, x, **given: hosm.ode_nll(model, x, steps=4, **given).nll.sum(),
    "adaptive": lambda model, x, **given: hosm.ode_nll(
        model, x, method="adaptive", tolerance=0.1, **given
    ).nll.sum(),
    "graph": lambda model, x, **given: hosm.ode_nll(
        model, x, steps=4, enable_grad=True, **given
    ).nll.sum(),
    "sample": lambda model, x, **given: hosm.ode_sample(model, x, steps=4, **given).x.sum(),
    "bound": lambda model, x, **given: hosm.variational_nll(
        model, x, samples=2, **given
    ).nll.sum(),
}


@pytest.mark.filterwarnings("ignore:derivative='auto'")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_network_may_write_to_what_belongs_to_its_samples(keeper, use):
    """Every evaluation is given its own copy, and the caller's stays as it was."""
    (hold, read, write), x = KEEPERS[keeper], torch.randn(4, 3)
    label = torch.randn(4, 3)
    found = []
    for changes in (None, write):
        network, held = Changes(read, changes), hold(label.clone())
        generator = torch.Generator().manual_seed(0)
        model, kwargs = hosm.ScoreModel(network, hosm.VPSchedule()), {"cond": held}
        value = USES[use](model, x, generator=generator, model_kwargs=kwargs)
        parts = gradients(network, value) if value.requires_grad else ()
        found.append((value.detach(), *parts))
        assert torch.equal(read(held), label)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("use", ["order two", "fixed", "sample", "bound"])
@pytest.mark.parametrize(
    "keeper", sorted(KEEPERS.keys() - {"dict"})
)  # a dict is the network's own
def test_a_network_that_writes_to_what_all_samples_share_is_an_error(keeper, use):
    hold, read, write = KEEPERS[keeper]
    model = hosm.ScoreModel(Changes(read, write), hosm.VPSchedule())
    kwargs = {"cond": hosm.Shared(hold(torch.randn(3)))}
    named = r"model_kwargs\['cond'\].*: expected a network that leaves what all samples share"
    with pytest.raises(ValueError, match=named):
        USES[use](model, torch.randn(4, 3), model_kwargs=kwargs)


def test_a_callable_weighting_may_write_to_its_times_too():
    model = hosm.ScoreModel(MLP(3), hosm.VPSchedule())
    x0, noise, t = torch.randn(2, 3), torch.randn(2, 3), torch.full((2,), 0.3)
    hosm.first_order_dsm(model, x0, t=t, noise=noise, weighting=lambda t: t.mul_(2))
    assert torch.equal(t, torch.full((2,), 0.3))


class Conditioned(nn.Module):
    """Reads its label out of any container."""

    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.read = MLP(3), read

    def forward(self, x, t, cond):
        label = self.read(cond)
        assert len(label) == len(x)
        return self.inner(x * label[:, None], t)


CONTAINERS = {
    "dict": (lambda y: {"label": y}, lambda c: c["label"]),
    "OrderedDict": (lambda y: OrderedDict(label=y), lambda c: c["label"]),
    "UserDict": (lambda y: Ours(label=y), lambda c: c["label"]),
    "proxy": (lambda y: MappingProxyType({"label": y}), lambda c: c["label"]),
    "namedtuple": (lambda y: Pair(y, 2.0), lambda c: c.label),
    "dataclass": (lambda y: Frozen(y), lambda c: c.label),
    "list": (lambda y: ["text", y], lambda c: c[1]),
    "nested": (lambda y: {"a": [OrderedDict(b=Pair(Frozen(y), None))]}, None),
}
CONTAINERS["nested"] = (CONTAINERS["nested"][0], lambda c: c["a"][0]["b"].label.label)


@pytest.mark.parametrize("options", [{"probes": 3}, {"fraction": 0.5}], ids=str)
@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("order", [2, 3])
def test_conditions_follow_their_samples_out_of_any_container(order, name, options):
    make, read = CONTAINERS[name]
    label, found = torch.rand(4) + 0.5, []
    for pack, unpack in ((lambda y: y, lambda y: y), (make, read)):
        network = Conditioned(unpack)
        model = hosm.ScoreModel(network, hosm.VPSchedule())
        torch.manual_seed(1)
        kwargs = {"cond": pack(label)}
        loss = LOSSES[order](model, torch.randn(4, 3), model_kwargs=kwargs, **options)
        found.append((loss, *gradients(network, loss)))
    same(found[1], found[0])


class Positions(nn.Module):
    """Adds a table of positions whose rows are elements, not samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = MLP(4)

    def forward(self, x, t, table, label=None):
        assert len(table) == 4
        hidden = x + table.sum(1)
        return self.inner(hidden if label is None else hidden * label[:, None], t)


@pytest.mark.parametrize(
    "options",
    [{"probes": 2}, {"fraction": 0.5}, {"fraction": 0.5, "probes": 3}],
    ids=str,
)
@pytest.mark.parametrize("order", [2, 3])
def test_a_table_as_long_as_the_batch_is_shared_when_it_is_marked(order, options):
    table, label, found = torch.randn(4, 2), torch.rand(4), []
    for shared in (False, True):
        network = Positions()
        holder = network if shared else _Module(network, table)
        model = hosm.ScoreModel(holder, hosm.VPSchedule())
        kwargs = {"label": label} | ({"table": hosm.Shared(table)} if shared else {})
        torch.manual_seed(1)
        loss = LOSSES[order](model, torch.randn(4, 4), model_kwargs=kwargs, **options)
        found.append((loss, *gradients(network, loss)))
    same(found[1], found[0])


class _Module(nn.Module):
    def __init__(self, network, table):
        super().__init__()
        self.network, self.table = network, table

    def forward(self, x, t, label):
        return self.network(x, t, self.table, label)


def test_what_is_shared_stays_so_when_rows_become_as_many():
    """Of 8 samples a half is evaluated twice: a table of 4 rows is nobody's."""
    model = hosm.ScoreModel(Positions(), hosm.VPSchedule())
    kwargs = {"table": torch.randn(4, 2)}
    options = {"fraction": 0.5, "probes": 2}
    loss = hosm.third_order_dsm(model, torch.randn(8, 4), model_kwargs=kwargs, **options)
    assert torch.isfinite(loss)


def test_a_shared_tensor_keeps_its_gradient_and_a_likelihood_takes_it():
    table, x = torch.randn(4, 2, requires_grad=True), torch.randn(4, 4)
    label, found = torch.rand(4), []
    kwargs = {"label": label, "table": hosm.Shared(table)}
    model = hosm.ScoreModel(Positions(), hosm.VPSchedule())
    holder = hosm.ScoreModel(_Module(Positions(), table), hosm.VPSchedule())
    for each, given in ((model, kwargs), (holder, {"label": label})):
        torch.manual_seed(1)
        loss = hosm.second_order_dsm(each, x, probes=2, model_kwargs=given)
        found.append(torch.autograd.grad(loss, table))
    same(*found)
    whole = hosm.ode_nll(model, x, divergence="exact", steps=4, model_kwargs=kwargs).nll
    parts = hosm.ode_nll(
        model, x, divergence="exact", steps=4, batch_size=1, model_kwargs=kwargs
    ).nll
    same(parts, whole)


def test_a_container_without_tensors_is_handed_on_as_it_is():
    class Odd:
        pass

    given = {"odd": Odd(), "pair": Pair("a", 1), "ours": Ours(a=1), "frozen": Frozen(1.0)}
    found = unwrapped(map_tensors(bound(given, 4), torch.clone))
    assert all(found[name] is given[name] for name in given)


def test_what_is_not_of_the_samples_comes_back_unmarked_and_unchanged():
    table = torch.randn(3, 2)
    given = {"a": OrderedDict(b=table, c=torch.tensor(1.0)), "d": hosm.Shared([table, "text"])}
    marked = bound(given, 4)
    assert isinstance(marked["a"]["b"], hosm.Shared)
    found = unwrapped(marked)
    assert type(found["a"]) is OrderedDict
    assert found["a"]["b"] is table
    assert found["d"][0] is table
    assert found["d"][1] == "text"
    assert isinstance(given["d"], hosm.Shared)


def test_a_container_that_cannot_be_copied_is_named():
    class Closed(dict):
        def __setitem__(self, key, value):
            raise PermissionError("closed")

    model = hosm.ScoreModel(Conditioned(lambda c: c["label"]), hosm.VPSchedule())
    kwargs = {"cond": Closed(label=torch.rand(4))}
    with pytest.raises(TypeError, match=r"model_kwargs\['cond'\]: expected a container .* closed"):
        hosm.third_order_dsm(model, torch.randn(4, 3), probes=2, model_kwargs=kwargs)


def test_a_mark_copies_and_shows_what_it_holds():
    mark = copy.deepcopy(hosm.Shared([1, 2]))
    assert mark.value == [1, 2]
    assert repr(mark) == "Shared([1, 2])"


def test_a_namespace_follows_its_samples():
    """What a network cuts to its batch would otherwise be another sample's, without an error."""
    labels = torch.arange(4.0) / 4
    model = hosm.ScoreModel(lambda x, t, c: x * c.y[: len(x), None], hosm.VPSchedule())
    options = {"divergence": "exact", "steps": 8, "batch_size": 2}
    conditions = SimpleNamespace(y=labels, name="labels")
    mine = hosm.ode_nll(model, torch.ones(4, 2), model_kwargs={"c": conditions}, **options)
    whole = hosm.ode_nll(
        model, torch.ones(4, 2), model_kwargs={"c": conditions}, **{**options, "batch_size": None}
    )
    torch.testing.assert_close(mine.nll, whole.nll)
    assert conditions.y is labels


class Held:
    """A container that is none here."""

    def __init__(self, table):
        self.table = table


def test_an_object_that_holds_a_tensor_of_the_samples_is_named():
    model = hosm.ScoreModel(lambda x, t, c: x * c.table.mean(), hosm.VPSchedule())
    x0 = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"model_kwargs\['c'\]: expected .* of type Held, which"):
        hosm.second_order_dsm(model, x0, model_kwargs={"c": Held(torch.randn(4, 2))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.second_order_dsm(model, x0, model_kwargs={"c": Held(torch.randn(5, 2))})
        marked = hosm.Shared(Held(torch.randn(4, 2)))
        hosm.second_order_dsm(model, x0, model_kwargs={"c": marked})
        # One sample is not split.
        hosm.second_order_dsm(model, x0[:1], model_kwargs={"c": Held(torch.randn(1, 2))})


WORDS = ("one", "two", "three", "four")
LABELS = {
    "words": list(WORDS),
    "a tuple of words": WORDS,
    "numbers": [0, 1, 2, 3],
    "an array": np.arange(4),
    "an array in a dict": {"y": [np.arange(4)]},
    "a deque": deque([torch.randn(4, 2)]),
}
OTHERS = {"a size": (8, 8, 8, 8), "three words": list(WORDS[:3]), "an array": np.arange(5)}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_are_not_split_are_named(what):
    """A network that pairs them with its rows gives others to the samples of a later part."""
    model, x = hosm.ScoreModel(lambda x, t, c: x, hosm.VPSchedule()), torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"model_kwargs\['c'\].* as long as the batch"):
        hosm.ode_nll(model, x, batch_size=2, model_kwargs={"c": LABELS[what]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.ode_nll(model, x, model_kwargs={"c": hosm.Shared(LABELS[what])})


def test_the_advice_for_labels_leaves_tensors_next_to_them_split():
    """Shared(...) around the whole dict would give y of others to samples of a later part."""
    model = hosm.ScoreModel(lambda x, t, c: x * c["y"][:, None], hosm.VPSchedule())
    c, options = {"y": torch.linspace(0, 1, 4), "w": list(WORDS)}, {"divergence": "exact"}
    with pytest.warns(UserWarning, match=r"\['c'\]\['w'\]: .* Shared\(\.{3}\) around this alone"):
        whole = hosm.ode_nll(model, torch.ones(4, 2), model_kwargs={"c": c}, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = {"c": {**c, "w": hosm.Shared(c["w"])}}
        options["batch_size"] = 2
        parts = hosm.ode_nll(model, torch.ones(4, 2), model_kwargs=given, **options)
    torch.testing.assert_close(parts.nll, whole.nll)


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_is_said_of_what_goes_with_no_sample(what):
    model = hosm.ScoreModel(lambda x, t, c: x, hosm.VPSchedule())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosm.ode_nll(model, torch.randn(4, 3), batch_size=2, model_kwargs={"c": OTHERS[what]})


class Graph(nn.Module):
    """One whose elements are nodes of a graph."""

    def __init__(self):
        super().__init__()
        self.inner = MLP(4)

    def forward(self, x, t, graph):
        return self.inner((graph @ x.T).T, t)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:derivative='auto'")  # no rule for a sparse product
@pytest.mark.parametrize("options", [{"probes": 2}, {"fraction": 0.5}], ids=str)
@pytest.mark.parametrize("to", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_sparse_table_as_long_as_the_batch_has_to_be_marked(to, options):
    """As an adjacency matrix of as many nodes as there are samples: PyTorch would not index it."""
    model = hosm.ScoreModel(Graph(), hosm.VPSchedule())
    table, x0 = to(torch.eye(4)), torch.randn(4, 4)
    with pytest.raises(
        TypeError, match=r"graph'\]: expected a dense tensor.*layout torch\.sparse"
    ):
        hosm.third_order_dsm(model, x0, model_kwargs={"graph": table}, **options)
    loss = hosm.third_order_dsm(model, x0, model_kwargs={"graph": hosm.Shared(table)}, **options)
    assert torch.isfinite(loss)
