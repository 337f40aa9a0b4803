"""Operators whose derivative jumps: who is told of them, when, and how often."""

import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import functional_call, grad

import hosm_losses as hosm
from tests.cases import FUNCTIONS, VP, Around, given
from tests.versions import compiles_higher_orders

ENGINES = ("taylor", "reverse")


def said(call):
    """The warnings of a call about derivatives that jump."""
    with warnings.catch_warnings(record=True) as all_said:
        warnings.simplefilter("always")
        call()
    return [each for each in all_said if "jumps" in str(each.message)]


def told(network, order, **options):
    """What a loss says of a network, once at most."""
    model = network if isinstance(network, hosm.ScoreModel) else hosm.ScoreModel(network, VP)
    x0, inputs = given((4, 2), order)
    found = said(lambda: FUNCTIONS[order](model, x0, **inputs | options))
    return [str(each.message) for each in found]


def pooled(h):
    return F.max_pool1d(h[:, None, :8], 2).repeat(1, 1, 3)[:, 0, :9]


def unit(h):
    return h / h.norm(dim=1, keepdim=True).clamp_min(1e-6)


def in_place(h):
    return F.hardtanh(F.relu(2 * h, inplace=True).sin(), -0.3, 0.3, inplace=True)


def loss(function, **options):
    """A loss between the hidden numbers and zero."""
    return lambda h: function(h, torch.zeros_like(h), reduction="none", **options)


class OfTime(nn.Module):
    """ReLUs that see the time alone."""

    def __init__(self):
        super().__init__()
        self.inner, self.of_t, self.outer = nn.Linear(2, 4), nn.Linear(1, 4), nn.Linear(4, 2)

    def forward(self, x, t):
        return self.outer(torch.tanh(self.inner(x)) * torch.relu(self.of_t(t[:, None])))


# Functions with what is named of them, and which derivative it is that jumps.
CASES = {
    1: {
        "relu": F.relu,
        "leaky_relu": lambda h: F.leaky_relu(input=torch.pow(input=h, exponent=1)),
        "hardswish": F.hardswish,
        "abs": lambda h: (1 + h.abs()).log(),
        "maximum": lambda h: torch.maximum(h, h.cos()),
        "max": lambda h: h * h.max(1, keepdim=True).values,
        "max_pool1d": pooled,
        "hardtanh and relu": in_place,
        "elu": lambda h: F.elu(h, 0.5),
        "smooth_l1_loss": loss(F.smooth_l1_loss, beta=0.0),
        "special_i0e": torch.special.i0e,
        "abs and relu": lambda h: F.relu(h) ** 2 + F.relu(-h).abs() + h.abs() ** 2,
    },
    2: {
        "elu": F.elu,
        "celu": lambda h: F.celu(h, 0.5),
        "softsign": F.softsign,
        "smooth_l1_loss": loss(F.smooth_l1_loss),
        "huber_loss": loss(F.huber_loss, delta=0.5),
        "special_i1e": torch.special.i1e,
        "relu": lambda h: F.relu(h) ** 2 + F.relu(-h).square(),
    },
    3: {
        "a cube": lambda h: F.relu(h) ** 3 + h.abs() ** 3,
        "a square": lambda h: h.abs() ** 2,
        "a clamp": unit,
        "a norm": F.normalize,
        "detached first": lambda h: h * h.detach().abs().amax(1, keepdim=True),
        "detached later": lambda h: h * h.abs().amax(1, keepdim=True).detach(),
        "smooth": F.gelu,
    },
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("jumps", "name"), [(each, name) for each in CASES for name in CASES[each]]
)
def test_what_is_named(jumps, name, engine):
    words = f"through {name}, whose {'second ' * (jumps - 1)}derivative jumps."
    for order in (2, 3):
        found = told(Around(CASES[jumps][name]), order, engine=engine)
        assert [words in each for each in found] == [True] * (jumps < order)


@pytest.mark.parametrize("engine", ENGINES)
def test_relus_of_the_time_alone_are_not_accused(engine):
    assert told(OfTime(), 2, engine=engine) == []


def test_once_a_network_and_in_its_first_call_with_gradients():
    model, x = hosm.ScoreModel(Around(F.relu), VP), torch.randn(4, 2)
    with torch.no_grad():
        assert said(lambda: hosm.third_order_dsm(model, x)) == []
    assert said(lambda: hosm.ode_nll(model, x, solver=hosm.FixedGrid(4))) == []
    (one,) = said(lambda: hosm.second_order_dsm(model, x))
    assert one.filename == __file__  # the caller's line
    later = (hosm.second_order_dsm, hosm.third_order_dsm)
    for function in later:
        assert said(lambda function=function: function(model, x)) == []
    assert len(told(Around(F.relu), 2)) == 1  # another network
    both = hosm.ScoreModel(Around(F.elu), VP)
    assert [len(told(both, order)) for order in (2, 3, 3, 2)] == [0, 1, 0, 0]


def test_gradients_of_a_likelihood():
    model, x = hosm.ScoreModel(Around(F.relu), VP), torch.randn(2, 2)
    call = lambda: hosm.ode_nll(model, x, solver=hosm.FixedGrid(4), enable_grad=True)  # noqa: E731
    assert [len(said(call)) for _ in range(2)] == [1, 0]


OPTIONS = [{"probes": hosm.Paired()}, {"probes": "exact"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_other_estimators(options):
    assert len(told(Around(F.relu), 3, **{"probe": None} | options)) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_where_no_value_can_be_read(engine):
    network, (x0, inputs) = Around(F.relu), given((4, 2), 2)
    inputs["engine"] = engine

    def loss(parameters):
        model = hosm.ScoreModel(lambda *given: functional_call(network, parameters, given), VP)
        return hosm.second_order_dsm(model, x0, **inputs)

    parameters = {name: each.detach() for name, each in network.named_parameters()}
    assert len(said(lambda: grad(loss)(parameters))) == 1
    model = hosm.ScoreModel(network.to("meta"), VP)
    on_meta = {name: inputs[name].to("meta") for name in ("t", "noise", "probe")}
    found = said(lambda: hosm.second_order_dsm(model, x0.to("meta"), **inputs | on_meta))
    assert len(found) == 1


@pytest.mark.slow
@compiles_higher_orders
def test_never_inside_a_compiled_graph():
    module = hosm.SecondOrderDSM(hosm.ScoreModel(Around(F.relu), VP))
    torch._dynamo.reset()
    step = torch.compile(module, backend="eager", fullgraph=True)
    x0, inputs = given((4, 2), 2)
    assert said(lambda: step(x0, **inputs)) == []
    assert len(said(lambda: module(x0, **inputs))) == 1
