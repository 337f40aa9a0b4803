"""The modules: the functions with their options held, for what wraps a module."""

import copy
import dataclasses
import inspect
import pickle
import sys

import pytest
import torch
from torch import nn

import hosm_losses as hosm
from hosm_losses.losses import options
from tests.oracles import MLP

VP = hosm.VPSchedule()
PAIRS = [
    (hosm.FirstOrderDSM, hosm.first_order_dsm, 1),
    (hosm.SecondOrderDSM, hosm.second_order_dsm, 2),
    (hosm.ThirdOrderDSM, hosm.third_order_dsm, 3),
]


def setting():
    return hosm.ScoreModel(MLP(2), VP), torch.randn(4, 2)


@pytest.mark.parametrize(("module", "function", "order"), PAIRS)
def test_module_equals_function(module, function, order):
    model, x0 = setting()
    options = {"weighting": "likelihood", "reduction": "sum"}
    if order > 1:
        options |= {
            "probes": 2,
            "distribution": "sphere",
            "weights": (0.1, 0.2, 0.3, 0.4),
            "derivative": "taylor",
            "fraction": 0.5,
        }
    expected = function(model, x0, generator=torch.Generator().manual_seed(0), **options)
    got = module(model, **options)(x0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("module", "function", "order"), PAIRS)
def test_terms_come_detached_beside_the_loss(module, function, order):
    model, x0 = setting()
    t, noise = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.randn(4, 2)
    inputs = {"t": t, "noise": noise} | ({"probe": torch.randn(4, 2)} if order > 1 else {})
    loss, terms = module(model)(x0, return_terms=True, **inputs)
    assert torch.equal(loss, function(model, x0, **inputs))
    assert loss.requires_grad
    given = [term for term in terms if term is not None]
    assert len(given) == (1 if order == 1 else order + 1)
    assert not any(term.requires_grad for term in given)
    torch.testing.assert_close(sum(term.mean() for term in given), loss.detach())


def test_weights_of_a_call_stand_before_those_of_the_module():
    model, x0 = setting()
    module = hosm.SecondOrderDSM(model, weights=(1, 1, 1))
    seed = torch.Generator()
    ramp = module(x0, generator=seed.manual_seed(0), weights=(1, 0.5, 0.5))
    expected = hosm.second_order_dsm(
        model, x0, generator=seed.manual_seed(0), weights=(1, 0.5, 0.5)
    )
    assert torch.equal(ramp, expected)


def test_keyword_arguments_of_the_network():
    seen = []

    def network(x, t, label):
        seen.append(label)
        return x

    module = hosm.FirstOrderDSM(hosm.ScoreModel(network, VP))
    label = torch.arange(4)
    module(torch.randn(4, 2), model_kwargs={"label": label})
    assert seen[0] is label


def test_it_holds_the_model_and_nothing_else_and_can_be_copied():
    model, x0 = setting()
    module = hosm.ThirdOrderDSM(model, probes="exact", weighting="native")
    assert module.model is model
    assert set(module.state_dict()) == {f"model.{key}" for key in model.state_dict()}
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        t, noise = torch.full((4,), 0.5), torch.ones(4, 2)
        assert torch.equal(clone(x0, t=t, noise=noise), module(x0, t=t, noise=noise))
    assert "probes='exact'" in repr(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda network: torch.compile(network, backend="eager"),
        lambda _: torch.jit.script(nn.LayerNorm(2)),
    ],
)
def test_a_wrapped_part_of_a_network_is_an_error_above_order_one(wrap, monkeypatch):
    model = hosm.ScoreModel(nn.Sequential(wrap(MLP(2))), VP)
    # As in a process where nothing was compiled or sharded.
    for package in ("torch._dynamo", "torch.distributed.fsdp"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    for call in (hosm.SecondOrderDSM, hosm.ThirdOrderDSM):
        with pytest.raises(TypeError):
            call(model)
    with pytest.raises(TypeError):
        hosm.second_order_dsm(model, torch.randn(3, 2), derivative="reverse")
    hosm.FirstOrderDSM(model)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_terms_come_with_their_times_and_rows(fraction):
    model, x0 = setting()
    noise, probe = torch.randn_like(x0), torch.randn_like(x0)
    module = hosm.ThirdOrderDSM(model, fraction=fraction)
    _, terms = module(x0, noise=noise, probe=probe, return_terms=True)
    whole = hosm.dsm_terms(model, x0, t=terms.t, noise=noise, probe=probe)
    rows = slice(None) if fraction == 1 else terms.rows
    assert (terms.rows is None) == (fraction == 1)
    first, *higher = terms
    torch.testing.assert_close(first, whole.first)
    for got, expected in zip(higher, whole[1:], strict=True):
        torch.testing.assert_close(got, expected[rows])
        assert not got.requires_grad
    assert isinstance(terms, hosm.DSMTerms)
    assert len(terms) == 4


@pytest.mark.parametrize("module", [hosm.FirstOrderDSM, hosm.ThirdOrderDSM, hosm.SteinDSM])
def test_times_with_a_gradient_come_detached_too(module):
    """As those of a time_sampler that is learned."""
    model, x0 = setting()
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], requires_grad=True)
    loss, terms = module(model)(x0, t=t, return_terms=True)
    assert not terms.t.requires_grad
    assert torch.equal(terms.t, t)
    loss.backward()
    assert t.grad is not None


def test_and_keep_them_where_a_wrapper_makes_the_tuple_again():
    """As DistributedDataParallel does with static_graph=True, and accelerate."""
    model = setting()[0]
    for loss in (hosm.ThirdOrderDSM(model, fraction=0.5), hosm.SteinDSM(model, fraction=0.5)):
        _, terms = loss(torch.randn(4, 2), return_terms=True)
        again = type(terms)(*terms)
        assert again.t is terms.t
        assert again.rows is terms.rows
        with pytest.raises(AttributeError):
            type(terms)(*[term.clone() for term in terms]).rows  # noqa: B018
        with pytest.raises(AttributeError):
            terms.other  # noqa: B018


@pytest.mark.parametrize(
    ("module", "name"), [(hosm.ThirdOrderDSM, "weights"), (hosm.SteinDSM, "weight")]
)
def test_tensors_of_weights_are_no_parameters(module, name):
    model = setting()[0]
    loss = module(model, **{name: torch.ones(4 if name == "weights" else ())})
    assert len(list(loss.parameters())) == len(list(model.parameters()))


def test_what_it_prints_names_every_option_and_the_weights():
    module = hosm.ThirdOrderDSM(setting()[0], weights=(1, 0.1, 0.1, 0.01), third="laplacian")
    assert "weights=(1, 0.1, 0.1, 0.01)" in repr(module)
    assert "third='laplacian'" in repr(module)


def test_every_option_is_written_once_and_shown_where_it_is_taken():
    own = {field.name for field in dataclasses.fields(options.LossOptions)} - {"order"}
    assert options.ThirdOrderOptions.__optional_keys__ == own | {"weights"}
    taken = {
        hosm.first_order_dsm: options.FirstOrderArguments,
        hosm.second_order_dsm: options.SecondOrderArguments,
        hosm.third_order_dsm: options.ThirdOrderArguments,
        hosm.dsm_terms: options.TermsArguments,
        hosm.FirstOrderDSM: options.FirstOrderOptions,
        hosm.SecondOrderDSM: options.SecondOrderOptions,
        hosm.ThirdOrderDSM: options.ThirdOrderOptions,
    }
    for function, arguments in taken.items():
        shown = inspect.signature(function).parameters
        assert shown.keys() - {"model", "x0", "order"} == arguments.__optional_keys__
    shown = inspect.signature(hosm.third_order_dsm).parameters
    assert (shown["fraction"].default, shown["probe"].default) == (1.0, None)
