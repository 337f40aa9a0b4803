"""The modules: options that are held, terms beside the loss, and what is refused."""

import inspect
import sys

import numpy as np
import pytest
import torch
from torch import nn

import hosm_losses as hosm
from tests.cases import FUNCTIONS, MLP, MODULES, VP


def setting():
    return hosm.ScoreModel(MLP(2), VP), torch.randn(4, 2)


@pytest.mark.parametrize(
    "value", [hosm.Hutchinson(2, "dct"), hosm.Paired(4), "exact", np.int32(3)]
)
def test_it_holds_the_model_alone_and_prints_its_options_as_they_are_written(value):
    model, _ = setting()
    module = hosm.ThirdOrderDSM(model, probes=value, weights=torch.ones(4))
    assert module.model is model
    assert set(module.state_dict()) == {f"model.{key}" for key in model.state_dict()}
    assert len(list(module.parameters())) == len(list(model.parameters()))
    shown = hosm.Hutchinson(3) if value == 3 else value
    assert f"probes={shown!r}, targets=None, weights=tensor([1., 1., 1., 1.])" in repr(module)
    toy = hosm.ThirdOrderDSM(model, weights="paper-toy", fraction=np.float32(0.5))
    assert "weights='paper-toy', weighting='noise'" in repr(toy)
    assert "fraction=0.5, " in repr(toy)


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
        hosm.second_order_dsm(model, torch.randn(3, 2), engine="reverse")
    hosm.FirstOrderDSM(model)


def test_terms_keep_their_times_where_a_wrapper_makes_the_tuple_again():
    """As DistributedDataParallel does with static_graph=True, and accelerate."""
    model = setting()[0]
    loss = hosm.ThirdOrderDSM(model, fraction=0.5)
    _, terms = loss(torch.randn(4, 2), return_terms=True)
    again = type(terms)(*terms)
    assert again.t is terms.t
    assert again.rows is terms.rows
    with pytest.raises(AttributeError):
        type(terms)(*[term.clone() for term in terms]).rows  # noqa: B018


def test_a_module_takes_the_options_of_its_function():
    inputs = {"model", "x0", "t", "noise", "probe", "generator", "model_kwargs"}
    for order in (1, 2, 3):
        shown = inspect.signature(FUNCTIONS[order]).parameters
        held = inspect.signature(MODULES[order]).parameters
        assert set(shown) - inputs == set(held) - {"model"}
        for name in set(held) - {"model"}:
            assert shown[name].default == held[name].default, name
